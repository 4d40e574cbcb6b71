"""The commands `chroma-trainer status | pause | stop | resume`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import print_text
from ..errors import printable
from ..launch.run_queue import FAILED, TRAINING, WAITING, RunQueue, describe_queue
from ..run_images.votes import outcomes_of
from ..runs import layout
from ..runs.control import UNREADABLE, find_run, read_status, request, runs_in
from .run_command import add_run_options, run

RUN = "path or name of a run's folder, or name of its LoRA"


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command status."""
    parser.add_argument("run", nargs="?", help=RUN)
    _add_output(parser)


def add_control(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands pause and stop."""
    parser.add_argument("run", help=RUN)
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="output folder (default: output)")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command resume."""
    parser.add_argument("run", help=RUN)
    add_run_options(parser)


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
