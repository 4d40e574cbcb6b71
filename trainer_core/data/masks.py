"""Masks that weight the loss: each image may have one of the same name in a separate folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.dataset import DatasetConfig
from ..errors import Problem, UserError, quoted
from ..host import Host
from ..storage.atomic import sha256_text, sha256_texts
from ..storage.digest_table import DigestTable, Numbers, digests, first_of_each
from .sample_table import Sample, TableWriter
from .source.backend import Entry, printable_name, same_name, stem
from .source.decode import decode_mask
from .source.folder import MASK_LABEL, FolderBackend
from .source.scan import scans
from .tables.caption_row import Box

FIELD = "masks"
WHITE = 128  # the lowest gray that counts as white where a crop is placed
ROW = np.dtype([("sha256", "u1", 32), ("size", "<i4", 2)])  # result of a mask's scan


@dataclass(frozen=True)
class Masks:
    """The masks of the samples that have one.

    Attributes:
        samples: One per mask: key, part and placement of the image, bytes and size of the mask, and the mask's name as
            its only caption.
        numbers: Index of the mask by key of the image.
        backends: One per part; None if it has no masks.
    """

    samples: Sequence[Sample]
    numbers: Numbers
    backends: tuple[FolderBackend | None, ...]

    def of(self, sample: Sample) -> Sample | None:
        """Return the mask of a sample; None if its part has no masks."""
        number = self.numbers.of(sample.key)
        return None if number is None else self.samples[number]

    def read(self, mask: Sample) -> bytes:
        """Return the bytes of a mask's file."""
        backend = self.backends[mask.part]
        assert backend, mask.key
        return backend.read(mask.captions[0])

    def digest(self, images: str) -> str:
        """Return the digest of the images, given as their own digest, and of the masks."""
        return sha256_text(images, sha256_texts(f"{mask.key} {mask.sha256}" for mask in self.samples))


class MaskFolder:
    """The masks of one part, each scanned once.

    Args:
        name: The folder as the user wrote it, for messages.
        backend: Source of the masks.
        entries: The masks.
        numbers: For each image of the part, in the order of its folder, the index of its mask in `entries`, or -1.
        host: Receives progress.
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

    def mask_of(self, sample: Sample, image_index: int) -> tuple[Sample | None, str]:
        """Return the mask of a sample, or None and the reason why it has none.

        Args:
            sample: The sample.
            image_index: Index of its image in the part's folder.
        """
        number = int(self._numbers[image_index])
        if number < 0:
            return None, f"it has no mask with the same name in {quoted(self.name)}"
        name = self._entries[number].name
        shown = printable_name(name)
        if number in self._faults:
            return None, f"its mask {shown}: {self._faults[number]}"
        digest, size = self._rows[number]["sha256"].tobytes().hex(), tuple(self._rows[number]["size"].tolist())
        if not is_same_shape(size, sample.size):
            shapes = (
                f"{size[0]} x {size[1]} pixels, which is not the aspect ratio of its image, "
                f"{sample.size[0]} x {sample.size[1]}"
            )
            return None, f"its mask {shown} has {shapes}"
        path = self.backend.path(name)
        return Sample(sample.key, sample.name, path, digest, (name,), size, sample.placement, sample.part), ""

    def white_box(self, mask: Sample, size: tuple[int, int]) -> Box:
        """Return the box around a mask's white area, or around all that is not black if nothing is white.

        Args:
            mask: The mask.
            size: (width, height) of its image, in whose pixels the box is.
        Raises:
            OSError, BrokenImage: The mask can't be read.
        """
        image = decode_mask(self.backend.read(mask.captions[0]))
        box = image.point([0] * WHITE + [255] * (256 - WHITE)).getbbox() or image.getbbox()
        left, top, right, bottom = box or (0, 0, *image.size)
        across, down = size[0] / image.width, size[1] / image.height
        return left * across, top * down, right * across, bottom * down


class MaskWriter:
    """Collect masks one by one; `finish` returns them all, or None if there are none."""

    def __init__(self) -> None:
        self._writer, self._backends, self._has_masks = TableWriter(), list[FolderBackend | None](), False

    def begin(self, folder: MaskFolder | None) -> None:
        """Start the next part, with its masks."""
        self._backends.append(folder.backend if folder else None)

    def append(self, mask: Sample) -> None:
        self._writer.append(mask)
        self._has_masks = True

    def finish(self) -> Masks | None:
        if not self._has_masks:
            return None
        samples = self._writer.finish(lambda part, name: name)
        return Masks(samples, Numbers(mask.key for mask in samples), tuple(self._backends))


def open_masks(config: DatasetConfig, part: int, images: Sequence[Entry], host: Host) -> MaskFolder | None:
    """Read a part's masks; None if it has none.

    Raises:
        UserError: The masks would be trained on as images, there are none, two have the same name, or none of them has
            the name of an image.
    """
    root = config.mask_roots[part] if config.mask_roots else ""
    if not root:
        return None
    name, folder = config.parts[part].masks, config.parts[part].folder
    is_beside = Path(root).resolve() == Path(config.roots[part]).resolve()  # a-masklabel.png beside a.jpg
    backend = FolderBackend(Path(root), only_masks=is_beside)
    entries = backend.entries()
    for settings, other in zip(config.parts, config.roots, strict=True):
        if Path(root).resolve().is_relative_to(Path(other).resolve()) and not (is_beside and len(entries)):
            message = (
                f"{quoted(name)} is inside the image folder {quoted(settings.folder)}, so masks would be trained on as images; "
                "move it somewhere else, or name the masks like OneTrainer's, a-masklabel.png beside a.jpg, and set "
                "masks to the image folder itself"
            )
            raise UserError([Problem(FIELD, message)])
    if not len(entries):
        raise UserError(
            [
                Problem(
                    FIELD,
                    f"no images in {quoted(name)} or its subfolders; put masks there, each with the name of its image",
                )
            ]
        )
    stems = _stems(entries)
    firsts = first_of_each(stems)
    if len(firsts) < len(entries):
        duplicate = printable_name(entries[int(np.setdiff1d(np.arange(len(entries)), firsts)[0])].name)
        raise UserError(
            [
                Problem(
                    FIELD, f"{quoted(name)} has two masks named {_stem(duplicate)}, one of them {duplicate}; remove one"
                )
            ]
        )
    table = DigestTable(stems, np.arange(len(stems), dtype=np.int32))
    rows = table.find(_stems(images))
    numbers = np.where(rows >= 0, table.values[rows], np.int32(-1))
    if len(images) and numbers.max() < 0:
        image = printable_name(images[0].name)
        message = (
            f"none of the {len(entries)} masks in {quoted(name)} has the name of an image in {quoted(folder)}; name the mask of "
            f"{image}, for example, {stem(image)}.png"
        )
        raise UserError([Problem(FIELD, message)])
    return MaskFolder(name, backend, entries, numbers, host)


def is_same_shape(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Return whether both (width, height) are the same image at two scales, with each edge rounded up or down."""
    (width, height), (across, down) = mask, image
    return (width - 1) * down < (height + 1) * across and (height - 1) * across < (width + 1) * down


def _stems(entries: Sequence[Entry]) -> np.ndarray:
    return digests(_stem(entry.name) for entry in entries)


def _stem(name: str) -> str:
    return same_name(MASK_LABEL.sub("", stem(name)))
