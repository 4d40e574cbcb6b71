"""Images whose loss is out of line, by what a run has measured of each of them.

A run with held-out images measures at every checkpoint the loss of up to `eval_images` held-out and as many trained images,
each with its own fixed noise at the same sigmas (train/hooks/eval_loss.py). So the losses of two images can be compared.
Two values of an image are looked at: the logarithm of its loss, and how far it has changed since the start. An image that is
much harder than the others, or that learns nothing from them, may show something else, be damaged, or have another caption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...runs import layout
from ...runs.image_manifest import FILE, ImageManifest
from ...storage.bounded_files import Unusable, read_json
from ...storage.digest_table import digests
from ...train.figures.paired_evals import Evaluation
from ..findings import NOTE, Case, Finding, count_of
from ..image_list import ImageList
from ..thresholds import LEAST_LOSSES, LOSS_OUTLIER
from .caption_checks import case_of

STATE_BYTES = 256 << 20
SCALE = 1.4826  # of the median absolute deviation, which is then the standard deviation of a normal distribution
Losses = dict[
    int, tuple[float, float]
]  # the first 64 bits of an image's SHA-256 -> its loss, and the change since the start


@dataclass(frozen=True)
class LossReport:
    """What the losses of a run say about the images.

    Attributes:
        findings: The images whose loss is out of line.
        remark: How many losses are known and what to switch on to know more; "" where all are known.
    """

    findings: tuple[Finding, ...]
    remark: str


def check_losses(images: ImageList, run: Path) -> LossReport:
    """Return the images of a dataset whose loss in a run is out of line.

    Args:
        images: The images. They are recognized by their bytes.
        run: Folder of the run.
    """
    losses = losses_of(run)
    known = [(image, losses[key]) for image in images.images if (key := _key(image.sha256)) in losses]
    how = (
        f"a run measures them with held-out images (holdout above 0), eval_images of at least {len(images.images)} and "
        "checkpoint_every"
    )
    if len(known) < LEAST_LOSSES:
        return LossReport(
            (), f"{run.name} has the losses of {len(known)} of these images, which is too few to compare; {how}"
        )
    cases = _out_of_line([(case_of(image), *values) for image, values in known])
    text = f"loss out of line in {run.name}: {count_of(cases)}; look whether image and caption fit together and belong to the others"
    findings = (Finding("loss", NOTE, text, tuple(cases)),) if cases else ()
    missing = len(images.images) - len(known)
    return LossReport(findings, f"{run.name} has no losses of {missing} of these images; {how}" if missing else "")


def _key(sha256: str) -> int:
    return int(sha256[:16], 16) if sha256 else -1


def losses_of(run: Path) -> Losses:
    """Return the losses that the newest readable checkpoint of a run holds, by image; {} if there are none."""
    evaluations = _evaluations(run)
    try:
        manifest = ImageManifest.read(run / FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not evaluations:
        return {}
    newest, start = evaluations[max(evaluations)], evaluations[min(evaluations)]
    now, before = ({**each.judged, **each.trained} for each in (newest, start))
    rows = {
        tuple(key): int(image)
        for key, image in zip(manifest.rows["key"].tolist(), manifest.rows["image"].tolist(), strict=True)
    }
    losses: Losses = {}
    for key, values in now.items():
        row = rows.get(tuple(digests([key])[0].tolist()))
        loss, change = fmean(values), fmean(values) - fmean(before.get(key, values))
        if row is not None and loss > 0 and math.isfinite(loss) and math.isfinite(change):
            losses[row] = (loss, change)
    return losses


def _evaluations(run: Path) -> dict[int, Evaluation]:
    for checkpoint in reversed(layout.list_checkpoints(run / layout.CHECKPOINTS)):
        try:
            state = read_json(checkpoint / layout.CHECKPOINT_STATE, STATE_BYTES)
            stored = state.get("evaluations", {})
            return {int(step): _evaluation(value) for step, value in stored.items()}
        except (
            OSError,
            Unusable,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ):  # damaged: the one before may not be
            continue
    return {}


def _evaluation(value: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation whose losses are numbers."""
    evaluation = Evaluation.from_json(value)
    for losses in (evaluation.judged, evaluation.trained):
        for row in losses.values():
            fmean(row)
    return evaluation


def _out_of_line(items: Sequence[tuple[Case, float, float]]) -> list[Case]:
    """Return the cases, the farthest first, with their values in words. items: of each image the loss, and its change."""
    losses, changes = [loss for _, loss, _ in items], [change for _, _, change in items]
    far = zip(scores([math.log(loss) for loss in losses]), scores(changes), strict=True)
    cases = []
    for (case, loss, change), (by_loss, by_change) in zip(items, far, strict=True):
        words = []
        if by_loss > LOSS_OUTLIER:
            words.append(f"loss {loss:.3f}, the median is {median(losses):.3f}")
        if by_change > LOSS_OUTLIER:
            words.append(f"changed by {change:+.3f}, the median by {median(changes):+.3f}")
        if words:
            cases.append((max(by_loss, by_change), Case(case.number, case.path, case.label, "; ".join(words))))
    return [case for _, case in sorted(cases, key=lambda entry: -entry[0])]


def scores(values: Sequence[float]) -> list[float]:
    """Return how far each value is above the median, in standard deviations as the median absolute deviation gives them."""
    center = median(values)
    spread = SCALE * median(abs(value - center) for value in values)
    return [(value - center) / spread if spread else 0.0 for value in values]
