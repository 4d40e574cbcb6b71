"""`chroma-trainer doctor` for a folder of images, or the datasets of a workflow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.dataset import CAPTIONS
from ..console import print_json, print_text
from ..errors import Problem, UserError
from ..host import Host
from ..paths import check_writable, refuse_existing
from ..runs.control import find_run
from .findings import LEAVES_OUT
from .subjects import Subject

EXIT_FINDINGS = 1
DATASET_OPTIONS = {
    "sheet": "--sheet", "run": "--run", "copy": "--copy", "leave_out": "--leave-out", "captions_list": "--captions-list",
}  # fmt: skip
FOLDER_OPTIONS = {"resolution": "--resolution", "trigger": "--trigger", "captions": "--captions"}
LORA_OPTIONS = {"second": "second", "fixed": "--output", "chart": "--chart"}


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a folder of images or a workflow."""
    parser.add_argument("--sheet", metavar="PNG", help="of a dataset: draw the images of each finding")
    parser.add_argument(
        "--resolution", type=_pixels, metavar="PX", help="of a folder: edge that it is trained at (default: 1024)"
    )
    parser.add_argument("--trigger", metavar="WORD", help="of a folder: trigger that its captions should have")
    parser.add_argument(
        "--captions",
        choices=[name for name in CAPTIONS if name != "instance prompt"],
        help="of a folder: where its captions come from (default: textfile)",
    )

    parser.add_argument("--run", metavar="RUN", help="of a dataset: look at the losses that this run has measured too")
    parser.add_argument("--copy", metavar="DIR", help="of a folder: write a copy without the images of some findings")
    parser.add_argument(
        "--leave-out",
        metavar="KIND,...",
        help=f"findings whose images the copy lacks (default: {','.join(LEAVES_OUT)})",
    )
    parser.add_argument("--captions-list", metavar="JSONL", help="of a folder: write all captions as a table to edit")


def _pixels(text: str) -> float:
    if not (text.isdecimal() and len(text) < 6 and 16 <= int(text) <= 8192):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of pixels from 16 to 8192")
    return float(text)


def refuse_options(arguments: argparse.Namespace, options: dict[str, str], what: str) -> None:
    """Raise UserError for every option that is given and not for this kind of file."""
    refused = [option for name, option in options.items() if getattr(arguments, name, None)]
    if refused:
        raise UserError(Problem(option, f"is not for {what}; leave it out") for option in refused)


def examine_subjects(arguments: argparse.Namespace, subjects: Sequence[Subject], host: Host) -> int:
    """Print the report of each dataset, and draw the sheet. Return the exit status: 1 if there are warnings.

    Raises:
        UserError: A sheet would be replaced without --force, or a dataset can't be examined.
    """
    from .examine_dataset import examine_dataset
    from .findings import dataset_text
    from .token_limits import token_limit

    run = find_run(arguments.run, Path("output")) if arguments.run else None
    sheets = _sheet_paths(arguments, len(subjects))
    _check_targets(arguments, len(subjects))
    results: list[dict[str, Any]] = []
    is_sound = True
    for subject, sheet in zip(subjects, sheets, strict=True):
        report, images = examine_dataset(subject.dataset, host, *token_limit(subject.model, host.paths), run)
        is_sound &= report.is_sound
        results.append(report.as_json() | ({"sheet": str(sheet)} if sheet else {}))
        if sheet:
            _save_sheet(report, images, sheet, host)
        results[-1] |= (files := _write_files(arguments, report, images, host))
        if not arguments.json:
            lines = (f"\n  {name.replace('_', ' '):<11} {value}" for name, value in files.items())
            print_text("".join([dataset_text(report), *lines]) + (f"\n  sheet       {sheet}" if sheet else ""))
    if arguments.json:
        print_json(results[0] if len(results) == 1 else results)
    return 0 if is_sound else EXIT_FINDINGS


def _check_targets(arguments: argparse.Namespace, count: int) -> None:
    """Raise UserError where the copy or the table of captions can't be written, before anything is examined."""
    problems = []
    if arguments.leave_out and not arguments.copy:
        problems.append(Problem("--leave-out", "says what a copy lacks; add --copy DIR"))
    for option, value in (("--copy", arguments.copy), ("--captions-list", arguments.captions_list)):
        if value and count > 1:
            problems.append(Problem(option, f"is for one dataset, and this workflow has {count}"))
    if problems:
        raise UserError(problems)
    if arguments.captions_list:
        refuse_existing("--captions-list", arguments.captions_list, arguments.force)
        check_writable("--captions-list", Path(arguments.captions_list).parent)


def _write_files(arguments: argparse.Namespace, report: Any, images: Any, host: Host) -> dict[str, Any]:
    """Write the copy and the table of captions, where they are asked for. Return what the report says of them."""
    from .clean_copy import to_leave_out, write_captions, write_copy

    files: dict[str, Any] = {}
    if arguments.copy:
        kinds = tuple(filter(None, map(str.strip, (arguments.leave_out or ",".join(LEAVES_OUT)).split(","))))
        count = write_copy(images, to_leave_out(report, kinds), Path(arguments.copy), host)
        files["copy"] = f"{arguments.copy}: {count} of {report.num_images} images"
    if arguments.captions_list:
        write_captions(report, images, Path(arguments.captions_list))
        files["captions_list"] = arguments.captions_list
    return files


def _sheet_paths(arguments: argparse.Namespace, count: int) -> list[Path | None]:
    """Return a path for each dataset: the one that was given, then NAME-2, NAME-3 and so on."""
    if not arguments.sheet:
        return [None] * count
    path = Path(arguments.sheet)
    if path.is_dir():
        raise UserError.at("--sheet", f"{arguments.sheet!r} is a folder; use the path of a PNG file")
    paths = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, count + 1))]
    for sheet in paths:
        refuse_existing("--sheet", str(sheet), arguments.force)
    check_writable("--sheet", path.parent)
    return list(paths)


def _save_sheet(report: Any, images: Any, path: Path, host: Host) -> None:
    from ..plots.png_file import save_png
    from .findings_sheet import draw_findings

    save_png(draw_findings(report, images, host), path)
