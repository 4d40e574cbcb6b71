"""Find captions and prompts that the model's text encoder can't read. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.dataset import DatasetConfig
from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..data.captions import captions_of
from ..data.source.folder import FolderBackend
from ..models.t5.tokenizer import find_local_tokenizer, read_tokenizer
from ..models.t5.unknown_tokens import Encoding, UnknownText, find_unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "<unk>"


def describe_captions(request: TrainRequest) -> list[str]:
    """Return a warning if captions of the dataset's folders have characters that the text encoder can't read.

    Reads every caption and no image. Returns [] where the tokenizer is not on this machine yet.
    """
    unknown = unknown_texts(_captions(request.dataset), request.model)
    return [unknown.describe("captions")] if unknown else []


def unknown_texts(texts: Iterable[str], model: ModelConfig) -> UnknownText | None:
    """Return the texts that the model's T5 can't read, None if there are none or the tokenizer is not on this machine."""
    path = find_local_tokenizer(model)
    if path is None:
        return None

    @cache
    def tokenizer() -> Tokenizer:  # read only if a text needs it
        return read_tokenizer(path)

    def encode(text: str) -> Encoding:
        return tokenizer().encode(text)

    return find_unknown(texts, encode, lambda: tokenizer().token_to_id(UNKNOWN))


def _captions(dataset: DatasetConfig) -> Iterator[str]:
    """Yield every caption as it is trained, in the written order of its tags."""
    for part, root in zip(dataset.parts, dataset.roots, strict=True):
        settings, backend = replace(part, tag_orders=0, kept_tags=0), FolderBackend(Path(root))
        for entry in backend.entries():
            try:
                text = backend.caption_text(entry.name)[0] if part.captions == "textfile" else None
            except OSError:
                continue  # reported with the images
            yield from captions_of(entry.name, text, settings)
