"""chroma-trainer: the headless face. Runs and checks the workflows that ComfyUI's editor exports."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .nodes import CATALOGUE
from .nodes.schemas import schemas
from .trainer_core.console import Console
from .trainer_core.files import write_json
from .trainer_core.folders import local_paths
from .trainer_core.host import ASSETS, PACKAGE, Event, RunReported, SinkHost
from .trainer_core.problems import Cancelled, UserError
from .trainer_core.workflow.check import check
from .trainer_core.workflow.execute import execute
from .trainer_core.workflow.graph import Graph
from .trainer_core.workflow.overrides import override
from .trainer_core.workflow.read import read_workflow

BEGAN = time.perf_counter()
DEMO = PACKAGE / "workflows" / "first-lora.json"
DEMO_OUTPUT = Path("demo-output")
EXIT_USER, EXIT_CANCELLED = 2, 130


class Interrupts:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once."""

    def __init__(self) -> None:
        self.seen = False
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        print("\nending after this step; once more to end at once", file=sys.stderr)

    def __call__(self) -> bool:
        return self.seen


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
    reports: list[dict[str, Any]] = []

    def keep(event: Event) -> None:
        if isinstance(event, RunReported):
            reports.append(event.report)

    execute(graph, CATALOGUE, _host(arguments, (Console(), keep), Interrupts()))
    if arguments.report:
        write_json(Path(arguments.report), _joined(reports))
    return 0


def _joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's report, or with several trainers in the graph the last one's with all of them under "runs"."""
    total = round(time.perf_counter() - BEGAN, 3)
    last = dict(reports[-1]) if reports else {}
    return {**last, "total_seconds": total, **({"runs": reports} if len(reports) > 1 else {})}


def check_workflow(arguments: argparse.Namespace) -> int:
    """Name every problem of the workflow; runs nothing."""
    problems = check(_graph(arguments), CATALOGUE, _host(arguments))
    if problems:
        raise UserError(problems)
    print(f"{arguments.workflow}: no problems")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print how a LoRA came to be."""
    from .trainer_core.workflow.inspection import describe

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
    arguments.report = arguments.report or str(Path(arguments.output) / "report.json")
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
        f"{score['without_trigger']:.0%} of {score['prompts']} pictures in the style"
    )
    print(f"seconds         {report['total_seconds']:.0f} in all")
    return 0


def _score(arguments: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    from .nodes.load_chroma import REPOS
    from .trainer_core.config.model import ModelConfig
    from .trainer_core.config.request import TrainedLora
    from .trainer_core.config.validation import ValidationConfig
    from .trainer_core.validation.learning import learning_score

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
            "workflow", help="exported workflow (.json, either format), or a PNG or LoRA file that carries one"
        )
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NODE.FIELD=VALUE",
            help="replace a value; NODE is a node's title, id or type",
        )
        sub.add_argument(
            "--models",
            action="append",
            default=[],
            metavar="DIR",
            help="a ComfyUI models folder; may be given several times",
        )
        sub.add_argument("--model-config", metavar="FILE", help="an extra_model_paths.yaml")
        sub.add_argument(
            "--datasets", action="append", default=[], metavar="DIR", help="a folder that datasets may lie under"
        )
        sub.add_argument("--output", metavar="DIR", help="where results go (default: output)")
    runner = commands.choices["run"]
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


if __name__ == "__main__":
    sys.exit(main())
