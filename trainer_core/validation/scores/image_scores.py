"""Scores of validation images: how well they fit their prompts, and how similar they are to held-out images.

Both are cosines of embeddings of a CLIP model (clip_scorer.py):

    CLIP score of an image = 100 cos(image, prompt)               as torchmetrics and SimpleTuner have it
    likeness of an image   = mean over held-out images of cos(image, held-out image)

Every validation samples the same prompts from the same noise. So a change is the mean of the differences image by
image, whose standard error is smaller than that of the scores. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .estimates import Estimate, estimate


@dataclass(frozen=True)
class ImageScores:
    """The scores of the images of one validation at one strength.

    Attributes:
        prompts: Name of each image's prompt. It stands once for each size.
        clip: CLIP score of each image.
        likeness: Likeness of each image; () where no images are held out.
    """

    prompts: Sequence[str]
    clip: Sequence[float]
    likeness: Sequence[float] = ()

    @property
    def by_prompt(self) -> dict[str, float]:
        """The mean CLIP score of each prompt."""
        return {
            name: fmean(score for other, score in zip(self.prompts, self.clip, strict=True) if other == name)
            for name in dict.fromkeys(self.prompts)
        }

    def as_json(self) -> dict[str, Any]:
        return {"prompts": list(self.prompts), "clip": list(self.clip), "likeness": list(self.likeness)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImageScores:
        """Return the scores of what as_json returned.

        Raises:
            ValueError: It holds something else.
        """
        try:
            names, clip, likeness = ([*value[name]] for name in ("prompts", "clip", "likeness"))
        except (KeyError, TypeError) as error:
            raise ValueError from error
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (*clip, *likeness))
        if not are_numbers or not all(isinstance(name, str) for name in names):
            raise ValueError
        if not names or len(clip) != len(names) or len(likeness) not in (0, len(names)):
            raise ValueError
        return cls(names, clip, likeness)


def difference(new: Sequence[float], old: Sequence[float]) -> Estimate | None:
    """Return the mean difference image by image, and its standard error; None where the images are not the same."""
    if not new or len(new) != len(old):
        return None
    return estimate([after - before for after, before in zip(new, old, strict=True)])


def describe_scores(scores: ImageScores, base: ImageScores | None = None) -> str:
    """Return the scores in words, and what has changed since the base model's images."""
    text = f"CLIP score {_with_error(estimate(scores.clip), 2)}"
    text += _since(difference(scores.clip, base.clip) if base else None, 2)
    if scores.likeness:
        text += f"; likeness to held-out images {_with_error(estimate(scores.likeness), 4)}"
        text += _since(difference(scores.likeness, base.likeness) if base else None, 4)
    return text


def _with_error(value: Estimate, digits: int) -> str:
    return f"{value[0]:.{digits}f}{_error(value[1], digits)}"


def _error(value: float, digits: int) -> str:
    """Return an error in words; of one image there is none."""
    return f" +- {value:.{digits}f}" if value else ""


def _since(change: Estimate | None, digits: int) -> str:
    return f" ({change[0]:+.{digits}f}{_error(change[1], digits)} from the base model)" if change else ""
