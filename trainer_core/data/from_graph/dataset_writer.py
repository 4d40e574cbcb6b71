"""Write images of a graph as a dataset: PNG files named by their pixels, captions and masks beside them.

The same images give the same names, so that a second run writes nothing and trains the same bytes, in whatever order
the graph gives them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import Problem, UserError, reason_of
from ...host import Host, Notice, Paths
from ...storage.atomic import remove_temporaries, sha256_of, write_atomic
from ..source.folder import FolderBackend
from .graph_values import (
    GraphImage,
    caption_fault,
    caption_lines,
    group_faults,
    join,
    list_captions,
    list_images,
    shape_fault,
    spread,
)
from .own_files import EARLIER, LIST, MASK_END, UNFINISHED, OwnFile, OwnFiles, stem_of

NAME_DIGITS = 24  # of the hash, in a file's name
NUM_SHOWN = 3  # names in a message
TEMPORARY_SECONDS = 3600.0


@dataclass(frozen=True)
class Item:
    """An image as it is written.

    Attributes:
        image: The image.
        digest: Hash of its pixels.
        captions: Lines of its caption file; () for none.
        mask: Its mask, or None.
    """

    image: GraphImage
    digest: str
    captions: tuple[str, ...] = ()
    mask: GraphImage | None = None


@dataclass(frozen=True)
class PlannedFile:
    """A file of the dataset: the hash of what is in it, and how its bytes are made."""

    content: str
    encode: Callable[[], bytes]


def read_items(images: Any, captions: Any, masks: Any, host: Host) -> list[Item]:
    """Return the images with their captions and masks, equal images as one.

    Raises:
        UserError: Every fault, with the index of its image.
    """
    problems: list[Problem] = []
    pictures = list_images(images, "images", problems)
    if not pictures and not problems:
        problems.append(Problem("images", "there are none; the connected node gave an empty list"))
    problems += group_faults("images", "image", pictures, _cancellable(GraphImage.fault, host))
    texts, mask_list = list_captions(captions), _list_masks(masks, problems, host)
    problems += group_faults("captions", "caption", texts, caption_fault)
    each_text = list(spread("captions", "captions", texts, len(pictures), problems))
    each_mask = list(spread("masks", "masks", mask_list, len(pictures), problems))
    pairs = [pair for pair in zip(pictures, each_mask, strict=True) if pair[1]] if not problems else []
    problems += group_faults("masks", "mask", pairs, lambda pair: shape_fault(*pair))
    if problems:
        raise UserError(problems)
    digest = _cancellable(lambda image: image.digest, host)
    items = [
        Item(image, digest(image), caption_lines(text or ""), mask)
        for image, text, mask in zip(pictures, each_text, each_mask, strict=True)
    ]
    _warn_of_empty(items, host)
    return _merge_equal(items, host)


def _list_masks(masks: Any, problems: list[Problem], host: Host) -> list[GraphImage]:
    mask_list = list_images(masks, "masks", problems, is_mask=True) if masks is not None else []
    problems += group_faults("masks", "mask", mask_list, _cancellable(GraphImage.fault, host))
    return mask_list


def _cancellable(call: Callable[[GraphImage], str], host: Host) -> Callable[[GraphImage], str]:
    def run(image: GraphImage) -> str:
        host.check_cancelled()
        return call(image)

    return run


def _warn_of_empty(items: Sequence[Item], host: Host) -> None:
    """Report captions that are missing for some images: a captioner has failed. None at all may be meant."""
    numbers = [number for number, item in enumerate(items, 1) if not item.captions]
    if 0 < len(numbers) < len(items):
        text = (
            f"captions {join(numbers)} of {len(items)} are empty: on_broken of DatasetBackend decides about their "
            "images"
        )
        host.emit(Notice(text, "warning"))


def _merge_equal(items: Sequence[Item], host: Host) -> list[Item]:
    """Return one item for images with equal pixels, with the captions of all.

    Raises:
        UserError: Equal images have different masks.
    """
    unique: dict[str, tuple[int, Item]] = {}
    for number, item in enumerate(items, 1):
        first, earlier = unique.setdefault(item.digest, (number, item))
        if _mask_content(earlier) != _mask_content(item):
            raise UserError.at(
                "masks", f"images {first} and {number} are equal, but their masks are not; leave one out"
            )
        unique[item.digest] = first, replace(earlier, captions=tuple(dict.fromkeys(earlier.captions + item.captions)))
    if len(unique) < len(items):
        copies = len(items) - len(unique)
        host.emit(
            Notice(f"copies of other images: {copies} of {len(items)}; each image is written once, with all captions")
        )
    return [item for _, item in unique.values()]


def _mask_content(item: Item) -> str:
    return item.mask.digest if item.mask else ""


def planned_files(items: Sequence[Item]) -> dict[str, PlannedFile]:
    """Return the files of a dataset by name. Captions and masks come before the image that they belong to."""
    files: dict[str, PlannedFile] = {}
    for item in items:
        stem = item.digest[:NAME_DIGITS]
        if item.captions:
            raw = "".join(f"{line}\n" for line in item.captions).encode()
            files[f"{stem}.txt"] = PlannedFile(hashlib.sha256(raw).hexdigest(), lambda raw=raw: raw)
        if item.mask:
            files[stem + MASK_END] = PlannedFile(_mask_content(item), item.mask.png)
        files[f"{stem}.png"] = PlannedFile(item.digest, item.image.png)
    return files


def save_dataset(name: str, items: Sequence[Item], host: Host) -> OwnFiles:
    """Write a dataset, set aside what it wrote earlier and is no longer made, and return what is there.

    Args:
        name: Name of the folder in the folder of datasets.
        items: The images.
        host: Environment.
    Raises:
        UserError: The folder can't be written, or is outside the folder of datasets.
    """
    folder = _target(name, host.paths)
    own, files = OwnFiles.read(folder, "name"), planned_files(items)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder, TEMPORARY_SECONDS)
        result, num_written, edited = _write(own, files, host)
        num_removed = _remove(own, files, edited)
        if not own.exists or (own.files, own.is_complete) != (result.files, True):
            result.write()
    except OSError as error:
        raise UserError.at("name", f"{folder} can't be written: {reason_of(error)}") from error
    _report(result, num_written, num_removed, edited, host)
    return result


def _target(name: str, paths: Paths) -> Path:
    root = paths.new_datasets
    assert root, "a host without a folder for datasets"
    folder = (root / name).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise UserError.at("name", f"{name!r} leads out of the datasets folder ({root}) by a link; enter another name")
    return folder


def _write(own: OwnFiles, files: dict[str, PlannedFile], host: Host) -> tuple[OwnFiles, int, list[str]]:
    """Write the files that are missing or have other content.

    Returns:
        The new list, the number of files that were written, and the names of those that were edited and stay.
    """
    entries: dict[str, OwnFile] = {}
    missing: list[str] = []
    edited: list[str] = []
    for name, planned in files.items():
        host.check_cancelled()
        entry = own.files.get(name)
        if not (own.folder / name).exists():
            missing.append(name)
        elif adopted := _adopt(own, name, planned):
            entries[name] = adopted
        elif own.is_edited(name):
            edited.append(name)
            entries |= {name: entry} if entry else {}
        else:
            missing.append(name)
    if missing:  # after a crash, these are known as the node's own
        begun = {name: OwnFile(files[name].content, UNFINISHED) for name in missing}
        replace(own, files={**own.files, **entries, **begun}, is_complete=False).write()
    for name in missing:
        host.check_cancelled()
        raw = files[name].encode()
        entries[name] = OwnFile(files[name].content, hashlib.sha256(raw).hexdigest())
        write_atomic(own.folder / name, raw)
    return OwnFiles(own.folder, entries, True, True), len(missing), edited


def _adopt(own: OwnFiles, name: str, planned: PlannedFile) -> OwnFile | None:
    """Return the entry of a file that already has the content: the node wrote it, maybe before its list was lost."""
    entry = own.files.get(name)
    if entry and entry.sha256 != UNFINISHED:
        return entry if entry.content == planned.content and not own.is_edited(name) else None
    raw = planned.encode()
    written = OwnFile(planned.content, hashlib.sha256(raw).hexdigest())
    return written if sha256_of(own.folder / name) == written.sha256 else None


def _remove(own: OwnFiles, files: Collection[str], edited: list[str]) -> int:
    """Set aside what the node wrote and no longer makes. Return the number of images.

    Captions and masks go with their image, or stay with one that was edited. What stays is the user's from now on.
    """
    stale = [name for name in own.files if name not in files and (own.folder / name).is_file()]
    is_edited = {stem_of(name): own.is_edited(name) for name in own.images() if name in stale}
    for name in stale:
        stem = stem_of(name)
        if is_edited[stem] if stem in is_edited else own.is_edited(name):
            edited.append(name)
        else:
            own.set_aside(name)
    return sum(not edited for edited in is_edited.values())


def _report(own: OwnFiles, num_written: int, num_removed: int, edited: Sequence[str], host: Host) -> None:
    name, count = own.folder.name, len(own.images())
    host.emit(Notice(f"dataset {name!r}: {_images(count)}, {num_written} files written, in {own.folder}"))
    if num_removed:
        text = f"dataset {name!r}: {_images(num_removed)} of earlier runs moved to its folder {EARLIER}, not trained"
        host.emit(Notice(text))
    if edited:
        shown = f"{', '.join(edited[:NUM_SHOWN])}{' ...' if len(edited) > NUM_SHOWN else ''}"
        text = (
            f"dataset {name!r}: edited files stay as they are: {len(edited)} ({shown}); delete them to have them "
            "written again"
        )
        host.emit(Notice(text, "warning"))
    others = FolderBackend(own.folder).entries()
    num_others = len({entry.name for entry in others} - set(own.images()))
    if num_others:
        text = f"dataset {name!r} also holds {_images(num_others)} that SaveDataset did not write; they are trained too"
        host.emit(Notice(text, "warning"))


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def find_saved(name: str, paths: Paths) -> OwnFiles:
    """Return a dataset that the node wrote in ComfyUI.

    Raises:
        UserError: There is none of this name, or it is not complete.
    """
    roots = paths.datasets
    folder = next((root / name for root in roots if (root / name / LIST).is_file()), None)
    if folder is None:
        searched = ", ".join(map(str, roots)) or "none is set"
        text = (
            f"{name!r} is made by nodes that only run in ComfyUI, and has not been written to a datasets folder "
            f"({searched}); run the workflow in ComfyUI once, or copy the dataset there with its hidden files, or set "
            "--datasets to the folder that contains it"
        )
        raise UserError.at("name", text)
    own = OwnFiles.read(paths.find_dataset(str(folder.absolute()), "name"), "name")
    if not own.is_complete:
        raise UserError.at(
            "name", f"{folder} is not complete, because its last run was ended; run the workflow in ComfyUI again"
        )
    return own


def report_saved(own: OwnFiles, host: Host) -> None:
    """Log what a headless run takes, and what of it is missing."""
    host.emit(
        Notice(f"dataset {own.folder.name!r}: {_images(len(own.images()))}, as ComfyUI wrote them to {own.folder}")
    )
    missing = [name for name in own.files if not (own.folder / name).is_file()]
    if missing:
        text = f"dataset {own.folder.name!r}: files that are not there any more: {len(missing)}, such as {missing[0]}"
        host.emit(Notice(text, "warning"))
