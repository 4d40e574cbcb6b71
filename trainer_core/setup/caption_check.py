"""Find captions and prompts that the model's text encoder can't read, or not as a whole. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..config.dataset import DatasetConfig
from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..data.captions import WILDCARD, final_captions
from ..data.places.open_source import has_archives, is_remote
from ..data.skipped_images import SkippedImages
from ..data.source.backend import Backend, describe_left_out, left_out_report
from ..data.source.folder import FolderBackend
from ..data.tables.caption_source import CaptionSource, NoCaption
from ..errors import UserError
from ..models.text.tokenizer import find_local_t5_tokenizer, read_t5_pieces
from ..models.text.unknown_tokens import Encoding, UnknownText, find_unknown
from .long_texts import LongTexts, watch_lengths

UNKNOWN = "<unk>"
NUM_SHOWN = 5  # files in a message


def describe_dataset(request: TrainRequest) -> list[str]:
    """Return warnings about the files and captions of the dataset's folders.

    Files that are left out or can't be read, and captions that the text encoder can't read or takes only in part. Reads
    every caption and no image. The captions are not checked where the tokenizer is not on this machine yet.

    Raises:
        UserError: No image of the dataset has a caption, so that a run could not start.
    """
    backends: list[Backend] = []
    wildcards = Wildcards()
    unknown, long = check_texts(wildcards.watch(_captions(request.dataset, backends)), request.model)
    if not wildcards.has_texts:
        _refuse_unusable(request.dataset, backends)
    lines = [describe_left_out(entry) for entry in left_out_report(backends)]
    unreadable = [entry for backend in backends for entry in sorted(backend.left_out.unreadable)]
    lines += [f"can't be used: {location}: {reason}" for location, reason in unreadable[:NUM_SHOWN]]
    if len(unreadable) > NUM_SHOWN:
        lines.append(f"and {len(unreadable) - NUM_SHOWN} more that can't be used")
    return [*lines, *wildcards.describe(), *describe_texts(unknown, long, "captions")]


def _refuse_unusable(dataset: DatasetConfig, backends: list[Backend]) -> None:
    """Raise the run's own error if images were found: none of them has a caption."""
    if len(backends) < len(dataset.parts):  # the run reads the others
        return
    skipped, num_found = SkippedImages([]), 0
    for part, backend in zip(dataset.parts, backends, strict=True):
        skipped.add_unreadable(part, backend)
        num_found += len(backend.entries())
    if num_found:
        raise UserError.at("dataset", skipped.describe_none_used(num_found))


class Wildcards:
    """Count captions with wildcards of other trainers, such as {red|blue}, which are not expanded here."""

    def __init__(self) -> None:
        self.count, self.example, self.place, self.has_texts = 0, "", "", False

    def watch(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the texts, and where each comes from, as they come."""
        for place, text in texts:
            self.has_texts = True
            if "{" in text and (match := WILDCARD.search(text)):
                self.count += 1
                if not self.example:
                    self.example, self.place = match[0][:60], place
            yield place, text

    def describe(self) -> list[str]:
        """Return the warning, in one line; [] if there are none."""
        if not self.count:
            return []
        fix = "they are not expanded, and are trained as they stand; write each form as a caption of its own"
        return [f"{self.count} captions contain wildcards, such as {self.example} ({self.place}): {fix}"]


def describe_texts(unknown: UnknownText | None, long: LongTexts, what: str) -> list[str]:
    """Return the warnings about texts. what: Name of the texts, in the plural."""
    return [text for text in (unknown.describe(what) if unknown else "", long.describe(what)) if text]


def check_texts(texts: Iterable[tuple[str, str]], model: ModelConfig) -> tuple[UnknownText | None, LongTexts]:
    """Return the texts that the model's T5 can't read, None if there are none; and those that are too long.

    Args:
        texts: Where each text comes from, and the text. Read to the end in any case.
        model: The model. If its tokenizer is not on this machine, nothing is found.
    """
    path, long = find_local_t5_tokenizer(model), LongTexts(model.text_tokens)
    if path is None:
        for _ in texts:
            pass
        return None, long
    tokenizer = _lazy_tokenizer(path)

    def encode(text: str) -> Encoding:
        return tokenizer().encode(text)

    watched = watch_lengths(texts, long, lambda text: len(encode(text).ids))
    return find_unknown(watched, encode, lambda: tokenizer().token_to_id(UNKNOWN)), long


def _lazy_tokenizer(path: Path) -> Callable[[], Any]:
    """Return a function that returns the tokenizer, which is read only if a text needs it."""
    return cache(lambda: read_t5_pieces(path))


def _captions(dataset: DatasetConfig, backends: list[Backend]) -> Iterator[tuple[str, str]]:
    """Yield every caption as it is trained, in the written order of its tags, and where its image is.

    Args:
        dataset: The folders.
        backends: Receives the source of each folder.
    """
    for number, (part, root) in enumerate(zip(dataset.parts, dataset.roots, strict=True)):
        if is_remote(root) or has_archives(Path(root)):  # the run reads them
            continue
        settings, backend = replace(part, tag_orders=0, tag_dropout=0.0, kept_tags=0), FolderBackend(Path(root))
        backends.append(backend)
        entries = backend.entries()
        source = CaptionSource.open(dataset, number, backend, entries)
        for position, entry in enumerate(entries):
            try:
                row = source.row(position, entry.name)
            except NoCaption as error:
                backend.left_out.add_unreadable(backend.path(entry.name), str(error))
                continue
            for caption in final_captions(row.captions, settings):
                yield backend.path(entry.name), caption
