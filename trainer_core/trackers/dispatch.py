"""A run's events for its trackers: which curves, pictures and results they are told of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from ..host import EvalReport, Event, LoraSaved, Notice, PreviewReady, RunReported, StepReport
from ..registry import load
from .tracker import NONE, Opening
from .worker import Call, TrackerThread

LAST_SECONDS = 60.0  # that a run waits at its end for what is still to be written or sent
MEMORY_SECONDS = 5.0  # between two measurements of the memory
SUMMARY = ("lora", "sha256", "steps", "resumed_from", "seconds_per_step", "peak_ram_bytes", "peak_vram_bytes", "device")


class Smoothed:
    """The running mean of the losses that the live page draws (js/run_state.js), without the bias of its beginning.

    m_t = sum_s k^(t - s) x_s / sum_s k^(t - s),   k = 1 - min(0.1, max(0.005, 20 / steps))
    """

    def __init__(self, num_steps: int):
        self.keep = 1 - min(0.1, max(0.005, 20 / max(1, num_steps)))
        self.total = self.weight = 0.0
        self.last = 0

    def __call__(self, step: int, loss: float) -> float:
        """step: counted from 1, rising; losses of steps that were skipped are not told."""
        decay = self.keep ** (step - self.last)
        self.total, self.weight = self.total * decay + loss * (1 - decay), self.weight * decay + 1 - decay
        self.last = step
        return self.total / self.weight


class TrackerSink:
    """A sink. What comes before begin() waits until it is known whether the run goes on from a step.

    Args:
        names: of trackers, in the registry.
        memory_use: (kind, bytes in use), such as ("VRAM", 1 << 30).
    """

    def __init__(
        self,
        names: Sequence[str],
        opening: Opening,
        memory_use: Callable[[], tuple[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._opening, self._memory_use, self._clock = opening, memory_use, clock
        self._told: SimpleQueue[Notice] = SimpleQueue()
        self._lanes = [
            TrackerThread(name, load("tracker", name), lambda text, level: self._told.put(Notice(text, level)))
            for name in names
        ]
        self._waiting: list[Event] | None = []
        self._smoothed, self._memory_due, self._step = Smoothed(0), 0.0, 0

    def told(self) -> list[Notice]:
        """What trackers had to say since the last call."""
        return [self._told.get() for _ in range(self._told.qsize())]

    def begin(self, step: int, num_steps: int, losses: Sequence[float]) -> None:
        """The run trains from here on. step: that it goes on from; losses: of the steps before, NaN where one was skipped."""
        self._smoothed, self._step = Smoothed(num_steps), step
        for number, loss in enumerate(losses, 1):
            if loss == loss:
                self._smoothed(number, loss)
        for lane in self._lanes:
            lane.begin(replace(self._opening, step=step))
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            if (
                getattr(event, "step", step) >= step
            ):  # the base's pictures and loss are there since the run's first start
                self(event)

    def __call__(self, event: Event) -> None:
        if self._waiting is not None:
            if isinstance(event, (EvalReport, PreviewReady)):
                self._waiting.append(event)
        elif call := self._call_of(event):
            for lane in self._lanes:
                lane.put(call)

    def close(self, failed: bool, seconds: float = LAST_SECONDS) -> None:
        """seconds: that each is waited for, at most."""
        for lane in self._lanes:
            lane.close(failed, seconds)

    def _call_of(self, event: Event) -> Call | None:
        if isinstance(event, StepReport):
            self._step, values = event.step, self._values(event)
            return lambda tracker: tracker.values(event.step, values)
        if isinstance(event, EvalReport):
            name = "eval/loss" if event.held_out else "eval/loss_on_training_images"
            return lambda tracker: tracker.values(event.step, {name: event.loss})
        if isinstance(event, PreviewReady):
            label, caption = event.path.stem.rpartition("-")[2], " | ".join(self._opening.prompts)
            return lambda tracker: tracker.picture(event.step, f"validation/{label}", event.path, caption)
        if isinstance(event, LoraSaved):
            saved, step = {"lora": str(event.path), "sha256": event.sha256}, self._step
            return lambda tracker: tracker.summary(step, saved)
        if isinstance(event, RunReported):
            summary, step = summary_of(event.report), self._step
            return lambda tracker: tracker.summary(step, summary)
        return None

    def _values(self, event: StepReport) -> dict[str, float]:
        values = {
            "train/loss": event.loss,
            "train/loss_smoothed": self._smoothed(event.step, event.loss),
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/seconds_per_step": event.seconds,
        }
        now = self._clock()
        if now >= self._memory_due:
            self._memory_due = now + MEMORY_SECONDS
            kind, used = self._memory_use()
            values[f"train/{kind}_gb"] = used / 1e9
        return values


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """A run's report (docs/report.md) in few flat values."""
    found = {name: report[name] for name in SUMMARY if report.get(name) is not None}
    found |= {f"eval_loss_{when}": report["eval_loss"][when] for when in ("before", "after")}
    found |= {f"seconds_{name}": value for name, value in report["seconds"].items()}
    if report.get("best"):
        found |= {f"best_{name}": value for name, value in report["best"].items()}
    return found


def parse_trackers(trackers: str) -> tuple[str, ...]:
    """Names in the registry, of a choice such as "tensorboard+wandb"."""
    return () if trackers == NONE else tuple(trackers.split("+"))
