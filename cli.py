"""chroma-trainer: the command line. Runs and checks the workflows that ComfyUI exports."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file, from ComfyUI's custom_nodes: no pip has been there
    from importlib import import_module, util

    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != folder]  # `import nodes` is not ours
    spec = util.spec_from_file_location("chroma_trainer", folder / "__init__.py", submodule_search_locations=[])
    assert spec and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(folder))
    sys.modules["chroma_trainer"] = util.module_from_spec(spec)
    sys.exit(import_module("chroma_trainer.cli").main())

from .nodes import CATALOGUE, lora_trainer, plan_run
from .nodes.runs.trainer_node import trainer_node
from .nodes.widget_schemas import schemas
from .nodes.wizard import quick_lora
from .trainer_core.comparison.compare_command import add_compare, compare_loras
from .trainer_core.console import Console, print_text
from .trainer_core.dataset_doctor import doctor_command
from .trainer_core.errors import Cancelled, Problem, UserError, printable
from .trainer_core.host import ASSETS, PACKAGE, Event, Machines, RunReported, SinkHost, collect, expand_home
from .trainer_core.importers.import_command import add_import, import_config
from .trainer_core.launch.run_queue import FAILED, TRAINING, WAITING, RunQueue, describe_queue
from .trainer_core.lora_tools import commands as lora_report
from .trainer_core.lora_tools.lora_commands import add_lora
from .trainer_core.paths import check_writable, local_paths
from .trainer_core.publishing.publish_command import add_publish, publish_lora
from .trainer_core.run_images.draw_command import add_draw, draw_prompts
from .trainer_core.run_images.votes import outcomes_of
from .trainer_core.runs import layout
from .trainer_core.runs.control import UNREADABLE, find_run, read_status, request, runs_in
from .trainer_core.runs.lock import RunLock
from .trainer_core.storage.atomic import write_json
from .trainer_core.storage.bounded_files import path_fault
from .trainer_core.sweep.sweep_command import add_sweep, sweep
from .trainer_core.wizard.new_command import add_new, new
from .trainer_core.workflow.check import check, list_skipped
from .trainer_core.workflow.execute import execute, up_to
from .trainer_core.workflow.graph import Graph
from .trainer_core.workflow.overrides import override
from .trainer_core.workflow.read import read_workflow

STARTED = time.perf_counter()
DEMO = PACKAGE / "workflows" / "first-lora.json"
TRAINERS = (lora_trainer.SPEC.id, quick_lora.SPEC.id)
DEMO_OUTPUT = Path("demo-output")
EXIT_DIFFERENT, EXIT_USER, EXIT_CANCELLED = 1, 2, 130
MAX_MESSAGE = 4000  # characters of one printed error
PATH_ARGUMENTS = {
    "workflow": "workflow", "file": "file", "run": "run", "output": "--output", "report": "--report",
    "first": "first", "second": "second", "base": "base", "tuned": "tuned", "target": "--output", "loras": "FILE", "fixed": "--output",
    "chart": "--chart", "files": "FILE", "models": "--models", "datasets": "--datasets", "model_config": "--model-config",
    "lora": "lora", "images": "--images", "dry_run": "--dry-run", "sheet": "--sheet",
}  # fmt: skip
CONSOLE_ENDS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT


class Interrupts:
    """Stop the run after the current step on Ctrl-C, SIGTERM or the closing of a Windows console.

    A second signal stops it immediately.
    """

    def __init__(self) -> None:
        self.seen = self._is_asked = False
        self._closing = _on_console_close(self._close)  # a reference, because Windows calls the handler
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:  # Windows has no SIGHUP, and other systems have no SIGBREAK
                continue
            is_ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if not is_ignored:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set a flag, and nothing that can raise: the signal may have hit the middle of a step."""
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; press again to stop immediately\n")

    def _close(self) -> None:
        """Wait for the run to end. Windows calls this in its own thread.

        It ends the process when this returns, and after 5 s in any case.
        """
        self.seen = True
        while threading.main_thread().is_alive():
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the run after the current step. The first signal after this still lets it end in order.

        torchrun sends a signal to all processes of a run when one of them fails, while others may be saving.
        """
        self._is_asked = True

    def __call__(self) -> bool:
        return self.seen or self._is_asked


def _on_console_close(call: Callable[[], None]) -> Any:
    """Register a function that Windows calls when its console is closed or the user logs off.

    Returns:
        The handler, which the caller must keep; None on other systems.
    """
    if sys.platform != "win32":
        return None
    import ctypes

    def handle(event: int) -> bool:
        if event in CONSOLE_ENDS:
            call()
        return event in CONSOLE_ENDS

    handler = ctypes.WINFUNCTYPE(ctypes.c_bool, ctypes.c_uint)(handle)
    ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, True)
    return handler


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 for a LoRA with faults, 2 for a user error, 130 where the user canceled."""
    for stream in (sys.stdout, sys.stderr):  # the encoding of a Windows console may lack characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = _expand_homes(_parser().parse_args(argv))
    try:
        _check_paths(arguments)
        return arguments.call(arguments)
    except UserError as error:
        if not _is_silent():
            _print_last(*(f"error: {_one_line(problem)}" for problem in error.problems))
        return EXIT_USER
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        _print_last(f"error: {printable(str(error.filename or 'output'))}: {error.strerror}")
        return EXIT_USER
    except (Cancelled, KeyboardInterrupt):
        if _is_silent():
            return 0  # else torchrun would end rank 0, which is saving
        _print_last("canceled")
        return EXIT_CANCELLED


def _is_silent() -> bool:
    """Return whether rank 0 speaks for this process: torchrun started several, and they have found each other."""
    group = sys.modules.get(f"{__package__}.trainer_core.distributed.process_group")
    return group is not None and group.has_joined() and os.environ.get("RANK") != "0"


def _expand_homes(arguments: argparse.Namespace) -> argparse.Namespace:
    """Replace a leading ~ in paths: a shell leaves it where it follows a =, as in --output=~/out."""
    for name in PATH_ARGUMENTS.keys() & vars(arguments).keys():
        value = getattr(arguments, name)
        if value:
            setattr(arguments, name, expand_home(value) if isinstance(value, str) else [expand_home(p) for p in value])
    return arguments


def _check_paths(arguments: argparse.Namespace) -> None:
    """Check that every path among the arguments can be one."""
    paths = [
        (place, path)
        for name, place in PATH_ARGUMENTS.items()
        for value in [getattr(arguments, name, None)]
        for path in (value if isinstance(value, list) else [value])
    ]
    faults = [(place, path, path_fault(path)) for place, path in paths if path]
    problems = [Problem(place, f"{path[:40]!r} {fault}") for place, path, fault in faults if fault]
    if problems:
        raise UserError(problems)


def _one_line(problem: Problem) -> str:
    text = printable(str(problem))
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _print_last(*lines: str) -> None:
    """Print to stderr, which may be closed or full by now: the exit status says the same."""
    try:
        for line in lines:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  else Python complains about the stream at its end


def run(arguments: argparse.Namespace) -> int:
    """Run the workflow: train its LoRA."""
    graph = _read_graph(arguments)
    _check_output_paths(arguments)
    reports: list[dict[str, Any]] = []

    def keep_report(event: Event) -> None:
        if isinstance(event, RunReported):
            reports.append(event.report)

    is_main = os.environ.get("RANK", "0") == "0"
    is_first = is_main and _machines(arguments).number == 0
    if not is_first:  # the LoRA is on another machine, or another process uses it
        graph = up_to(graph, TRAINERS)
    sinks = (Console(), keep_report) if is_main else (keep_report,)
    execute(graph, CATALOGUE, _host(arguments, sinks, Interrupts()))
    if arguments.report and is_first:
        write_json(Path(arguments.report), _join_reports(reports))
    return 0


def _check_output_paths(arguments: argparse.Namespace) -> None:
    """Check before the training that its results can be written."""
    if arguments.report and Path(arguments.report).is_dir():
        raise UserError.at("--report", f"{arguments.report!r} is a folder; use the path of a file")
    problems: list[Problem] = []
    collect(problems, check_writable, "--output", Path(arguments.output or "output"))
    if arguments.report:
        collect(problems, check_writable, "--report", Path(arguments.report).parent)
    if problems:
        raise UserError(problems)
    _check_device(arguments)


def _check_device(arguments: argparse.Namespace) -> None:
    if arguments.device and getattr(arguments, "devices", None):
        raise UserError.at("--device", "is one device, and --devices are several; give one of the two options")
    if arguments.device:
        from .trainer_core.devices import pick_device

        pick_device(arguments.device)


def _join_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run's report.

    With several trainers in the graph it is the last one's report, with all of them under "runs".
    """
    total = round(time.perf_counter() - STARTED, 3)
    last = dict(reports[-1]) if reports else {}
    return {**last, "total_seconds": total, **({"runs": reports} if len(reports) > 1 else {})}


def check_workflow(arguments: argparse.Namespace) -> int:
    """List all problems of a workflow without running it."""
    graph = _read_graph(arguments)
    warnings: list[str] = []
    problems = check(graph, CATALOGUE, _host(arguments), warnings)
    for text in warnings:
        print(f"warning: {printable(text)}", file=sys.stderr)
    if problems:
        raise UserError(problems)
    print_text(f"{arguments.workflow}: no problems")
    left_out = list_skipped(graph, CATALOGUE)
    if left_out:
        print_text(f"skipped, these nodes only run in ComfyUI: {', '.join(left_out)}")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Estimate memory, disk and time of a run, and suggest what fits where it does not; loads no weights."""
    graph = _read_graph(arguments)
    plans: list[dict[str, Any]] = []

    def plan_instead(inputs: Any, host: Any) -> tuple[Any, ...]:
        estimate, suggestion = plan_run.plan(inputs, host, arguments.vram, arguments.ram)
        plans.append({**estimate.as_json(), "advice": suggestion})
        if not arguments.json:
            print_text(plan_run.text_of(estimate, suggestion))
        return (None,) * len(lora_trainer.SPEC.outputs)

    _check_device(arguments)
    _run_trainers(graph, arguments, plan_instead)
    if arguments.json:
        print(json.dumps(plans[0] if len(plans) == 1 else plans, indent=2))
    return 0


def list_captions(arguments: argparse.Namespace) -> int:
    """List the caption of every sample at every epoch, as the run trains them; loads no model."""
    from .trainer_core.train.caption_list import trained_captions

    graph = _read_graph(arguments)

    def list_instead(inputs: Any, host: Any) -> tuple[Any, ...]:
        if not arguments.json:
            print("epoch\tstep\tfolder\timage\tmirrored\tcaption")
        for item in trained_captions(lora_trainer.request_of(inputs), host, arguments.epochs):
            values = [item.epoch, item.step, item.folder, item.image, int(item.is_mirrored), item.caption]
            print(json.dumps(vars(item)) if arguments.json else "\t".join(printable(str(value)) for value in values))
        return (None,) * len(lora_trainer.SPEC.outputs)

    try:
        _run_trainers(graph, arguments, list_instead, (Console(),))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run_trainers(graph: Graph, arguments: argparse.Namespace, call: Any, sinks: tuple = ()) -> None:
    """Run the graph's trainers and what they need, with `call` in place of the training."""
    graph = up_to(graph, TRAINERS)
    if not graph.nodes:
        raise UserError.at("workflow", "has no LoRATrainer node, so there is nothing to plan or list; add one")
    catalogue = {**CATALOGUE, lora_trainer.SPEC.id: replace(lora_trainer.SPEC, run=call)}
    catalogue[quick_lora.SPEC.id] = replace(quick_lora.SPEC, run=partial(quick_lora.run_with, catalogue))
    execute(graph, catalogue, _host(arguments, sinks))


def doctor(arguments: argparse.Namespace) -> int:
    """Report what is wrong with a LoRA file, a folder of images, or the datasets of a workflow."""
    from .trainer_core.dataset_doctor.subjects import is_source, subject_of_source, subjects_of_workflow

    refuse, is_workflow = doctor_command.refuse_options, Path(arguments.file).suffix.lower() == ".json"
    if not is_source(arguments.file) and not is_workflow:
        refuse(arguments, {**doctor_command.DATASET_OPTIONS, **doctor_command.FOLDER_OPTIONS}, "a LoRA file")
        return lora_report.doctor(arguments)
    refuse(arguments, doctor_command.LORA_OPTIONS, "a dataset")
    host = _host(argparse.Namespace(**{**vars(arguments), "output": None}), (Console(),), Interrupts())
    if is_source(arguments.file):
        names = doctor_command.FOLDER_OPTIONS
        fields = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        with subject_of_source(arguments.file, fields, CATALOGUE, host) as (subject, own):
            return doctor_command.examine_subjects(arguments, [subject], own)
    refuse(arguments, doctor_command.FOLDER_OPTIONS, "a workflow")
    graph = _read_graph(argparse.Namespace(**{**vars(arguments), "workflow": arguments.file, "set": []}))
    return doctor_command.examine_subjects(arguments, subjects_of_workflow(graph, CATALOGUE, host), host)


def status(arguments: argparse.Namespace) -> int:
    """Print the status of a run, or of all runs in the output folder."""
    output = Path(arguments.output or "output")
    folders = [find_run(arguments.run, output)] if arguments.run else runs_in(output)
    queued = [] if arguments.run else _queue_lines(output)
    if not folders and not queued:
        print(f"no runs in {output / 'chroma_trainer'}")
    for folder in folders:
        current = read_status(folder)
        print_text(f"{folder.name}: {printable(current.text()) if current else UNREADABLE}")
        for outcome in outcomes_of(folder):
            print_text(f"  vote: {printable(outcome.text())}")
    for line in queued:
        print_text(line)
    return 0


def _queue_lines(output: Path) -> list[str]:
    """Return a line for each run in the background that has no folder yet."""
    texts = {WAITING: "waiting in the background, number {place}", TRAINING: "starting in the background"}
    texts[FAILED] = "failed in the background: {message}"
    entries = [entry for entry in describe_queue(RunQueue(output)) if not entry["run"]]
    return [printable(f"{entry['name']}: {texts[entry['state']].format(**entry)}") for entry in entries]


def pause(arguments: argparse.Namespace) -> int:
    """Pause a run: it saves a checkpoint, frees its memory and waits until it is resumed."""
    return _send_command(arguments, "pause")


def stop(arguments: argparse.Namespace) -> int:
    """Stop a run after the current step, with a checkpoint and a usable LoRA."""
    return _send_command(arguments, "stop")


def resume(arguments: argparse.Namespace) -> int:
    """Resume a paused run. If its process has ended, start it again from its own request.json."""
    folder = find_run(arguments.run, Path(arguments.output or "output"))
    current = read_status(folder)
    if current and current.pid and current.state in ("paused", "running"):
        return _send_command(arguments, "resume")
    arguments.workflow, arguments.output = str(folder / layout.REQUEST), str(folder.parent.parent)
    return run(arguments)


def _send_command(arguments: argparse.Namespace, command: str) -> int:
    folder = find_run(arguments.run, Path(arguments.output or "output"))
    before = request(folder, command)
    print_text(f"{folder.name}: {printable(before.text())}; sent the command {command}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Train a LoRA again from the record in its file, and report whether the bytes are equal: exit status 0, else 1."""
    from tempfile import TemporaryDirectory

    from .trainer_core.lora_tools.verify import verify

    _check_device(arguments)
    with TemporaryDirectory(prefix="chroma-trainer-verify-", ignore_cleanup_errors=True) as folder:
        arguments.output = arguments.output or folder
        host = _host(arguments, (Console(),), Interrupts())
        if any(Path(arguments.output).glob("*")):
            raise UserError.at(
                "--output", f"{arguments.output!r} is not empty, so a run there would be resumed; use another folder"
            )
        result = verify(Path(arguments.file), trainer_node(), host, arguments.anyway)
    if arguments.json:
        differences = list(result.differences)
        print(json.dumps({"equal": result.is_equal, "sha256": result.sha256, "differences": differences}, indent=2))
    else:
        print_text(f"{arguments.file}: {result.text()}")
    return 0 if result.is_equal else EXIT_DIFFERENT


def demo(arguments: argparse.Namespace) -> int:
    """Train the shipped workflow on the embedded model, score the LoRA, and print the paths of all results."""
    arguments.workflow, arguments.models, arguments.datasets, arguments.model_config = str(DEMO), [], [], None
    arguments.output = arguments.output or str(DEMO_OUTPUT)
    arguments.report = arguments.report or str(Path(arguments.output) / layout.REPORT)
    run(arguments)
    report = json.loads(Path(arguments.report).read_text("utf-8"))
    report["learning_score"] = score = _score(arguments, report)
    report["total_seconds"] = round(time.perf_counter() - STARTED, 3)
    write_json(Path(arguments.report), report)
    losses = report["eval_loss"]
    print(f"\nLoRA            {report['lora']}")
    print(f"loss chart      {report['files']['loss_chart']}")
    for path in report["files"]["validation"]:
        print(f"before / after  {path}")
    print(f"report          {arguments.report}")
    if losses["after"] is not None:
        print(f"eval loss       {losses['before']:.4f} -> {losses['after']:.4f} in {report['steps']} steps")
    print(
        f"learning score  base {score['base']:.0%}, LoRA {score['lora']:.0%}, LoRA without its trigger "
        f"{score['without_trigger']:.0%} of {score['pictures']} images in the style"
    )
    print(f"seconds         {report['total_seconds']:.0f} in all")
    return 0


def _score(arguments: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    from .nodes.load_chroma import REPOS
    from .trainer_core.config.model import ModelConfig
    from .trainer_core.config.request import TrainedLora
    from .trainer_core.config.validation import ValidationConfig
    from .trainer_core.validation.style_score import learning_score

    model = ModelConfig(family="chroma", flavour="nano", repo=REPOS["nano"], dtype="fp32")
    lora = TrainedLora(report["lora"], Path(report["lora"]).name, report["sha256"], model)
    settings = ValidationConfig(steps=20, cfg=3.0, resolutions="64x64", seed=0)
    return learning_score(model, lora, ASSETS / "neon-emoji", settings, _host(arguments, (Console(),)))


def work(arguments: argparse.Namespace) -> int:
    """Train in a process that trainer_core/launch started, alone or as one of several."""
    folder, is_first = Path(arguments.folder), os.environ.get("LOCAL_RANK", "0") == "0"
    with RunLock(folder) if is_first else nullcontext():  # by which others see that the run goes on
        _train_job(folder, is_first)
    return 0


def _train_job(folder: Path, is_first: bool) -> None:
    from .trainer_core.devices import measure_memory
    from .trainer_core.distributed.device_list import device_of_rank
    from .trainer_core.distributed.process_group import leave
    from .trainer_core.launch.job import FINISHED, STOP, Job, Result
    from .trainer_core.launch.process import EventFile, on_end_of_input, reporting
    from .trainer_core.train.run import run as train

    interrupts = Interrupts()
    job = Job.read(folder)
    if not job.is_detached:
        on_end_of_input(interrupts.stop)
    device = device_of_rank()
    sinks = (EventFile(folder, lambda: measure_memory(device)),) if is_first else ()

    def is_over() -> bool:
        return interrupts() or os.path.exists(folder / STOP)

    host = SinkHost(job.paths, sinks, is_over, str(device), waits_when_paused=False)
    with reporting(folder, is_first):
        try:
            result = train(job.request, host, job.prompt)
        except Cancelled:
            leave()
            raise
        if is_first:
            lora = result.lora
            Result(FINISHED, (lora.path, lora.name, lora.sha256, lora.folder), result.losses, result.report).write(
                folder
            )
    leave()


def _read_graph(arguments: argparse.Namespace) -> Graph:
    graph = read_workflow(Path(arguments.workflow), schemas())
    graph = override(graph, arguments.set, CATALOGUE)
    devices = getattr(arguments, "devices", None)
    if devices is None:
        return graph
    trainers = [node.id for node in graph.nodes.values() if node.type == lora_trainer.SPEC.id]
    return override(graph, [f"{id}.devices={devices}" for id in trainers], CATALOGUE)


def _device_of_rank() -> str:
    """Return the device of this process where a launcher started several; "" where it runs by itself."""
    from .trainer_core.distributed.device_list import device_of_rank, num_launched

    return str(device_of_rank()) if num_launched() else ""


def _machines(arguments: argparse.Namespace) -> Machines:
    """Return the machines that train together: --nodes, --node and --meet."""
    count, number, meeting = (getattr(arguments, name, None) for name in ("nodes", "node", "meet"))
    if count is None and number is None and not meeting:
        return Machines()
    host, colon, port = (meeting or "").rpartition(":")
    problems = []
    if not count or count < 2:
        problems.append(Problem("--nodes", f"is {count}; give the number of machines, at least 2"))
    if number is None or not 0 <= number < (count or number + 1):
        problems.append(Problem("--node", f"is {number}; give the number of this machine, 0 to {(count or 1) - 1}"))
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        text = (
            f"is {meeting!r}; give the name or address of machine 0 and a free port of it, such as 192.168.1.10:29500"
        )
        problems.append(Problem("--meet", text))
    if problems:
        raise UserError(problems)
    assert count and number is not None and meeting
    return Machines(count, number, meeting)


def _host(arguments: argparse.Namespace, sinks: tuple = (), interrupts: Any = lambda: False) -> SinkHost:
    config = Path(arguments.model_config) if arguments.model_config else None
    paths = local_paths(
        [Path(p) for p in arguments.models],
        Path(arguments.output or "output"),
        [Path(p) for p in arguments.datasets],
        config,
        getattr(arguments, "allow_url", ()),
    )
    machines, device = _machines(arguments), getattr(arguments, "device", "") or _device_of_rank()
    return SinkHost(paths=paths, sinks=sinks, is_cancelled=interrupts, device=device, machines=machines)


def _tool_host(arguments: argparse.Namespace) -> SinkHost:
    """Return the host of a tool that reports progress and can be canceled."""
    defaults = {"models": [], "datasets": [], "model_config": None, "output": None}
    return _host(argparse.Namespace(**{**defaults, **vars(arguments)}), (Console(),), Interrupts())


def _new_host(arguments: argparse.Namespace) -> SinkHost:
    return _host(argparse.Namespace(**{**vars(arguments), "output": None}), (Console(),))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chroma-trainer", description="Train Chroma and Flux LoRAs from ComfyUI workflows."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=call.__doc__, description=call.__doc__)
        added.set_defaults(call=call)
        return added

    for name, call in (("run", run), ("check", check_workflow)):
        sub = command(name, call)
        sub.add_argument(
            "workflow",
            help="exported workflow (.json, either format), a run's request.json, or a PNG or LoRA with a workflow",
        )
        _add_workflow_arguments(sub)
    for name, call in (("status", status), ("pause", pause), ("stop", stop), ("resume", resume)):
        sub = command(name, call)
        sub.add_argument(
            "run", nargs="?" if call is status else None, help="path or name of a run's folder, or name of its LoRA"
        )
        if call is resume:
            _add_workflow_arguments(sub)
        else:
            sub.add_argument("--output", metavar="DIR", help="output folder (default: output)")
    sub = command("plan", plan)
    sub.add_argument("workflow", help="as for run")
    _add_workflow_arguments(sub)
    sub.add_argument(
        "--vram",
        type=_gigabytes,
        default=0.0,
        metavar="GB",
        help="plan for an accelerator with this memory, as it is sold: 12 for a 12 GB card",
    )
    sub.add_argument("--ram", type=_gigabytes, default=0.0, metavar="GB", help="plan for this much RAM")
    sub.add_argument("--json", action="store_true", help="as JSON")
    _add_device_argument(sub)
    sub = command("captions", list_captions)
    sub.add_argument("workflow", help="as for run")
    _add_workflow_arguments(sub)
    sub.add_argument("--epochs", type=_count, default=0, metavar="N", help="only the first N epochs (default: all)")
    sub.add_argument("--json", action="store_true", help="each sample as a line of JSON")
    for name in ("run", "resume"):
        runner = commands.choices[name]
        runner.add_argument("--report", metavar="FILE", help="write a JSON report")
        _add_device_argument(runner)
    _add_several_devices(commands.choices)
    worker = commands.add_parser("worker")  # without help: trainer_core/launch calls it
    worker.set_defaults(call=work)
    worker.add_argument("folder")
    _add_lora_commands(commands, command)
    add_import(command("import", import_config), CATALOGUE)
    _add_new_arguments(command("new", new))
    sub = command("demo", demo)
    sub.add_argument(
        "--set", action="append", default=[], metavar="NODE.FIELD=VALUE", help="override a value of the demo's workflow"
    )
    sub.add_argument("--output", metavar="DIR", help=f"output folder (default: {DEMO_OUTPUT})")
    sub.add_argument("--report", metavar="FILE", help="JSON report (default: OUTPUT/report.json)")
    sub.add_argument("--device", default="", help=argparse.SUPPRESS)
    return parser


def _add_comparing_commands(command: Callable[[str, Any], argparse.ArgumentParser]) -> None:
    """Add the commands that compare runs or LoRAs, and sample with them."""
    parsers = {
        call: command(name, call)
        for name, call in (("sweep", sweep), ("compare", compare_loras), ("draw", draw_prompts))
    }
    parsers[sweep].add_argument("workflow", help="as for run")
    for parser in parsers.values():
        _add_workflow_arguments(parser)
        _add_device_argument(parser)
        parser.set_defaults(read_graph=_read_graph, make_host=_tool_host, trainer=trainer_node)
    add_sweep(parsers[sweep])
    add_compare(parsers[compare_loras])
    add_draw(parsers[draw_prompts])


def _add_lora_commands(commands: Any, command: Callable[[str, Any], argparse.ArgumentParser]) -> None:
    """Add the commands for finished LoRAs."""
    lora_report.add_inspect(command("inspect", lora_report.inspect))
    parser = command("doctor", doctor)
    lora_report.add_doctor(parser, _tool_host)
    doctor_command.add_dataset_options(parser)
    _add_folder_arguments(parser)
    description = "Merge, resize, scale or extract LoRA files."
    add_lora(commands.add_parser("lora", help=description, description=description), _tool_host)
    _add_verify_arguments(command("verify", verify))
    add_publish(command("publish", publish_lora))
    _add_comparing_commands(command)


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="LoRA file that ChromaTrainer saved")
    _add_folder_arguments(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="keep the new run in this empty folder (default: a temporary one)"
    )
    parser.add_argument("--anyway", action="store_true", help="train even where packages or the dataset differ")
    _add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_new_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folder_arguments(parser)
    add_new(parser, _new_host, CATALOGUE, (check_workflow, plan))


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of epochs; write for example 2")
    return int(text)


def _add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="", help="such as cuda:1 or cpu (default: the best available device)")


def _add_several_devices(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add the options for several devices and machines."""
    for name in ("run", "resume", "check", "plan"):
        text = "train on several devices: auto, 2, 0,1 or cpu:2 (default: LoRATrainer's field devices)"
        commands[name].add_argument("--devices", metavar="LIST", help=text)
    for name in ("run", "resume"):
        parser = commands[name]
        parser.add_argument("--nodes", type=int, metavar="N", help="train on N machines; start this on each of them")
        parser.add_argument(
            "--node", type=int, metavar="I", help="number of this machine, from 0, which saves the LoRA"
        )
        text = "where the machines meet: address of machine 0 and a free port"
        parser.add_argument("--meet", metavar="HOST:PORT", help=text)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB; write for example 12")
    return value


def _add_workflow_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.FIELD=VALUE",
        help="override a value; NODE is a node's title, id or type",
    )
    _add_folder_arguments(parser)
    parser.add_argument("--output", metavar="DIR", help="output folder (default: output)")


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="DIR",
        help="a ComfyUI models folder; may be repeated",
    )
    parser.add_argument("--model-config", metavar="FILE", help="an extra_model_paths.yaml")
    parser.add_argument(
        "--datasets",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder that contains datasets; may be repeated",
    )
    parser.add_argument(
        "--allow-url",
        action="append",
        default=[],
        metavar="URL",
        help="an address that datasets may be read from, such as s3://bucket or hf://user/name; may be repeated",
    )


if __name__ == "__main__":
    sys.exit(main())
