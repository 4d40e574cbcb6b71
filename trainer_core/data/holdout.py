"""Which images are kept out of training, so that there is something to judge a checkpoint by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ..files import sha256_text


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Keyed)


def split(samples: Sequence[S], share: float) -> tuple[list[S], list[S]]:
    """(trained, held out), each in the order of samples.

    Chosen by the hash of their keys, so that an image stays on its side when others come or go. With a share above 0
    at least one is held out, and at least one is trained on.

    Args:
        share: in [0, 0.5].
    """
    if share == 0 or len(samples) < 2:
        return list(samples), []
    count = min(len(samples) - 1, max(1, round(share * len(samples))))
    ordered = sorted(samples, key=lambda sample: sha256_text("holdout", sample.key))
    held = {sample.key for sample in ordered[:count]}
    return [s for s in samples if s.key not in held], [s for s in samples if s.key in held]
