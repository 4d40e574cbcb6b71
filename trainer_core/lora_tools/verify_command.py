"""The command `chroma-trainer verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..command_line.arguments import add_device_argument, add_folder_arguments, check_device
from ..command_line.command_host import make_host
from ..command_line.interrupts import Interrupts
from ..command_line.outcome import EXIT_DIFFERENT
from ..console import Console, print_text
from ..errors import UserError


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", help="LoRA file that ChromaTrainer saved")
    add_folder_arguments(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="keep the new run in this empty folder (default: a temporary one)"
    )
    parser.add_argument("--anyway", action="store_true", help="train even where packages or the dataset differ")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def verify_lora(arguments: argparse.Namespace) -> int:
    """Train a LoRA again from the record in its file, and report whether the bytes are equal: exit status 0, else 1."""
    from tempfile import TemporaryDirectory

    from .verify import verify

    check_device(arguments)
    with TemporaryDirectory(prefix="chroma-trainer-verify-", ignore_cleanup_errors=True) as folder:
        arguments.output = arguments.output or folder
        host = make_host(arguments, (Console(),), Interrupts())
        if any(Path(arguments.output).glob("*")):
            raise UserError.at(
                "--output", f"{arguments.output!r} is not empty, so a run there would be resumed; use another folder"
            )
        result = verify(Path(arguments.file), arguments.trainer(), host, arguments.anyway)
    if arguments.json:
        differences = list(result.differences)
        print(json.dumps({"equal": result.is_equal, "sha256": result.sha256, "differences": differences}, indent=2))
    else:
        print_text(f"{arguments.file}: {result.text()}")
    return 0 if result.is_equal else EXIT_DIFFERENT
