"""The command `chroma-trainer new`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..console import print_text
from ..errors import UserError, encodable, printable, quoted
from ..host import SinkHost, collect
from ..paths import refuse_existing
from ..spec import NodeSpec
from ..storage.atomic import write_json
from .card import detect_card
from .questions import InputEnded, Question, Terminal

EXIT_USER = 2
TARGET = "workflow.json"
MakeHost = Callable[[argparse.Namespace], SinkHost]
Command = Callable[[argparse.Namespace], int]
OPTIONS = {  # name of an answer -> its option's placeholder and help
    "family": ("NAME", "chroma, flux or nano: the best model of this family that is here, else the released one"),
    "model": ("NAME", "the name of a model file, or a flavor: hd, base, flash, krea, dev, schnell, nano and others"),
    "images": ("DIR", "the folder of images"),
    "captions": ("KIND", "for images without a caption: textfile (leave them out), filename, or trigger"),
    "learn": ("WHAT", "style, subject or character"),
    "trigger": ("WORD", 'the trigger word; "none" for none'),
    "vram": ("GB", "memory of the graphics card that will train, as it is sold; 0: none"),
    "quality": ("NAME", "quick, good or best"),
    "name": ("NAME", "the name of the LoRA"),
}


def add_new(
    parser: argparse.ArgumentParser,
    make_host: MakeHost,
    catalogue: Mapping[str, NodeSpec],
    reviews: Sequence[Command],
) -> None:
    """Add the arguments of the command.

    Args:
        parser: the parser of the command.
        make_host: makes the host of its folders.
        catalogue: the nodes by type.
        reviews: the commands check and plan, which are run on the new workflow.
    """
    parser.add_argument(
        "-o",
        "--output",
        dest="target",
        metavar="FILE",
        help=f"the workflow (default: {TARGET}, or a name that is free)",
    )
    for name, (placeholder, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=placeholder, help=text)
    parser.add_argument("--yes", action="store_true", help="take the default of every question that no option answers")
    parser.add_argument("--force", action="store_true", help="replace the workflow if it exists")
    parser.set_defaults(make_host=make_host, catalogue=catalogue, reviews=reviews)


def new(arguments: argparse.Namespace) -> int:
    """Ask what to train, in nine questions at most, and write a workflow with check and plan; --yes takes all defaults."""
    from .first_workflow import workflow_of
    from .interview import Interview
    from .model_offers import comfyui_models

    if not arguments.models and not arguments.model_config:
        arguments.models = [str(folder) for folder in comfyui_models()]
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    terminal = Terminal(takes_defaults=arguments.yes)
    host = arguments.make_host(arguments)
    interview = Interview(host, terminal, options, detect_card)
    try:
        _check_target(arguments, interview.check_options)
        answers = interview.run()
        target = _free_target(arguments, terminal)
    except InputEnded as end:
        _print_error(end)
        raise
    write_json(target, workflow_of(answers, arguments.catalogue))
    terminal.say(f"\n{target}: written; it opens in ComfyUI, with a note on what was chosen and why")
    folders = _folder_options(arguments, answers.images.outside)
    return _review(arguments, target, folders, 0.0 if interview.has_card else answers.vram)


def _check_target(arguments: argparse.Namespace, check_options: Callable[[], object]) -> None:
    """Raise the problems of the file to write and of all options together."""
    problems = []
    collect(problems, _check_file, arguments)
    collect(problems, check_options)
    if problems:
        raise UserError(problems)


def _check_file(arguments: argparse.Namespace) -> None:
    _read_target(str(Path(arguments.target or TARGET)))
    if arguments.target and arguments.yes:
        refuse_existing("--output", arguments.target, arguments.force)


def _read_target(text: str) -> Path:
    """Return the path of a workflow.

    Raises:
        UserError: it can't be one.
    """
    path = Path(text)
    if path.suffix.lower() != ".json":
        raise UserError.at("--output", f"{text[:60]!r} does not end in .json; write for example {path.stem[:40]}.json")
    if path.is_dir():
        raise UserError.at("--output", f"{text[:60]!r} is a folder; use the path of a file")
    parent = next(folder for folder in (*path.absolute().parents,) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError.at("--output", f"can't write to {quoted(parent)}; use another folder")
    return path


def _free_target(arguments: argparse.Namespace, terminal: Terminal) -> Path:
    """Return the file to write. An existing one is only replaced if the user says so."""
    target = Path(arguments.target or TARGET)
    if arguments.force or not target.exists():
        return target
    numbered = (target.with_stem(f"{target.stem}-{number}") for number in range(2, 10_000))
    free = next(path for path in numbered if not path.exists())

    def read(text: str) -> Path:
        path = target if text.lower() in ("yes", "y") else _read_target(text)
        if path != target and path.exists():
            raise UserError.at(
                "--output", f"{text[:60]!r} exists already; write another name, or yes to replace {target}"
            )
        return path

    return terminal.ask(Question("--output", f"{target} exists. Another name, or yes to replace it:", str(free), read))


def _folder_options(arguments: argparse.Namespace, outside: Path | None) -> dict[str, list[str]]:
    """Return the options with which the workflow's files are found: --models, --model-config, --datasets."""
    return {
        "models": list(arguments.models),
        "model_config": [arguments.model_config] if arguments.model_config else [],
        "datasets": [*arguments.datasets, *([str(outside)] if outside else [])],
    }


def _review(arguments: argparse.Namespace, target: Path, folders: Mapping[str, list[str]], vram: float) -> int:
    """Run check and plan on the workflow, and print the next command.

    Returns:
        The exit status: 2 if the workflow has problems, which are printed.
    """
    own = {
        "trainer": arguments.trainer,
        "workflow": str(target), "set": [], "output": None, "device": "", "vram": vram, "ram": 0.0, "json": False,
        "models": folders["models"], "datasets": folders["datasets"], "model_config": arguments.model_config,
    }  # fmt: skip
    words = [
        word for name, values in folders.items() for value in values for word in (f"--{name.replace('_', '-')}", value)
    ]
    for review in arguments.reviews:
        try:
            print(flush=True)
            review(argparse.Namespace(**own))
        except UserError as error:
            for problem in error.problems:
                _print_error(problem)
            print(f"\nnext, once this is fixed: {_command('check', str(target), *words)}")
            return EXIT_USER
    print(f"\nnext: {_command('run', str(target), *words)}")
    return 0


def _print_error(error: object) -> None:
    print_text(f"error: {printable(str(error))}", sys.stderr)


def _command(*words: str) -> str:
    file = Path(sys.argv[0])
    start = f"python {file}" if file.name == "cli.py" else "chroma-trainer"  # without pip there is no such command
    line = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    return encodable(printable(f"{start} {line}"), sys.stdout)
