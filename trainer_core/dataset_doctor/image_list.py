"""List the images of a dataset with what is known of them before their pixels are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.dataset import DatasetConfig, FolderConfig
from ..data.buckets import Placement, place, target_edge
from ..data.captions import final_captions
from ..data.places.open_source import open_source
from ..data.source.backend import Backend, printable_name
from ..data.source.scan import Scan, scans
from ..data.tables.caption_source import CaptionSource, NoCaption
from ..errors import Problem, UserError, quoted
from ..host import Host, collect


@dataclass(frozen=True)
class ListedImage:
    """An image of the dataset.

    Attributes:
        number: From 1; reports and the sheet use it.
        part: Index of its folder.
        name: Its name in the folder.
        path: Where it is, for messages.
        sha256: Digest of its bytes; "" if it can't be read.
        size: (width, height) in pixels.
        placement: How it is resized and cropped; None if it can't be read.
        captions: As they are written; () if there are none.
        trained: As they are trained, in the written order of their tags.
        fault: Why it can't be read; "" if it can.
        caption_fault: Why it has no captions; "" if it has.
    """

    number: int
    part: int
    name: str
    path: str
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    placement: Placement | None = None
    captions: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    fault: str = ""
    caption_fault: str = ""

    @property
    def label(self) -> str:
        """Number and printable name."""
        return f"#{self.number} {printable_name(self.name)}"

    @property
    def enlargement(self) -> float:
        """Factor by which it is enlarged to fill its bucket; below 1 if it is made smaller."""
        if self.placement is None:
            return 1.0
        return max(new / old for new, old in zip(self.placement.resize, self.size, strict=True))


@dataclass(frozen=True)
class ImageList:
    """The images of a dataset, and where they come from.

    Attributes:
        images: Each image once, in the order of the folders.
        parts: Settings of the folders, by index of the part.
        backends: Source of each folder.
        num_repeated: Folders that are left out because they are the folder of another part at a higher resolution.
    """

    images: tuple[ListedImage, ...]
    parts: Mapping[int, FolderConfig]
    backends: Mapping[int, Backend]
    num_repeated: int

    def read(self, image: ListedImage) -> bytes:
        """Return the bytes of an image."""
        return self.backends[image.part].read(image.name)


def list_images(config: DatasetConfig, host: Host, seed: int = 0) -> ImageList:
    """List every image of a dataset. A folder that is trained at several resolutions is taken once, at the highest.

    Args:
        config: The dataset.
        host: Receives progress; its cache folder holds the results of earlier scans.
        seed: Of random crops.
    Raises:
        UserError: A table can't be used, or there are no images.
    """
    parts = _largest_parts(config)
    problems: list[Problem] = []
    images: list[ListedImage] = []
    backends: dict[int, Backend] = {}
    for part in parts:
        backend = open_source(config.roots[part], host)
        backends[part] = backend
        collect(problems, lambda p=part, b=backend: images.extend(_of_part(config, p, b, host, seed, len(images))))
    if problems:
        raise UserError(problems)
    if not images:
        names = ", ".join(config.parts[part].folder for part in parts)
        raise UserError.at("folder", f"{quoted(names)} has no images that can be read")
    chosen = {part: config.parts[part] for part in parts}
    return ImageList(tuple(images), chosen, backends, len(config.parts) - len(parts))


def _largest_parts(config: DatasetConfig) -> list[int]:
    """Return the index of the part with the highest resolution of each folder, in order."""
    best: dict[str, int] = {}
    for part, root in enumerate(config.roots):
        if root not in best or target_edge(config.parts[part]) > target_edge(config.parts[best[root]]):
            best[root] = part
    return sorted(best.values())


def _of_part(
    config: DatasetConfig, part: int, backend: Backend, host: Host, seed: int, first: int
) -> Iterator[ListedImage]:
    settings = replace(config.parts[part], tag_orders=0, tag_dropout=0.0, kept_tags=0)
    entries = backend.entries()
    source = CaptionSource.open(config, part, backend, entries)
    number = first
    for position, (entry, scan) in enumerate(
        zip(entries, scans(backend, entries, config.roots[part], host), strict=True)
    ):
        number += 1
        written, fault = _captions_of(source, position, entry.name)
        trained = final_captions(written, settings)
        image = ListedImage(number, part, entry.name, backend.path(entry.name), captions=written, trained=trained)
        yield _with_scan(replace(image, caption_fault=fault), scan, settings, seed)
    for location, reason in sorted(backend.left_out.unreadable):
        number += 1
        yield ListedImage(number, part, Path(location).name, location, fault=reason)


def _with_scan(image: ListedImage, scan: Scan, settings: FolderConfig, seed: int) -> ListedImage:
    if scan.fault:
        return replace(image, fault=scan.fault)
    placement = place(scan.width, scan.height, settings, seed, f"{image.part}/{image.name}")
    return replace(image, sha256=scan.sha256, size=(scan.width, scan.height), placement=placement)


def _captions_of(source: CaptionSource, position: int, name: str) -> tuple[tuple[str, ...], str]:
    try:
        return source.row(position, name).captions, ""
    except NoCaption as error:
        return (), str(error)
