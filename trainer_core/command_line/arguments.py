"""Arguments that several commands have, and checks of all arguments."""

from __future__ import annotations

import argparse

from ..errors import Problem, UserError
from ..host import expand_home
from ..storage.bounded_files import path_fault

PATH_ARGUMENTS = {
    "workflow": "workflow", "file": "file", "run": "run", "output": "--output", "report": "--report",
    "first": "first", "second": "second", "base": "base", "tuned": "tuned", "target": "--output", "loras": "FILE", "fixed": "--output",
    "chart": "--chart", "files": "FILE", "models": "--models", "datasets": "--datasets", "model_config": "--model-config",
    "lora": "lora", "images": "--images", "dry_run": "--dry-run", "sheet": "--sheet",
}  # fmt: skip


def expand_homes(arguments: argparse.Namespace) -> argparse.Namespace:
    """Replace a leading ~ in paths: a shell leaves it where it follows a =, as in --output=~/out."""
    for name in PATH_ARGUMENTS.keys() & vars(arguments).keys():
        value = getattr(arguments, name)
        if value:
            setattr(arguments, name, expand_home(value) if isinstance(value, str) else [expand_home(p) for p in value])
    return arguments


def check_paths(arguments: argparse.Namespace) -> None:
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


def check_device(arguments: argparse.Namespace) -> None:
    """Check that there is the device that was asked for."""
    if arguments.device and getattr(arguments, "devices", None):
        raise UserError.at("--device", "is one device, and --devices are several; give one of the two options")
    if arguments.device:
        from ..devices import pick_device

        pick_device(arguments.device)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="", help="such as cuda:1 or cpu (default: the best available device)")


def add_workflow_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that takes a workflow."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.FIELD=VALUE",
        help="override a value; NODE is a node's title, id or type",
    )
    add_folder_arguments(parser)
    parser.add_argument("--output", metavar="DIR", help="output folder (default: output)")


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders in which models and datasets are found."""
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
