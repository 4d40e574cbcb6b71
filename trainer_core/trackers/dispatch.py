"""Pass a run's events on to its trackers: which scalars, images and results they receive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from ..host import (
    EvalCompared,
    EvalReport,
    Event,
    ImagesScored,
    LeakMeasured,
    LoraSaved,
    Notice,
    PreviewReady,
    RunReported,
    StepReport,
)
from ..registry import load
from ..smoothed import Smoothed
from .tracker import NONE, Opening
from .worker import Call, TrackerThread

LAST_SECONDS = 60.0  # how long a run waits at its end for pending writes and uploads
MAX_NAME = 60  # characters of a prompt's name in the name of a curve
MEMORY_SECONDS = 5.0  # between two measurements of memory use
SUMMARY = ("lora", "sha256", "steps", "resumed_from", "seconds_per_step", "peak_ram_bytes", "peak_vram_bytes", "device")


class TrackerSink:
    """An event sink. Events before begin() are queued until it is known whether the run resumes from a checkpoint.

    Args:
        names: Names of trackers in the registry.
        opening: The run.
        memory_use: Returns (kind, bytes in use), such as ("VRAM", 1 << 30).
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        names: Sequence[str],
        opening: Opening,
        memory_use: Callable[[], tuple[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._opening, self._memory_use, self._clock = opening, memory_use, clock
        self._notices: SimpleQueue[Notice] = SimpleQueue()
        self._threads = [
            TrackerThread(name, load("tracker", name), lambda text, level: self._notices.put(Notice(text, level)))
            for name in names
        ]
        self._waiting: list[Event] | None = []
        self._smoothed, self._memory_due, self._step = Smoothed(0), 0.0, 0

    def take_notices(self) -> list[Notice]:
        """Return the messages of the trackers since the last call."""
        return [self._notices.get() for _ in range(self._notices.qsize())]

    def begin(self, step: int, num_steps: int, losses: Sequence[float]) -> None:
        """Start training.

        Args:
            step: Step that the run resumes from; 0 for a new run.
            num_steps: Steps of the whole run.
            losses: Losses of the earlier steps, NaN for skipped ones.
        """
        self._smoothed, self._step = Smoothed(num_steps), step
        for number, loss in enumerate(losses, 1):
            if loss == loss:
                self._smoothed(number, loss)
        for thread in self._threads:
            thread.begin(replace(self._opening, step=step))
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            # Images and loss of the base model were already logged when the run first started.
            if getattr(event, "step", step) >= step:
                self(event)

    def __call__(self, event: Event) -> None:
        self._pass_on(event)
        if self._waiting is not None:
            if isinstance(event, (EvalReport, EvalCompared, LeakMeasured, ImagesScored, PreviewReady)):
                self._waiting.append(event)
        elif call := self._call_of(event):
            for thread in self._threads:
                thread.put(call)

    def _pass_on(self, event: Event) -> None:
        """Pass the event itself to the trackers that take events."""
        for thread in self._threads if self._waiting is None else ():
            if thread.takes_events:
                thread.put(lambda tracker: tracker.event(event))  # type: ignore[attr-defined]

    def close(self, failed: bool, seconds: float = LAST_SECONDS) -> None:
        """Close all trackers.

        Args:
            failed: Whether the run ended with an error.
            seconds: Maximum time to wait for each tracker.
        """
        for thread in self._threads:
            thread.close(failed, seconds, is_patient=seconds >= LAST_SECONDS)

    def _call_of(self, event: Event) -> Call | None:
        if isinstance(event, StepReport):
            self._step, values = event.step, self._values(event)
            return lambda tracker: tracker.values(event.step, values)
        if isinstance(event, EvalReport):
            name = "eval/loss" if event.held_out else "eval/loss_on_training_images"
            return lambda tracker: tracker.values(event.step, {name: event.loss})
        if isinstance(event, EvalCompared):
            compared = values_of(event)
            return lambda tracker: tracker.values(event.step, compared)
        if isinstance(event, LeakMeasured):
            leak = {"eval/leak": event.leak, "eval/leak_error": event.standard_error}
            return lambda tracker: tracker.values(event.step, leak)
        if isinstance(event, ImagesScored):
            scores = scores_of(event)
            return lambda tracker: tracker.values(event.step, scores)
        if isinstance(event, PreviewReady):
            label, caption = event.path.stem.rpartition("-")[2], " | ".join(self._opening.prompts)
            return lambda tracker: tracker.picture(event.step, f"validation/{label}", event.path, caption)
        if isinstance(event, LoraSaved):
            result, step = {"lora": str(event.path), "sha256": event.sha256}, self._step
            return lambda tracker: tracker.summary(step, result)
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


def values_of(event: EvalCompared) -> dict[str, float]:
    """Return the scalars of a comparison of evaluations."""
    gaps = {f"eval/gap_sigma_{sigma:g}": gap for sigma, gap in zip(event.sigmas, event.gaps, strict=False)}
    trained = {} if event.trained is None else {"eval/loss_trained": event.trained}
    change = {"eval/change": event.change, "eval/change_error": event.change_error}
    return {**change, **trained, **gaps}


def scores_of(event: ImagesScored) -> dict[str, float]:
    """Return the scalars of scores of images. Strengths that charts do not show have names of their own."""
    end = "" if event.is_shown else f"_strength_{event.strength:g}"
    values = {
        "clip_score": event.clip, "clip_score_error": event.clip_error, "likeness": event.likeness,
        "likeness_error": event.likeness_error,
    }  # fmt: skip
    scores = {f"eval/{name}{end}": value for name, value in values.items() if value is not None}
    names = (name[:MAX_NAME].replace("/", "_") for name in event.prompts)
    return scores | {f"clip_score{end}/{name}": value for name, value in zip(names, event.by_prompt, strict=True)}


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return a run's report (docs/report.md) as a few flat values."""
    summary = {name: report[name] for name in SUMMARY if report.get(name) is not None}
    summary |= {
        f"eval_loss_{when}": report["eval_loss"][when] for when in ("before", "after") if report["eval_loss"]["after"]
    }
    summary |= {f"seconds_{name}": value for name, value in report["seconds"].items()}
    if report.get("best"):
        summary |= {f"best_{name}": value for name, value in report["best"].items()}
    return summary


def parse_trackers(trackers: str) -> tuple[str, ...]:
    """Return the registry names of a choice such as "tensorboard+wandb"."""
    return () if trackers == NONE else tuple(trackers.split("+"))
