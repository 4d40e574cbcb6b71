"""A table of millions of samples: rows in memory-mapped files, and a `Sample` object only while one is accessed.

A row takes 84 bytes plus its text, and no Python object exists for it. The files are unnamed temporary files, which
disappear with the table.
"""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import overload

import numpy as np

from ..config.dataset import FolderConfig
from ..storage.lazy_sequence import LazySequence
from .buckets import Placement
from .captions import class_caption


@dataclass(frozen=True)
class Sample:
    """One image that is trained on.

    Attributes:
        key: Number of the part and name. It is the same on every machine, so that seeds are too.
        name: Path relative to the part's folder, with forward slashes.
        path: Location of the file, for messages.
        sha256: SHA-256 of the file.
        captions: At least one; each step chooses one of them at random.
        size: (width, height) of the original image.
        placement: How it is resized and cropped.
        part: Index of the dataset's part.
        loss_weight: Factor of its loss.
        is_mirrored: Whether the left and right of its bucket are exchanged. The table has no mirrored samples, see
            Mirrored.
    """

    key: str
    name: str
    path: str
    sha256: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    placement: Placement
    part: int
    loss_weight: float = 1.0
    is_mirrored: bool = False


ROW = np.dtype([
    ("sha256", "u1", 32), ("size", "<i4", 2), ("bucket", "<i4", 2), ("resize", "<i4", 2), ("crop", "<i4", 2),
    ("part", "<i4"), ("loss_weight", "<f8"), ("text_end", "<i8"),
])  # fmt: skip
PACKED = struct.Struct("<32s9idq")  # the same layout as a struct: 20 times as fast for a single row
PLAIN = json.JSONDecoder()  # json.loads also detects the encoding, which doubles the time
BLOCK = 4096  # rows that are unpacked at once


class SampleTable(LazySequence[Sample]):
    """A sequence of samples that behaves like a tuple.

    Args:
        rows: Array of dtype ROW. text_end is where the text of a row ends; it begins where that of the previous row
            ends.
        texts: JSON lists [name, caption, ...] in UTF-8, concatenated.
        path_of: Function (part, name) -> location of the image.
    """

    def __init__(self, rows: np.ndarray, texts: mmap.mmap | bytes, path_of: Callable[[int, str], str]):
        self.rows, self.texts, self.path_of = rows, texts, path_of

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, index: int) -> Sample:
        return next(self._between(index, index + 1))

    def _part(self, indices: range) -> Sequence[Sample]:
        return Chosen(self, np.arange(indices.start, indices.stop, indices.step))

    def __iter__(self) -> Iterator[Sample]:
        for begin in range(0, len(self), BLOCK):
            yield from self._between(begin, min(begin + BLOCK, len(self)))

    def _between(self, begin: int, end: int) -> Iterator[Sample]:
        """Yield the samples of rows begin to end. Unpacking them together is four times as fast as one at a time."""
        text_begin = int(self.rows["text_end"][begin - 1]) if begin else 0
        for raw, *numbers, part, loss_weight, text_end in PACKED.iter_unpack(self.rows[begin:end].tobytes()):
            name, *captions = PLAIN.decode(str(self.texts[text_begin:text_end], "utf-8", "surrogatepass"))
            text_begin = text_end
            width, height, across, down, *rest = numbers
            placement = Placement(bucket(across, down), (rest[0], rest[1]), (rest[2], rest[3]))
            path = self.path_of(part, name)
            size = (width, height)
            yield Sample(f"{part}/{name}", name, path, raw.hex(), tuple(captions), size, placement, part, loss_weight)


class Chosen(Sequence[Sample]):
    """A subset of another sequence of samples, by index."""

    def __init__(self, samples: Sequence[Sample], numbers: np.ndarray):
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return type(self)(self.samples, self.numbers[index])
        return self._of(self.samples[int(self.numbers[index])])

    def _of(self, sample: Sample) -> Sample:
        return sample


class Mirrored(Chosen):
    """A subset of another sequence of samples, each of them mirrored."""

    def _of(self, sample: Sample) -> Sample:
        return replace(sample, is_mirrored=True)


def columns(samples: Sequence[Sample]) -> np.ndarray:
    """Return the rows of dtype ROW behind samples, without creating `Sample` objects.

    text_end is meaningless for a subset.
    """
    if isinstance(samples, SampleTable):
        return samples.rows
    if isinstance(samples, Chosen):
        return columns(samples.samples)[samples.numbers]
    return np.frombuffer(b"".join(_pack_row(sample, 0) for sample in samples), dtype=ROW)


class TableWriter:
    """Collect samples one by one; `finish` returns the table."""

    def __init__(self) -> None:
        self._rows, self._texts = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        for file in (self._rows, self._texts):
            weakref.finalize(self, file.close)  # also where an error or the user ends the collecting
        self._num_rows = self._text_end = 0

    def append(self, sample: Sample) -> None:
        text = json.dumps([sample.name, *sample.captions], ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._text_end += len(text)
        self._num_rows += 1
        self._texts.write(text)
        self._rows.write(_pack_row(sample, self._text_end))

    def finish(self, path_of: Callable[[int, str], str]) -> SampleTable:
        if not self._num_rows:
            return SampleTable(np.zeros(0, ROW), b"", path_of)
        self._rows.flush()
        self._texts.flush()
        rows = np.frombuffer(mmap.mmap(self._rows.fileno(), 0, access=mmap.ACCESS_READ), dtype=ROW)
        texts = mmap.mmap(self._texts.fileno(), 0, access=mmap.ACCESS_READ)
        return SampleTable(rows, texts, path_of)


def _pack_row(sample: Sample, text_end: int) -> bytes:
    """Return a row of dtype ROW as bytes."""
    placement = sample.placement
    pairs = *sample.size, *placement.bucket, *placement.resize, *placement.crop
    return PACKED.pack(bytes.fromhex(sample.sha256), *pairs, sample.part, sample.loss_weight, text_end)


@lru_cache(maxsize=4096)
def bucket(width: int, height: int) -> tuple[int, int]:
    """Return the pair, as one shared object for each of the few sizes that occur."""
    return width, height


class Captions(Sequence[tuple[str, ...]]):
    """The captions of each sample."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def _of(self, sample: Sample) -> tuple[str, ...]:
        return sample.captions

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return map(self._of, self._samples)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Sequence[tuple[str, ...]]:
        return [*map(self._of, self._samples[index])] if isinstance(index, slice) else self._of(self._samples[index])


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
