"""The command `chroma-trainer demo`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..command_line.command_host import make_host
from ..command_line.outcome import STARTED
from ..console import Console
from ..host import ASSETS, PACKAGE
from ..runs import layout
from ..storage.atomic import write_json
from .run_command import run

DEMO = PACKAGE / "workflows" / "first-lora.json"
DEMO_OUTPUT = Path("demo-output")
NANO = ASSETS / "chroma-nano"


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.FIELD=VALUE", help="override a value of the demo's workflow"
    )
    parser.add_argument("--output", metavar="DIR", help=f"output folder (default: {DEMO_OUTPUT})")
    parser.add_argument("--report", metavar="FILE", help="JSON report (default: OUTPUT/report.json)")
    parser.add_argument("--device", default="", help=argparse.SUPPRESS)


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
    from ..config.model import ModelConfig
    from ..config.request import TrainedLora
    from ..config.validation import ValidationConfig
    from ..validation.style_score import learning_score

    model = ModelConfig(family="chroma", flavour="nano", repo=str(NANO), dtype="fp32")
    lora = TrainedLora(report["lora"], Path(report["lora"]).name, report["sha256"], model)
    settings = ValidationConfig(steps=20, cfg=3.0, resolutions="64x64", seed=0)
    return learning_score(model, lora, ASSETS / "neon-emoji", settings, make_host(arguments, (Console(),)))
