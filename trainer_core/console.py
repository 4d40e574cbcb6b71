"""Events for a person at a terminal: one line a phase, one living line a loop. Plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from .host import CheckpointSaved, Event, LoraSaved, Notice, PhaseProgress, PhaseStarted, PreviewReady, StepReport

PHASES = {
    "start": "checking the request and scanning the dataset",
    "text": "encoding captions",
    "latents": "encoding images",
    "load": "loading the model",
    "train": "training",
    "validate": "drawing validation pictures",
    "save": "saving",
}
SMOOTHING = 0.05  # share of the newest step in the loss that is shown
PLAIN_LINES = 20  # lines a loop prints where there is no living line


class Console:
    """A sink that prints. Give an instance to SinkHost."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.alive = self.stream.isatty()
        self.loss, self.began, self.first_step, self.open_line = None, 0.0, 0, False
        self.phase = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            if event.phase != self.phase or event.total:
                self._line(
                    f"- {PHASES.get(event.phase, event.phase)}"
                    + (f": {event.total} {event.unit}" if event.total else "")
                )
            self.phase = event.phase
        elif isinstance(event, PhaseProgress):
            self._living(f"  {event.done}/{event.total}", event.done, event.total)
        elif isinstance(event, StepReport):
            self._step(event)
        elif isinstance(event, Notice):
            self._line(("! " if event.level == "warning" else "  ") + event.shown_on(self.stream).replace("\n", "\n  "))
        elif isinstance(event, PreviewReady):
            self._line(f"  pictures: {event.path}")
        elif isinstance(event, CheckpointSaved):
            self._line(f"  checkpoint of step {event.step}")
        elif isinstance(event, LoraSaved):
            self._line(f"  LoRA: {event.path} ({event.applied} of {event.num_keys} keys apply)")

    def _step(self, event: StepReport) -> None:
        if self.loss is None or event.step <= self.first_step:  # another training of the same graph
            self.loss, self.began, self.first_step = event.loss, time.monotonic() - event.seconds, event.step - 1
        self.loss += SMOOTHING * (event.loss - self.loss)
        rate = (time.monotonic() - self.began) / max(1, event.step - self.first_step)
        left = _clock(rate * (event.total - event.step))
        text = f"  {event.step}/{event.total}  loss {self.loss:.4f}  lr {event.learning_rate:.2e}  {rate:.3g} s/step  {left} left"
        self._living(text, event.step, event.total)

    def _living(self, text: str, done: int, total: int) -> None:
        if self.alive:
            self.stream.write(f"\r\x1b[2K{text}")
            self.open_line = True
        elif done == total or done % max(1, total // PLAIN_LINES) == 0:
            self.stream.write(text + "\n")
        self.stream.flush()

    def _line(self, text: str) -> None:
        if self.open_line:
            self.stream.write("\n")
            self.open_line = False
        self.stream.write(text + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
