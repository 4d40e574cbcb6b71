"""Look into a folder of images: how many can be used, their sizes, and their captions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from ..config.dataset import FolderConfig
from ..data.captions import COUNTER, written_captions
from ..data.skipped_images import find_other_captions
from ..data.source.folder import FolderBackend, no_images
from ..data.source.formats import readable_suffixes
from ..data.source.scan import scans
from ..data.source.text_encoding import UnreadableText
from ..errors import UserError, nearest, printable, quoted
from ..host import ASSETS, Paths, SinkHost, expand_home, extra_roots
from ..storage.bounded_files import path_fault

DEMO = "neon-emoji"  # the images that come with the pack
OPTION = "--images"
MAX_FOLDERS = 400  # entries of a datasets folder that are looked at for the suggestions
NOT_DATASETS = {"output", "demo-output", "models", "temp", "site", "docs"}
CAMERA = re.compile(
    r"(img|dsc[nf]?|pxl|image|screenshot|photo|download|untitled|comfyui|tmp|[0-9a-f]{8,})?[\W\d_]*\Z", re.IGNORECASE
)
LONGEST_TAG = 40


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images.

    Args:
        name: its name in the workflow.
        root: its absolute path.
        outside: its parent folder if it is in no datasets folder, so that --datasets must name it; else None.
        sizes: (width, height) of the images that can be used.
        unusable: (location, reason) of images that can't be read.
        num_captioned: images with a caption file that has a caption.
        common_tag: what all captions begin with, up to the first comma; "" if they differ.
        has_telling_names: whether most names describe the image, as far as can be told.
        other_captions: how to use captions that lie there in another form, if no image has a caption file; else "".
    """

    name: str
    root: Path
    outside: Path | None
    sizes: Sequence[tuple[int, int]]
    unusable: Sequence[tuple[str, str]] = ()
    num_captioned: int = 0
    common_tag: str = ""
    has_telling_names: bool = False
    other_captions: str = ""

    @property
    def num_images(self) -> int:
        return len(self.sizes)

    @property
    def edge(self) -> float:
        """The median of the edges of squares with the images' areas, in pixels."""
        return sorted((width * height) ** 0.5 for width, height in self.sizes)[self.num_images // 2]

    def text(self, with_example: bool = True) -> str:
        """Return what is in the folder, in one line.

        Args:
            with_example: name one of the images that can't be used, by its path.
        """
        small, large = (pick(self.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        sizes = f"{small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if large != small else "")
        without = self.num_images - self.num_captioned
        captions = f"{without} without a caption" if self.num_captioned else "no captions"
        captions += f" ({self.other_captions})" if self.other_captions else ""
        left = f"; {len(self.unusable)} can't be used" if self.unusable else ""
        left += f", such as {': '.join(self.unusable[0])}" if self.unusable and with_example else ""
        images = f"{self.num_images} image" + ("s" if self.num_images > 1 else "")
        return f"{self.name}: {images}, {sizes} pixels, {captions if without else 'all with captions'}{left}"


def look_into(typed: str, host: SinkHost, keeps_scan: bool = False) -> ImageFolder:
    """Return what is in a folder. Reads every image once.

    Args:
        typed: name or path of the folder.
        host: finds the folder.
        keeps_scan: whether the scan is written to the host's cache, as a training does; else nothing is written.
    Raises:
        UserError: there is no such folder, or no image in it can be used.
    """
    root = _find(typed, host.paths)
    name = name_of(root, host.paths)
    backend = FolderBackend(root)
    entries = backend.entries()
    if not len(entries):
        raise UserError.at(OPTION, no_images(typed, backend))
    with TemporaryDirectory(prefix="chroma-trainer-new-", ignore_cleanup_errors=True) as folder:
        unwritten = replace(host, paths=replace(host.paths, cache=Path(folder)))
        results = list(scans(backend, entries, str(root), host if keeps_scan else unwritten))
    unusable = [
        (backend.path(entry.name), scan.fault) for entry, scan in zip(entries, results, strict=True) if scan.fault
    ]
    usable = [(entry.name, scan) for entry, scan in zip(entries, results, strict=True) if not scan.fault]
    if not usable:
        place, reason = unusable[0]
        raise UserError.at(
            OPTION, f"none of {len(unusable)} images in {quoted(typed)} can be used, such as {place}: {reason}"
        )
    captions = [_captions(backend, name) for name, _ in usable]
    others = "" if any(captions) else find_other_captions(backend.path(usable[0][0]))
    return ImageFolder(
        name=name or root.name,
        root=root,
        outside=None if name else root.parent,
        sizes=[(scan.width, scan.height) for _, scan in usable],
        unusable=[*unusable, *backend.left_out.unreadable],
        num_captioned=sum(bool(texts) for texts in captions),
        common_tag=_common_tag(captions),
        has_telling_names=2 * sum(_is_telling(name) for name, _ in usable) > len(usable),
        other_captions=others and f"{others}, in Dataset Backend of the workflow",
    )


def _find(typed: str, paths: Paths) -> Path:
    """Return the path of a folder, which may also lie outside the datasets folders.

    Raises:
        UserError: there is no such folder.
    """
    text = expand_home(typed.strip().strip('"'))
    try:
        return paths.find_dataset(text, OPTION)
    except UserError:
        if path_fault(text):
            raise
        if not os.path.isdir(text):
            hint = nearest(text, [name for name, _ in suggest_folders(paths)])
            message = f"{typed[:80]!r} is not a folder here{hint or '; write the path of a folder of images'}"
            raise UserError.at(OPTION, message) from None
        return Path(text).resolve()


def name_of(root: Path, paths: Paths) -> str:
    """Return the shortest name with which a workflow finds the folder; "" if it lies in no datasets folder."""
    roots = [base.resolve() for base in (*paths.datasets, ASSETS, *extra_roots())]
    names = [root.relative_to(base).as_posix() for base in roots if root.is_relative_to(base)]
    fitting = [name for name in names if name != "." and paths.find_dataset(name, OPTION) == root]
    return min(fitting, key=len, default="")


def _captions(backend: FolderBackend, name: str) -> tuple[str, ...]:
    try:
        return written_captions(name, backend.caption_text(name)[0], FolderConfig())
    except (OSError, UnreadableText):
        return ()


def _common_tag(captions: Iterable[Sequence[str]]) -> str:
    """Return what all captions begin with, up to the first comma, if they say more than that."""
    texts = [text for written in captions for text in written]
    tags = Counter(text.partition(",")[0].strip() for text in texts)
    if len(texts) < 2 or len(tags) != 1 or not all("," in text for text in texts):
        return ""
    (tag,) = tags
    return tag if len(tag) <= LONGEST_TAG and printable(tag) == tag else ""


def _is_telling(name: str) -> bool:
    """Return whether a file name seems to describe its image: it is not a counter, a hash, or named by a camera."""
    text = COUNTER.sub("", PurePosixPath(name).stem)
    return not CAMERA.match(text) and sum(letter.isalpha() for letter in text) > 2


def suggest_folders(paths: Paths) -> list[tuple[str, int]]:
    """Return the folders of images in the datasets folders, as (name, number of images), the largest first.

    Only their own files are counted, not those of their subfolders.
    """
    suffixes, counts = readable_suffixes(), {}
    for root in dict.fromkeys(base.resolve() for base in paths.datasets if base.is_dir()):
        folders = [path for path in list(_folders(root))[:MAX_FOLDERS] if path.name.lower() not in NOT_DATASETS]
        for folder in folders:
            count = sum(os.path.splitext(name)[1].lower() in suffixes for name in _names(folder))
            name = name_of(folder, paths) if count else ""
            if name:
                counts[name] = count
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _folders(root: Path) -> Iterable[Path]:
    return sorted(root / name for name in _names(root) if not name.startswith(".") and os.path.isdir(root / name))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
