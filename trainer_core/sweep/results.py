"""What the runs of a sweep have reached, as it is stored in sweep.json, and how they compare. Needs no torch.

The held-out loss of every run is measured on the same images, noise and sigmas. So two runs are compared image by image
(train/paired_evals.py): each run at the checkpoint where its own loss is lowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ..train.figures.leak import Leak
from ..train.figures.paired_evals import Estimate, Evaluation, change, lower_bound

MIN_SHARE = 1 / 3  # of the steps that a run trains before it can be stopped as a loser
CONFIRMATIONS = 2  # evaluations in a row that must show it


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        values: Value by field.
        run: Name of the run's folder, which stands for all that decides the result.
        name: Name of the LoRA.
        steps: Trained steps.
        seconds_per_step: Median; None where this start trained no step.
        stopped: Why it was ended early; "" if it was not.
        evaluations: Evaluation.as_json() by step.
        leaks: Leak.as_json() by step.
    """

    values: Mapping[str, str]
    run: str
    name: str
    steps: int
    seconds_per_step: float | None = None
    stopped: str = ""
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    leaks: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunResult:
        result = cls(**value)
        _ = result.evals, result.leak  # raises if they are damaged
        return result

    @property
    def evals(self) -> dict[int, Evaluation]:
        return {int(step): Evaluation.from_json(value) for step, value in self.evaluations.items()}

    @property
    def best_step(self) -> int | None:
        """The step with the lowest loss; the start counts too. None without an evaluation."""
        losses = {step: evaluation.loss[0] for step, evaluation in self.evals.items()}
        finite = {step: loss for step, loss in losses.items() if loss == loss}
        return min(finite, key=lambda step: (finite[step], step)) if finite else None

    @property
    def best(self) -> Evaluation | None:
        step = self.best_step
        return None if step is None else self.evals[step]

    @property
    def leak(self) -> Estimate | None:
        """The leak at the best step; the last one where it was not measured there."""
        if not self.leaks:
            return None
        step = str(self.best_step) if str(self.best_step) in self.leaks else max(self.leaks, key=int)
        return Leak.from_json(self.leaks[step]).ratio


@dataclass(frozen=True)
class Row:
    """A run beside the best one.

    Attributes:
        difference: Of the loss from that of the best run, and its standard error; None for the best run itself, and
            where the two have measured other images.
        is_worse: Whether the difference is above 0 with 95 % certainty.
    """

    result: RunResult
    is_best: bool
    loss: float | None
    difference: Estimate | None
    is_worse: bool


def rows_of(results: Sequence[RunResult]) -> list[Row]:
    """Return a row for each run, in their order."""
    measured = [(result.best.loss[0], number) for number, result in enumerate(results) if result.best]
    winner = results[min(measured)[1]] if measured else None
    rows = []
    for result in results:
        best, difference = result.best, None
        if winner is not None and best and result is not winner:
            assert winner.best
            difference = change(best.judged, winner.best.judged)
        is_worse = bool(difference and best and is_above(difference, len(best.judged)))
        rows.append(Row(result, result is winner, best.loss[0] if best else None, difference, is_worse))
    return rows


def is_above(difference: Estimate, num_images: int) -> bool:
    """Return whether a difference of paired losses is above 0 with 95 % certainty."""
    return num_images > 2 and lower_bound(difference, num_images - 1) > 0


def why_lost(evaluations: Mapping[int, Evaluation], step: int, num_steps: int, others: Sequence[RunResult]) -> str:
    """Return why a run can be ended at this step, or "".

    At the last CONFIRMATIONS evaluations its loss was above that of the best other run at the same step, with 95 %
    certainty; and a third of the steps is trained.
    """
    past = sorted(at for at in evaluations if 0 < at <= step)[-CONFIRMATIONS:]
    if step not in past or len(past) < CONFIRMATIONS or step < MIN_SHARE * num_steps:
        return ""
    found = [(rival, difference) for at in past for rival, difference in [_beside_best(evaluations[at], at, others)]]
    if not all(
        rival and difference and is_above(difference, len(evaluations[at].judged))
        for at, (rival, difference) in zip(past, found, strict=True)
    ):
        return ""
    rival, difference = found[-1]
    assert rival and difference
    mean, error = difference
    return f"its held-out loss at step {step} is {mean:.4f} +- {error:.4f} above that of {describe(rival)}"


def _beside_best(
    evaluation: Evaluation, step: int, others: Sequence[RunResult]
) -> tuple[RunResult | None, Estimate | None]:
    """Return the run with the lowest loss at a step, and the difference from it."""
    at_step = [(other.evals[step], other) for other in others if step in other.evals]
    if not at_step:
        return None, None
    best, rival = min(at_step, key=lambda pair: fmean(map(fmean, pair[0].judged.values())))
    return rival, change(evaluation.judged, best.judged)


def describe(result: RunResult) -> str:
    """Return the combination of a run in words."""
    return ", ".join(f"{name}={value}" for name, value in result.values.items())


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as JSON values."""
    return [
        {
            "values": dict(row.result.values),
            "name": row.result.name,
            "run": row.result.run,
            "loss": row.loss,
            "step": row.result.best_step,
            "is_best": row.is_best,
            "difference": _estimate(row.difference),
            "is_worse": row.is_worse,
            "leak": _estimate(row.result.leak),
            "steps": row.result.steps,
            "seconds_per_step": row.result.seconds_per_step,
            "stopped": row.result.stopped or None,
        }
        for row in rows
    ]


def _estimate(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else {"mean": value[0], "standard_error": value[1]}


def table(rows: Sequence[Row]) -> str:
    """Return the table as text: one line a run."""
    head = [*(rows[0].result.values if rows else ()), "held-out loss", "above the best", "leak", "s/step", "steps", ""]
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: Row) -> list[str]:
    result, leak = row.result, row.result.leak
    loss = "-" if row.loss is None else f"{row.loss:.4f} at {result.best_step}"
    above = "best" if row.is_best else "-" if row.difference is None else "{:+.4f} +- {:.4f}".format(*row.difference)
    pace = "-" if result.seconds_per_step is None else f"{result.seconds_per_step:.3g}"
    note = (
        "stopped early"
        if result.stopped
        else ""
        if row.is_best or row.is_worse or not row.difference
        else "not told apart"
    )
    leak_text = "-" if leak is None else "{:.2f} +- {:.2f}".format(*leak)
    return [*result.values.values(), loss, above, leak_text, pace, str(result.steps), note]
