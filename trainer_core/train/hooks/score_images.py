"""Score the validation images of a run with CLIP, where its settings ask for it (validation/scores/image_scores.py).

The scores of each image are in the run's folder, validation/scores.json, so that a resumed run compares with the base
model's images and reports all steps. Scores of another model, other prompts or other held-out images are not continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...config.validation import CLIP
from ...data.cache.latents import place_image
from ...data.holdout import split
from ...data.sample_table import Sample
from ...data.source.decode import BrokenImage, decode
from ...distributed.ranks import Ranks
from ...host import Host, ImagesScored, Notice
from ...runs import layout
from ...storage.atomic import sha256_text, write_json
from ...storage.bounded_files import Unusable, read_json
from ...validation.base_images import key_of
from ...validation.sample_images import Pictures
from ...validation.scores.clip_scorer import ClipScorer, make_scorer
from ...validation.scores.estimates import Estimate, estimate
from ...validation.scores.image_scores import ImageScores, describe_scores, difference
from ..phase_timer import PhaseTimer
from ..prepare import RunPlan
from ..step.state import prior_parts_of
from .eval_loss import spread, without_prior

MAX_BYTES = 64 << 20
BASE = 0.0  # strength of the base model's images

ByStrength = dict[float, ImageScores]


@dataclass
class ImageScoring:
    """Scores images, and stores and reports the scores.

    Attributes:
        scorer: The CLIP model.
        path: Where the scores are stored.
        key: What they are scores of: model, prompts, sampling settings and held-out images.
        host: The host.
        steps: Step -> strength -> scores.
    """

    scorer: ClipScorer
    path: Path
    key: str
    host: Host
    steps: dict[int, ByStrength] = field(default_factory=dict)

    @classmethod
    def build(
        cls, plan: RunPlan, record: Mapping[str, Any], ranks: Ranks, host: Host, phases: PhaseTimer
    ) -> ImageScoring | None:
        """Embed prompts and held-out images. None where nothing is scored, and on all ranks but the main one."""
        settings = plan.request.validation
        if settings is None or settings.score != CLIP or not ranks.is_main:
            return None
        samples = _held_out(plan)
        with phases("validate"):
            scorer = make_scorer(settings, _images(plan, samples), plan.device, host)
        assert scorer
        if not samples:
            text = "the likeness of validation images is not measured, because no images are held out (holdout)"
            host.emit(Notice(text))
        images = key_of(settings, record["versions"], str(plan.device))
        key = sha256_text(images, scorer.identity, *(sample.sha256 for sample in samples))
        path = plan.folder / layout.VALIDATION / layout.SCORES
        return cls(scorer, path, key, host, _read(path, key))

    def score(self, step: int, columns: Sequence[tuple[float, Pictures]]) -> None:
        """Score the images of a step: strength and images of each column. Those of step 0 are the base model's."""
        if step or step not in self.steps:
            scores = self.scorer.score([pictures for _, pictures in columns])
            strengths = [strength for strength, _ in columns]
            self.steps[step] = dict(zip(strengths, scores, strict=True))
            self._write()
        shown = shown_strength(self.steps[step])
        base = self.steps[0][BASE] if step and 0 in self.steps else None
        for strength, scores in self.steps[step].items():
            self.host.emit(event_of(step, strength, strength == shown, scores, base))
        label = f"strength {shown:g}, " if len(self.steps[step]) > 1 else ""
        self.host.emit(Notice(f"step {step}: {label}{describe_scores(self.steps[step][shown], base)}"))

    def report(self, last: int) -> list[dict[str, Any]]:
        """Return the scores of all steps up to this one as JSON values for report.json."""
        base = self.steps[0][BASE] if 0 in self.steps else None
        return [
            {"step": step, "strength": strength, **_entry(scores, base if step else None)}
            for step, by_strength in sorted(self.steps.items())
            if step <= last
            for strength, scores in by_strength.items()
        ]

    def _write(self) -> None:
        steps = {
            str(step): {f"{strength:g}": scores.as_json() for strength, scores in by_strength.items()}
            for step, by_strength in sorted(self.steps.items())
        }
        write_json(self.path, {"key": self.key, "steps": steps})


def shown_strength(strengths: Sequence[float] | Mapping[float, object]) -> float:
    """Return the strength that charts show: the one nearest to 1."""
    return min(strengths, key=lambda strength: abs(strength - 1))


def event_of(step: int, strength: float, is_shown: bool, scores: ImageScores, base: ImageScores | None) -> ImagesScored:
    """Return the event of scores, beside those of the base model's images."""
    clip, likeness = estimate(scores.clip), estimate(scores.likeness) if scores.likeness else (None, None)
    changes = [
        (base and difference(getattr(scores, name), getattr(base, name))) or (None, None)
        for name in ("clip", "likeness")
    ]
    return ImagesScored(
        step, strength, is_shown, *clip, *changes[0], *likeness, *changes[1],
        prompts=tuple(scores.by_prompt), by_prompt=tuple(scores.by_prompt.values()),
    )  # fmt: skip


def _held_out(plan: RunPlan) -> list[Sample]:
    """Return the held-out images that others are compared with: at most eval_images, spread evenly."""
    training, parts = plan.request.training, plan.request.dataset.parts
    held = split(plan.index.samples, training.holdout)[1]
    return spread(without_prior(held, prior_parts_of(parts)), training.eval_images) if len(held) else []


def _images(plan: RunPlan, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return images as they are trained on: resized and cropped. What can't be decoded is reported by the cache."""
    images = []
    for sample in samples:
        try:
            images.append(np.asarray(place_image(decode(plan.index.read(sample)), sample).convert("RGB")))
        except (OSError, BrokenImage):
            continue
    return images


def _read(path: Path, key: str) -> dict[int, ByStrength]:
    """Return the scores of an earlier start; {} where there are none of this key, or the file is damaged."""
    try:
        value = read_json(path, MAX_BYTES)
        if value["key"] != key:
            return {}
        return {
            int(step): {float(strength): ImageScores.from_json(scores) for strength, scores in by_strength.items()}
            for step, by_strength in value["steps"].items()
            if by_strength
        }
    except (OSError, Unusable, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(scores: ImageScores, base: ImageScores | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in ("clip", "likeness"):
        own = getattr(scores, name)
        if own:
            values[f"{name}_score" if name == "clip" else name] = {
                **_estimate(estimate(own)),
                "change": _estimate(difference(own, getattr(base, name)) if base else None),
            }
    return {**values, "by_prompt": scores.by_prompt}


def _estimate(value: Estimate | None) -> Any:
    return value and {"mean": value[0], "standard_error": value[1]}
