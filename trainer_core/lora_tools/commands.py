"""The commands of chroma-trainer for finished LoRAs. Heavy modules are imported when a command runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..console import print_json, print_text
from ..errors import UserError, encodable, quoted
from ..host import SinkHost
from ..paths import check_writable, refuse_existing

EXIT_FINDINGS = 1
DTYPES = ("fp32", "bf16", "fp16")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command inspect."""
    parser.add_argument("file", help="LoRA file (.safetensors)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def inspect(arguments: argparse.Namespace) -> int:
    """Print the training settings that are stored in a LoRA file."""
    from ..workflow.lora_metadata import describe

    description = describe(Path(arguments.file))
    show(description if arguments.json else description.text(), arguments.json)
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the command doctor."""
    parser.add_argument(
        "file", help="LoRA file of any tool (.safetensors), folder or store of images, or workflow (.json)"
    )
    parser.add_argument("second", nargs="?", help="another LoRA file: report how far both do the same")
    parser.add_argument("-o", "--output", dest="fixed", metavar="FILE", help="write a repaired file")
    parser.add_argument("--chart", metavar="PNG", help="draw the size of the update in each block")
    parser.add_argument("--force", action="store_true", help="replace the files if they exist")
    parser.add_argument("--json", action="store_true", help="as JSON")


def doctor(arguments: argparse.Namespace) -> int:
    """Report what a LoRA file is, what is wrong with it and how much rank it wastes; write a repaired file."""
    from .progress import progress_of
    from .reader import open_lora
    from .report.compare import compare

    host = arguments.make_host(arguments)
    for option, name in (("--output", arguments.fixed), ("--chart", arguments.chart)):
        check_target(option, name, arguments.force)
    with open_lora(Path(arguments.file)) as lora:
        if arguments.second:
            _refuse_second(arguments)
            with open_lora(Path(arguments.second)) as second:
                comparison = compare(lora, second, progress_of(host, "comparing both files"))
            show(comparison.as_json() if arguments.json else comparison.text(), arguments.json)
            return 0
        return _examine(arguments, lora, host)


def _refuse_second(arguments: argparse.Namespace) -> None:
    if arguments.fixed or arguments.chart:
        raise UserError.at(
            "--output" if arguments.fixed else "--chart", "is for one LoRA file; leave the second one out"
        )


def _examine(arguments: argparse.Namespace, lora: Any, host: SinkHost) -> int:
    from .progress import progress_of
    from .report.examine import examine
    from .report.repair import repair
    from .report.report_text import report_text

    report = examine(lora, progress_of(host, "reading the layers"))
    result = report.as_json()
    if not arguments.json:
        print_text(report_text(report, ascii_only=encodable("█", sys.stdout) != "█"))
    if arguments.chart:
        _save_chart(report, Path(arguments.chart))
        result["chart"] = arguments.chart
    if arguments.fixed:
        written = repair(lora, report, Path(arguments.fixed))
        result["repaired"] = written.as_json(arguments.fixed)
        if not arguments.json:
            print_text(f"\n{arguments.fixed}: the repaired file; {written.text()}")
    elif report.needs_repair and report.base.is_ours and not arguments.json:
        print_text("\n  -o FIXED.safetensors writes a repaired file")
    if arguments.json:
        show(result, True)
    return 0 if report.is_sound or arguments.fixed else EXIT_FINDINGS


def _save_chart(report: Any, path: Path) -> None:
    from ..plots.png_file import save_png
    from .report.report_chart import draw_report

    save_png(draw_report(report), path)


def check_target(option: str, name: str | None, force: bool) -> None:
    """Raise UserError if a file would be replaced without --force, or can't be written."""
    if not name:
        return
    path = Path(name)
    if path.is_dir():
        raise UserError.at(option, f"{quoted(name)} is a folder; use the path of a file")
    refuse_existing(option, name, force)
    check_writable(option, path.parent)


def show(value: Any, as_json: bool) -> None:
    """Print a result."""
    print_json(value) if as_json else print_text(value)
