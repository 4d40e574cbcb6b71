"""Masks: for each picture of a part that has them, the one of the same name in a folder of its own, which weighs its places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.dataset import DatasetConfig
from ..errors import Problem, UserError
from ..host import Host
from ..storage.atomic import sha256_text, sha256_texts
from ..storage.digest_table import DigestTable, Numbers, digests, first_of_each
from .sample_table import Sample, TableWriter
from .source.backend import Entry, stem
from .source.folder import FolderBackend
from .source.scan import scans

FIELD = "masks"
ROW = np.dtype([("sha256", "u1", 32), ("size", "<i4", 2)])  # what a scan tells of a mask


@dataclass(frozen=True)
class Masks:
    """The masks of those samples that have one.

    Args:
        samples: key, part and placement of the picture; bytes and size of the mask, and its name as the one caption.
        numbers: for the key of a sample, the number of its mask.
        backends: one a part; None where it has no masks.
    """

    samples: Sequence[Sample]
    numbers: Numbers
    backends: tuple[FolderBackend | None, ...]

    def of(self, sample: Sample) -> Sample | None:
        """The mask of a sample; None where its part has none."""
        number = self.numbers.of(sample.key)
        return None if number is None else self.samples[number]

    def read(self, mask: Sample) -> bytes:
        backend = self.backends[mask.part]
        assert backend, mask.key
        return backend.read(mask.captions[0])

    def digest(self, pictures: str) -> str:
        """Of the pictures and of the bytes that weigh them."""
        return sha256_text(pictures, sha256_texts(f"{mask.key} {mask.sha256}" for mask in self.samples))


class MaskFolder:
    """A part's masks, each read once.

    Args:
        numbers: for each picture of the part, as its folder lists them, the number of its mask among the entries; -1: none.
    """

    def __init__(self, name: str, backend: FolderBackend, entries: Sequence[Entry], numbers: np.ndarray, host: Host):
        self.name, self.backend, self._entries, self._numbers = name, backend, entries, numbers
        self._rows = np.zeros(len(entries), ROW)
        self._faults: dict[int, str] = {}
        for i, scan in enumerate(scans(backend, entries, backend.root, host)):
            if scan.fault:
                self._faults[i] = scan.fault
            else:
                self._rows[i] = tuple(bytes.fromhex(scan.sha256)), (scan.width, scan.height)

    def mask_of(self, sample: Sample, picture: int) -> tuple[Sample | None, str]:
        """The mask of a sample, which is so many-th of the part's pictures, or why it has none."""
        number = int(self._numbers[picture])
        if number < 0:
            return None, f"it has no mask of its name in {self.name!r}"
        name = self._entries[number].name
        if number in self._faults:
            return None, f"its mask {name}: {self._faults[number]}"
        digest, size = self._rows[number]["sha256"].tobytes().hex(), tuple(self._rows[number]["size"].tolist())
        if not is_same_shape(size, sample.size):
            shapes = (
                f"{size[0]} x {size[1]} pixels, another shape than the picture's {sample.size[0]} x {sample.size[1]}"
            )
            return None, f"its mask {name} has {shapes}"
        path = self.backend.path(name)
        return Sample(sample.key, sample.name, path, digest, (name,), size, sample.placement, sample.part), ""


class MaskWriter:
    """Takes masks one by one; `finish` gives them all, None where there is none."""

    def __init__(self) -> None:
        self._writer, self._backends, self._found = TableWriter(), list[FolderBackend | None](), False

    def begin(self, folder: MaskFolder | None) -> None:
        """The next part, with its masks."""
        self._backends.append(folder.backend if folder else None)

    def append(self, mask: Sample) -> None:
        self._writer.append(mask)
        self._found = True

    def finish(self) -> Masks | None:
        if not self._found:
            return None
        samples = self._writer.finish(lambda part, name: name)
        return Masks(samples, Numbers(mask.key for mask in samples), tuple(self._backends))


def open_masks(config: DatasetConfig, part: int, pictures: Sequence[Entry], host: Host) -> MaskFolder | None:
    """Read a part's masks; None where it has none.

    Raises:
        UserError: they would be trained on as pictures, there are none, two have one name, or none has a picture's.
    """
    root = config.mask_roots[part] if config.mask_roots else ""
    if not root:
        return None
    name, folder = config.parts[part].masks, config.parts[part].folder
    for settings, other in zip(config.parts, config.roots, strict=True):
        if Path(root).resolve().is_relative_to(Path(other).resolve()):
            told = f"{name!r} lies in the folder of pictures {settings.folder!r}, so that masks would be trained on; move it out of there"
            raise UserError([Problem(FIELD, told)])
    backend = FolderBackend(Path(root))
    entries = backend.entries()
    if not len(entries):
        raise UserError(
            [
                Problem(
                    FIELD,
                    f"no images in {name!r} or its subfolders; put masks there, each with the name of its picture",
                )
            ]
        )
    stems = _stems(entries)
    firsts = first_of_each(stems)
    if len(firsts) < len(entries):
        twin = entries[int(np.setdiff1d(np.arange(len(entries)), firsts)[0])].name
        raise UserError(
            [Problem(FIELD, f"{name!r} has two masks of the name {stem(twin)}, one of them {twin}; keep one")]
        )
    own = DigestTable(stems, np.arange(len(stems), dtype=np.int32))
    places = own.find(_stems(pictures))
    numbers = np.where(places >= 0, own.values[places], np.int32(-1))
    if len(pictures) and numbers.max() < 0:
        picture = pictures[0].name
        told = f"none of the {len(entries)} images in {name!r} has the name of a picture in {folder!r}; the mask of {picture} is {stem(picture)}.png, say"
        raise UserError([Problem(FIELD, told)])
    return MaskFolder(name, backend, entries, numbers, host)


def is_same_shape(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Whether both are one (width, height) at two scales, each edge rounded up or down."""
    (width, height), (across, down) = mask, picture
    return (width - 1) * down < (height + 1) * across and (height - 1) * across < (width + 1) * down


def _stems(entries: Sequence[Entry]) -> np.ndarray:
    return digests(stem(entry.name) for entry in entries)
