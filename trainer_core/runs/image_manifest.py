"""The images of a run's manifest: 40 bytes and a name for each, in one file that is memory-mapped for comparison.

It is a safetensors file with two tensors of bytes: `rows`, of dtype ROW in the dataset's order, and `names`,
concatenated in UTF-8.
"""

from __future__ import annotations

import heapq
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..data.sample_table import Sample
from ..data.source.backend import printable_name
from ..storage.atomic import replace_atomic, sha256_text
from ..storage.digest_table import argsort_rows, digests
from ..storage.safetensors_header import header_bytes, header_of

FILE = "world-images.safetensors"
MASK = "mask of "  # prefix of the name of a mask's row
SHOWN = 6  # changes of one kind that are listed individually
# key: see digests. image, captions: the first 64 bits of their SHA-256. name_end: end of the row's name in `names`; the
# name begins at the name_end of the row before.
ROW = np.dtype([("key", "<u8", 2), ("image", "<u8"), ("captions", "<u8"), ("name_end", "<u8")])
BLOCK = 4096  # images that are converted to rows at a time

ImageRow = tuple[str, str, str]  # key; 64 bits of the SHA-256 of the image's bytes, and of its captions, in hex


def iter_images(samples: Iterable[Sample]) -> Iterator[ImageRow]:
    """Yield a row for each image. The weight of its loss, where it has one, counts as part of its captions."""
    return ((s.key, s.sha256[:16], sha256_text(*s.captions, *_weight_of(s))[:16]) for s in samples)


def _weight_of(sample: Sample) -> tuple[str, ...]:
    return () if sample.loss_weight == 1.0 else (f"\0loss_weight {sample.loss_weight}",)


def iter_masks(masks: Iterable[Sample]) -> Iterator[ImageRow]:
    """Yield a row for each mask. Its key can't equal that of an image, which begins with a number."""
    return ((f"{MASK}{mask.key}", mask.sha256[:16], sha256_text()[:16]) for mask in masks)


def iter_json_images(images: Mapping[str, Sequence[str]]) -> Iterator[ImageRow]:
    """Yield the rows of an older world.json, which held the images itself."""
    return ((key, image, captions) for key, (image, captions) in images.items())


class ImageManifest:
    """The images of a manifest.

    Args:
        rows: one per image, of dtype ROW.
        names: the concatenated names, in UTF-8.
    """

    def __init__(self, rows: np.ndarray, names: Any):
        self.rows, self._names = rows, names

    @classmethod
    def gather(cls, images: Iterable[ImageRow]) -> ImageManifest:
        """Collect rows in unnamed temporary files."""
        with tempfile.TemporaryFile() as rows, tempfile.TemporaryFile() as names:
            end = _write_rows(images, rows, names)
            if not end:
                return cls(np.zeros(0, ROW), b"")
            mapped = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in (rows, names)]
        return cls(np.frombuffer(mapped[0], ROW), mapped[1])

    @classmethod
    def read(cls, path: Path) -> ImageManifest:
        """Map a file that `write` has made.

        Raises:
            OSError, ValueError, KeyError, TypeError: the file is not a valid image manifest, or is truncated.
        """
        header, data = header_of(path)
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (first, middle), (begin, end) = (header[name]["data_offsets"] for name in ("rows", "names"))
        if data + end != len(mapped) or begin != middle or (middle - first) % ROW.itemsize:
            raise ValueError(f"{path} is truncated")
        rows = np.frombuffer(mapped, ROW, (middle - first) // ROW.itemsize, data + first)
        return cls(rows, memoryview(mapped)[data + begin : data + end])

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        sizes = len(self.rows) * ROW.itemsize, len(self._names)
        offsets = [0, sizes[0]], [sizes[0], sum(sizes)]
        header = {
            name: {"dtype": "U8", "shape": [size], "data_offsets": offset}
            for name, size, offset in zip(("rows", "names"), sizes, offsets, strict=True)
        }

        def write_to(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                stream.write(header_bytes(header))
                stream.flush()
                self.rows.tofile(stream)
                stream.write(self._names)

        replace_atomic(path, write_to)

    def name(self, number: int) -> str:
        """Return the name of a row, in printable form."""
        begin = int(self.rows["name_end"][number - 1]) if number else 0
        raw = bytes(self._names[begin : int(self.rows["name_end"][number])])
        return printable_name(raw.decode("utf-8", "surrogatepass"))


def _write_rows(images: Iterable[ImageRow], rows: IO[bytes], names: IO[bytes]) -> int:
    """Write images to two files, and return the number of bytes of all names."""
    source, end = iter(images), 0
    while block := list(islice(source, BLOCK)):
        texts = [key.encode("utf-8", "surrogatepass") for key, _, _ in block]
        block_rows = np.zeros(len(block), ROW)
        block_rows["key"] = digests(key for key, _, _ in block)
        block_rows["image"] = [int(image, 16) for _, image, _ in block]
        block_rows["captions"] = [int(captions, 16) for _, _, captions in block]
        block_rows["name_end"] = end + np.cumsum([len(text) for text in texts])
        end = int(block_rows["name_end"][-1])
        rows.write(block_rows.tobytes())
        names.write(b"".join(texts))
    rows.flush()
    names.flush()
    return end


def image_changes(before: ImageManifest, after: ImageManifest) -> list[str]:
    """Return the differences in words, one change a line. Long lists are truncated, with a count."""
    count = len(before.rows)
    keys = np.concatenate((before.rows["key"], after.rows["key"]))
    order = argsort_rows(keys)
    is_pair = (keys[order[:-1]] == keys[order[1:]]).all(axis=1)  # of each pair, the row of `before` comes first
    old, new = order[:-1][is_pair], order[1:][is_pair] - count
    is_alone = np.ones(len(keys), dtype=bool)
    is_alone[old], is_alone[new + count] = False, False
    other = before.rows["image"][old] != after.rows["image"][new]
    edited = before.rows["captions"][old] != after.rows["captions"][new]
    lines = _list_some("image", "is new", after, np.flatnonzero(is_alone[count:]))
    lines += _list_some("image", "is gone", before, np.flatnonzero(is_alone[:count]))
    lines += _list_some("image", "has changed", after, new[other])
    return lines + _list_some("caption of", "was edited", after, new[edited])


def _list_some(what: str, how: str, images: ImageManifest, numbers: np.ndarray) -> list[str]:
    names = heapq.nsmallest(SHOWN, map(images.name, numbers.tolist()))
    more = [f"and {len(numbers) - SHOWN} more: {what} ... {how}"] if len(numbers) > SHOWN else []
    return [f"{'' if name.startswith(MASK) else f'{what} '}{name} {how}" for name in names] + more
