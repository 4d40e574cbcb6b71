"""Terminal output of events: one line per phase, and a progress line that is updated in place.

If the output is not a terminal, progress is printed as plain lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

from .errors import encodable, printable, reason_of
from .host import CheckpointSaved, Event, LoraSaved, Notice, PhaseProgress, PhaseStarted, PreviewReady, StepReport
from .smoothed import Smoothed

PHASES = {
    "start": "checking the request and scanning the dataset",
    "identify": "reading the model files once to identify them",
    "score": "scoring images with CLIP",
    "text": "encoding captions",
    "latents": "encoding images",
    "load": "loading the model",
    "eval": "measuring the loss on fixed noise",
    "leak": "measuring the leak without the trigger",
    "train": "training",
    "validate": "sampling validation images",
    "save": "saving",
}
PLAIN_LINES = 20  # progress lines per loop if the output is not a terminal


class Console:
    """A sink for SinkHost that prints events to a stream (default: stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115  2>&-
        self.alive = self.stream.isatty()
        self.smoothed: Smoothed | None = None
        self.start_time, self.first_step, self.open_line = 0.0, 0, False
        self.phase = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            if event.phase != self.phase or event.total:
                self._print_line(
                    f"- {PHASES.get(event.phase, event.phase)}"
                    + (f": {event.total} {_unit(event)}" if event.total else "")
                )
            self.phase = event.phase
        elif isinstance(event, PhaseProgress):
            self._show_progress(f"  {event.done}/{event.total}", event.done, event.total)
        elif isinstance(event, StepReport):
            self._print_step(event)
        elif isinstance(event, Notice):
            self._print_line(
                ("! " if event.level == "warning" else "  ") + event.text_for(self.stream).replace("\n", "\n  ")
            )
        elif isinstance(event, PreviewReady):
            self._print_line(f"  images: {event.path}")
        elif isinstance(event, CheckpointSaved):
            self._print_line(f"  checkpoint: step {event.step}")
        elif isinstance(event, LoraSaved):
            self._print_line(f"  {event.what}: {event.path} ({event.applied} of {event.num_keys} keys match)")

    def _print_step(self, event: StepReport) -> None:
        if self.smoothed is None or event.step <= self.first_step:  # another trainer in the same graph
            self.smoothed = Smoothed(event.total)
            self.start_time, self.first_step = time.monotonic() - event.seconds, event.step - 1
        loss = self.smoothed(event.step, event.loss)
        rate = (time.monotonic() - self.start_time) / max(1, event.step - self.first_step)
        remaining = _format_duration(rate * (event.total - event.step))
        text = (
            f"  {event.step}/{event.total}  loss {loss:.4f}  lr {event.learning_rate:.2e}  {rate:.3g} s/step  "
            f"{remaining} left"
        )
        self._show_progress(text, event.step, event.total)

    def _show_progress(self, text: str, done: int, total: int) -> None:
        if self.alive:
            self.stream.write(f"\r\x1b[2K{text}")
            self.open_line = True
        elif done == total or done % max(1, total // PLAIN_LINES) == 0:
            self.stream.write(text + "\n")
        self.stream.flush()

    def _print_line(self, text: str) -> None:
        if self.open_line:
            self.stream.write("\n")
            self.open_line = False
        self.stream.write(encodable(printable(text, lines=True), self.stream) + "\n")
        self.stream.flush()


class LineLog:
    """Prints lines to stderr, which another program may have replaced, closed or given an encoding without Unicode.

    Attributes:
        faults: Why a line could not be printed. After the first fault nothing more is printed.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.faults: list[str] = []

    def __call__(self, text: str) -> None:
        if self.faults:
            return
        try:
            print_text(self.prefix + text, sys.stderr, flush=True)
        except (OSError, ValueError) as error:  # ValueError: I/O operation on closed file
            self.faults.append(f"log: {reason_of(error)}")


def print_text(text: str, stream: TextIO | None = None, flush: bool = False) -> None:
    """Print a text that may come from a file: its control characters, and what the stream can't encode, are escaped.

    Args:
        text: one line or several.
        stream: default: stdout.
        flush: as for print.
    """
    stream = stream or sys.stdout
    print(encodable(printable(text, lines=True), stream), file=stream, flush=flush)


def print_json(value: Any) -> None:
    """Print a value as JSON, in which characters of a file that command a terminal are escaped too."""
    print_text(json.dumps(value, indent=2, ensure_ascii=False))


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _unit(event: PhaseStarted) -> str:
    return event.unit.removesuffix("s") if event.total == 1 else event.unit
