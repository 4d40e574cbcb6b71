"""The images that a run was begun with: 40 bytes and a name for each, in one file that is mapped while it is compared.

A safetensors file of two tensors of bytes: `rows`, of dtype ROW in the dataset's order, and `names`, one after the other in UTF-8.
"""

from __future__ import annotations

import heapq
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sample_table import Sample
from ..storage.atomic import replace_atomic, sha256_text
from ..storage.digest_table import argsort_rows, digests
from ..storage.safetensors_header import header_bytes, header_of

FILE = "world-images.safetensors"
MASK = "mask of "  # how the name of a mask's row begins
SHOWN = 6  # changes of a kind that are named one by one
# key: see digests. image, captions: 64 bits of their SHA-256. name_end: where the row's name ends, the row's before where it begins.
ROW = np.dtype([("key", "<u8", 2), ("image", "<u8"), ("captions", "<u8"), ("name_end", "<u8")])
BLOCK = 4096  # images that become rows together

Known = tuple[str, str, str]  # key, and in hex 64 bits of the image's bytes and of its captions


def iter_images(samples: Iterable[Sample]) -> Iterator[Known]:
    return ((s.key, s.sha256[:16], sha256_text(*s.captions)[:16]) for s in samples)


def iter_masks(masks: Iterable[Sample]) -> Iterator[Known]:
    """Rows beside those of the pictures, whose keys begin with a number."""
    return ((f"{MASK}{mask.key}", mask.sha256[:16], sha256_text()[:16]) for mask in masks)


def iter_json_images(images: Mapping[str, Sequence[str]]) -> Iterator[Known]:
    """What world.json held itself before the images had a file of their own."""
    return ((key, image, captions) for key, (image, captions) in images.items())


class ImageManifest:
    """Args: rows: of dtype ROW. names: what their ends are of. files: kept open as long as this lives."""

    def __init__(self, rows: np.ndarray, names: Any, files: Sequence[Any] = ()):
        self.rows, self._names, self._files = rows, names, files

    @classmethod
    def gather(cls, images: Iterable[Known]) -> ImageManifest:
        """In files without a name."""
        rows, names = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        source, end = iter(images), 0
        while block := list(islice(source, BLOCK)):
            texts = [key.encode("utf-8", "surrogatepass") for key, _, _ in block]
            found = np.zeros(len(block), ROW)
            found["key"] = digests(key for key, _, _ in block)
            found["image"] = [int(image, 16) for _, image, _ in block]
            found["captions"] = [int(captions, 16) for _, _, captions in block]
            found["name_end"] = end + np.cumsum([len(text) for text in texts])
            end = int(found["name_end"][-1])
            rows.write(found.tobytes())
            names.write(b"".join(texts))
        rows.flush()
        names.flush()
        if not end:
            return cls(np.zeros(0, ROW), b"")
        mapped = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in (rows, names)]
        return cls(np.frombuffer(mapped[0], ROW), mapped[1], (rows, names))

    @classmethod
    def read(cls, path: Path) -> ImageManifest:
        """Raises: OSError, ValueError, KeyError, TypeError where the file is not such a one, or is cut short."""
        header, data = header_of(path)
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (first, middle), (begin, end) = (header[name]["data_offsets"] for name in ("rows", "names"))
        if data + end != len(mapped) or begin != middle or (middle - first) % ROW.itemsize:
            raise ValueError(f"{path} is cut short")
        rows = np.frombuffer(mapped, ROW, (middle - first) // ROW.itemsize, data + first)
        return cls(rows, memoryview(mapped)[data + begin : data + end])

    def write(self, path: Path) -> None:
        """Atomically."""
        sizes = len(self.rows) * ROW.itemsize, len(self._names)
        places = [0, sizes[0]], [sizes[0], sum(sizes)]
        about = {
            name: {"dtype": "U8", "shape": [size], "data_offsets": place}
            for name, size, place in zip(("rows", "names"), sizes, places, strict=True)
        }

        def put(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                stream.write(header_bytes(about))
                stream.flush()
                self.rows.tofile(stream)
                stream.write(self._names)

        replace_atomic(path, put)

    def name(self, number: int) -> str:
        begin = int(self.rows["name_end"][number - 1]) if number else 0
        return bytes(self._names[begin : int(self.rows["name_end"][number])]).decode("utf-8", "surrogatepass")


def image_changes(before: ImageManifest, after: ImageManifest) -> list[str]:
    """What differs, in words, one change a line; long lists are cut and counted."""
    count = len(before.rows)
    keys = np.concatenate((before.rows["key"], after.rows["key"]))
    order = argsort_rows(keys)
    is_pair = (keys[order[:-1]] == keys[order[1:]]).all(axis=1)  # the one before comes first
    old, new = order[:-1][is_pair], order[1:][is_pair] - count
    is_alone = np.ones(len(keys), dtype=bool)
    is_alone[old], is_alone[new + count] = False, False
    other = before.rows["image"][old] != after.rows["image"][new]
    edited = before.rows["captions"][old] != after.rows["captions"][new]
    told = _some("image", "is new", after, np.flatnonzero(is_alone[count:]))
    told += _some("image", "is gone", before, np.flatnonzero(is_alone[:count]))
    told += _some("image", "has other bytes", after, new[other])
    return told + _some("caption of", "was edited", after, new[edited])


def _some(what: str, how: str, images: ImageManifest, numbers: np.ndarray) -> list[str]:
    names = heapq.nsmallest(SHOWN, map(images.name, numbers.tolist()))
    more = [f"and {len(numbers) - SHOWN} more: {what} ... {how}"] if len(numbers) > SHOWN else []
    return [f"{'' if name.startswith(MASK) else f'{what} '}{name} {how}" for name in names] + more
