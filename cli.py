"""chroma-trainer: the headless face. Runs and checks the workflows that ComfyUI's editor exports."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from .nodes import CATALOGUE, lora_trainer, plan_run
from .nodes.widget_schemas import schemas
from .trainer_core.console import Console
from .trainer_core.errors import Cancelled, Problem, UserError
from .trainer_core.host import ASSETS, PACKAGE, Event, RunReported, SinkHost
from .trainer_core.paths import local_paths
from .trainer_core.runs import layout
from .trainer_core.runs.control import find_run, read_status, request, runs_in
from .trainer_core.storage.atomic import fault_of, write_json
from .trainer_core.workflow.check import check, list_skipped
from .trainer_core.workflow.execute import execute
from .trainer_core.workflow.graph import Graph, Link
from .trainer_core.workflow.overrides import override
from .trainer_core.workflow.read import read_workflow

BEGAN = time.perf_counter()
DEMO = PACKAGE / "workflows" / "first-lora.json"
DEMO_OUTPUT = Path("demo-output")
EXIT_USER, EXIT_CANCELLED = 2, 130
CONSOLE_ENDS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT


class Interrupts:
    """Ctrl-C, SIGTERM and the closing of a Windows console end the run after the step at hand; a second one ends it at once."""

    def __init__(self) -> None:
        self.seen = False
        self._closing = _on_console_close(self._close)  # Windows calls it for as long as it lives
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        print("\nending after this step; once more to end at once", file=sys.stderr)

    def _close(self) -> None:
        """In a thread of Windows' own, which ends the process when this returns, and after 5 s in any case."""
        self.seen = True
        while threading.main_thread().is_alive():
            time.sleep(0.05)

    def __call__(self) -> bool:
        return self.seen


def _on_console_close(call: Callable[[], None]) -> Any:
    """Let Windows call this when its console is closed, or the user logs off. None elsewhere."""
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
    """Exit status: 0, 2 for the user's mistake, 130 for a cancel."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not know the characters we print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.call(arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    except (Cancelled, KeyboardInterrupt):
        print("cancelled", file=sys.stderr)
        return EXIT_CANCELLED


def run(arguments: argparse.Namespace) -> int:
    """Train what the workflow asks for."""
    graph = _graph(arguments)
    _check_places(arguments)
    reports: list[dict[str, Any]] = []

    def keep(event: Event) -> None:
        if isinstance(event, RunReported):
            reports.append(event.report)

    execute(graph, CATALOGUE, _host(arguments, (Console(), keep), Interrupts()))
    if arguments.report:
        write_json(Path(arguments.report), _join_reports(reports))
    return 0


def _check_places(arguments: argparse.Namespace) -> None:
    """Whether results can be written where they shall go: said before the training, not after it."""
    places = {"--output": Path(arguments.output or "output")}
    if arguments.report:
        places["--report"] = Path(arguments.report).parent
        if Path(arguments.report).is_dir():
            raise UserError.at("--report", f"{arguments.report!r} is a folder; name a file in it")
    faults = {option: fault_of(folder) for option, folder in places.items()}
    found = [
        Problem(option, f"nothing can be written into {str(places[option])!r} ({fault}); name another folder")
        for option, fault in faults.items()
        if fault
    ]
    if found:
        raise UserError(found)
    _check_device(arguments)


def _check_device(arguments: argparse.Namespace) -> None:
    if arguments.device:
        from .trainer_core.devices import pick_device

        pick_device(arguments.device)


def _join_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's report, or with several trainers in the graph the last one's with all of them under "runs"."""
    total = round(time.perf_counter() - BEGAN, 3)
    last = dict(reports[-1]) if reports else {}
    return {**last, "total_seconds": total, **({"runs": reports} if len(reports) > 1 else {})}


def check_workflow(arguments: argparse.Namespace) -> int:
    """Name every problem of the workflow; runs nothing."""
    graph = _graph(arguments)
    problems = check(graph, CATALOGUE, _host(arguments))
    if problems:
        raise UserError(problems)
    print(f"{arguments.workflow}: no problems")
    left_out = list_skipped(graph, CATALOGUE)
    if left_out:
        print(f"skipped, these nodes only run in ComfyUI: {', '.join(left_out)}")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Say what a run would take of memory, disk and time, and what fits where it would not; loads no weights."""
    graph = _graph(arguments)
    plans: list[dict[str, Any]] = []

    def planned(inputs: Any, host: Any) -> tuple[Any, ...]:
        found, advice = plan_run.plan(inputs, host, arguments.vram, arguments.ram)
        plans.append({**found.as_json(), "advice": advice})
        if not arguments.json:
            print(plan_run.text_of(found, advice))
        return (None,) * len(lora_trainer.SPEC.outputs)

    wanted = {id for id, node in graph.nodes.items() if node.type == lora_trainer.SPEC.id}
    if not wanted:
        raise UserError.at("workflow", "has no LoRATrainer node, so there is nothing to plan; add one")
    before: set[str] = set()
    while before != wanted:
        before = set(wanted)
        wanted |= {v.node for id in before for v in graph.nodes[id].inputs.values() if isinstance(v, Link)}
    graph = replace(graph, nodes={id: node for id, node in graph.nodes.items() if id in wanted})
    catalogue = {**CATALOGUE, lora_trainer.SPEC.id: replace(lora_trainer.SPEC, run=planned)}
    _check_device(arguments)
    execute(graph, catalogue, _host(arguments))
    if arguments.json:
        print(json.dumps(plans[0] if len(plans) == 1 else plans, indent=2))
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Say what runs are doing: one, or all under the output folder."""
    output = Path(arguments.output or "output")
    folders = [find_run(arguments.run, output)] if arguments.run else runs_in(output)
    if not folders:
        print(f"no runs in {output / 'chroma_trainer'}")
    for folder in folders:
        found = read_status(folder)
        print(f"{folder.name}: {found.text() if found else 'never started'}")
    return 0


def pause(arguments: argparse.Namespace) -> int:
    """Let a run save its state and wait, with memory free, until it is resumed."""
    return _command(arguments, "pause")


def stop(arguments: argparse.Namespace) -> int:
    """End a run after the step at hand, with a checkpoint and a usable LoRA."""
    return _command(arguments, "stop")


def resume(arguments: argparse.Namespace) -> int:
    """Let a paused run go on. One that no process works on is run again, from its own record."""
    folder = find_run(arguments.run, Path(arguments.output or "output"))
    found = read_status(folder)
    if found and found.pid and found.state in ("paused", "running"):
        return _command(arguments, "resume")
    arguments.workflow, arguments.output = str(folder / layout.REQUEST), str(folder.parent.parent)
    return run(arguments)


def _command(arguments: argparse.Namespace, command: str) -> int:
    folder = find_run(arguments.run, Path(arguments.output or "output"))
    before = request(folder, command)
    print(f"{folder.name}: {before.text()}; asked to {command}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print how a LoRA came to be."""
    from .trainer_core.workflow.lora_metadata import describe

    print(
        json.dumps(describe(Path(arguments.file)), indent=2, ensure_ascii=False)
        if arguments.json
        else describe(Path(arguments.file)).text()
    )
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Train the shipped workflow on the embedded model, score what it learnt, and say where everything lies."""
    arguments.workflow, arguments.models, arguments.datasets, arguments.model_config = str(DEMO), [], [], None
    arguments.output = arguments.output or str(DEMO_OUTPUT)
    arguments.report = arguments.report or str(Path(arguments.output) / layout.REPORT)
    run(arguments)
    report = json.loads(Path(arguments.report).read_text("utf-8"))
    report["learning_score"] = score = _score(arguments, report)
    report["total_seconds"] = round(time.perf_counter() - BEGAN, 3)
    write_json(Path(arguments.report), report)
    losses = report["eval_loss"]
    print(f"\nLoRA            {report['lora']}")
    print(f"loss chart      {report['files']['loss_chart']}")
    for path in report["files"]["validation"]:
        print(f"before / after  {path}")
    print(f"report          {arguments.report}")
    print(f"eval loss       {losses['before']:.4f} -> {losses['after']:.4f} in {report['steps']} steps")
    print(
        f"learning score  base {score['base']:.0%}, LoRA {score['lora']:.0%}, LoRA without its trigger "
        f"{score['without_trigger']:.0%} of {score['pictures']} pictures in the style"
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


def _graph(arguments: argparse.Namespace) -> Graph:
    graph = read_workflow(Path(arguments.workflow), schemas())
    return override(graph, arguments.set, CATALOGUE)


def _host(arguments: argparse.Namespace, sinks: tuple = (), interrupts: Any = lambda: False) -> SinkHost:
    config = Path(arguments.model_config) if arguments.model_config else None
    paths = local_paths(
        [Path(p) for p in arguments.models],
        Path(arguments.output or "output"),
        [Path(p) for p in arguments.datasets],
        config,
    )
    return SinkHost(paths=paths, sinks=sinks, is_cancelled=interrupts, device=getattr(arguments, "device", ""))


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
            help="exported workflow (.json, either format), a run's request.json, or a PNG or LoRA file that carries one",
        )
        _add_workflow_arguments(sub)
    for name, call in (("status", status), ("pause", pause), ("stop", stop), ("resume", resume)):
        sub = command(name, call)
        sub.add_argument(
            "run", nargs="?" if call is status else None, help="a run's folder or its name, or the LoRA's name"
        )
        if call is resume:
            _add_workflow_arguments(sub)
        else:
            sub.add_argument("--output", metavar="DIR", help="where results are (default: output)")
    sub = command("plan", plan)
    sub.add_argument("workflow", help="as for run")
    _add_workflow_arguments(sub)
    sub.add_argument("--vram", type=_gigabytes, default=0.0, metavar="GB", help="plan for an accelerator of so many GB")
    sub.add_argument("--ram", type=_gigabytes, default=0.0, metavar="GB", help="plan for so much RAM")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.add_argument("--device", default="", help="such as cuda:1 or cpu (default: the best there is)")
    for name in ("run", "resume"):
        runner = commands.choices[name]
        runner.add_argument("--report", metavar="FILE", help="write a JSON report")
        runner.add_argument("--device", default="", help="such as cuda:1 or cpu (default: the best there is)")
    sub = command("inspect", inspect)
    sub.add_argument("file", help="a LoRA (.safetensors)")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub = command("demo", demo)
    sub.add_argument(
        "--set", action="append", default=[], metavar="NODE.FIELD=VALUE", help="replace a value of the demo's workflow"
    )
    sub.add_argument("--output", metavar="DIR", help=f"where results go (default: {DEMO_OUTPUT})")
    sub.add_argument("--report", metavar="FILE", help="JSON report (default: OUTPUT/report.json)")
    sub.add_argument("--device", default="", help=argparse.SUPPRESS)
    return parser


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GB; write for example 12")
    return value


def _add_workflow_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.FIELD=VALUE",
        help="replace a value; NODE is a node's title, id or type",
    )
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="DIR",
        help="a ComfyUI models folder; may be given several times",
    )
    parser.add_argument("--model-config", metavar="FILE", help="an extra_model_paths.yaml")
    parser.add_argument(
        "--datasets", action="append", default=[], metavar="DIR", help="a folder that datasets may lie under"
    )
    parser.add_argument("--output", metavar="DIR", help="where results go (default: output)")


if __name__ == "__main__":
    sys.exit(main())
