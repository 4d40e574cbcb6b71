"""The captions of samples, and the same with the class word in place of the trigger."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.dataset import FolderConfig
from .captions import class_caption
from .sample_table import Captions, Sample


class ClassCaptions(Captions):
    """All prompts that a run with preservation encodes for each sample.

    Args:
        samples: The samples.
        parts: Settings of the dataset's folders.
    """

    def __init__(self, samples: Sequence[Sample], parts: Sequence[FolderConfig]):
        super().__init__(samples)
        self._parts = parts

    def _of(self, sample: Sample) -> tuple[str, ...]:
        part = self._parts[sample.part]
        return (*sample.captions, *(class_caption(text, part.trigger, part.class_word) for text in sample.captions))
