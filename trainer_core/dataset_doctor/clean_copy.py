"""What the doctor writes of a dataset: a copy without some images, and a table of captions to edit. The dataset stays."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from ..data.source.backend import stem
from ..data.source.folder import CONDITION_LABEL, MASK_LABEL, FolderBackend
from ..errors import Problem, UserError, quoted
from ..host import Host, PhaseProgress, PhaseStarted
from ..storage.atomic import TEMPORARY, rename, write_atomic
from ..storage.lora_name import free_path
from .findings import LEAVES_OUT, Case, DatasetReport
from .image_list import ImageList, ListedImage

PHASE = "copying the images"
END = "-clean"
IN_NO_FILE = ("filename", "instance prompt")  # captions that are in no file
BESIDE = (".txt", ".json")  # ends of the files that belong to an image
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def to_leave_out(report: DatasetReport, kinds: Collection[str] = LEAVES_OUT) -> set[int]:
    """Return the numbers of the images that findings of these kinds name; of copies all but the first.

    Raises:
        UserError: There is no finding of a kind.
    """
    known = {finding.kind for finding in report.findings}
    unknown = [kind for kind in kinds if kind not in known | set(LEAVES_OUT)]
    if unknown:
        text = f"{unknown[0]!r} is no finding of this dataset; it has {', '.join(sorted(known)) or 'none'}"
        raise UserError.at("--leave-out", text)
    cases = (case for finding in report.findings if finding.kind in kinds for case in _without_first(finding.cases))
    return {case.number for case in cases}


def _without_first(cases: Collection[Case]) -> Iterator[Case]:
    """Yield the cases, of each group all but the first."""
    groups: set[int] = set()
    for case in cases:
        if not case.group or case.group in groups:
            yield case
        groups.add(case.group)


def free_folder(parent: Path, name: str) -> Path:
    """Return the path of a new folder for the copy of a dataset, named after it."""
    last = PurePosixPath(name.replace("\\", "/").rstrip("/")).stem
    return free_path(parent / f"{last or 'dataset'}{END}")


def write_copy(images: ImageList, left_out: Collection[int], target: Path, host: Host) -> int:
    """Copy the images that can be read, but for some, with their captions and masks. Return their number.

    Images keep their names. Files beside an image that belong to it and the tables in the folder are copied as they are. Of
    archives and stores, captions become text files.

    Args:
        images: The images, of one folder.
        left_out: Numbers of the images that are not copied.
        target: A folder that does not exist, or is empty. It has all images, or is not made.
        host: Receives progress, and can cancel.
    Raises:
        UserError: The target can't be used, or the dataset has several folders.
        OSError: It can't be written.
    """
    chosen = [image for image in images.images if image.number not in left_out and not image.fault]
    _refuse(images, chosen, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True) as temporary:
        staging = Path(temporary) / target.name
        staging.mkdir()
        host.emit(PhaseStarted(PHASE, len(chosen), "images"))
        labels: dict[Path, dict[str, list[str]]] = {}
        for done, image in enumerate(chosen, 1):
            host.check_cancelled()
            _copy_image(images, image, staging, labels)
            host.emit(PhaseProgress(PHASE, done, len(chosen)))
        _copy_tables(images, staging)
        if target.exists():
            target.rmdir()  # it is empty
        rename(staging, target)
    return len(chosen)


def _refuse(images: ImageList, chosen: Collection[ListedImage], target: Path) -> None:
    problems = []
    if len(images.parts) > 1:
        text = f"is made of one folder, and this dataset has {len(images.parts)}; examine each by itself"
        problems.append(Problem("copy", text))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        problems.append(Problem("copy", f"{quoted(target)} exists already; use a new folder"))
    if not chosen:
        problems.append(Problem("copy", "would have no images; leave fewer out"))
    roots = (Path(backend.root) for backend in images.backends.values() if isinstance(backend, FolderBackend))
    if any(target.resolve().is_relative_to(root.resolve()) for root in roots):
        problems.append(Problem("copy", f"{quoted(target)} is inside of the dataset, which would train it too"))
    outside = [image.label for image in chosen if not _is_inside(target, image.name)]
    if outside:
        others = f" and {len(outside) - 1} others lead" if len(outside) > 1 else " leads"
        text = f"{outside[0]}{others} out of the folder of the copy; rename it in the archive or store, or leave it out"
        problems.append(Problem("copy", text))
    if problems:
        raise UserError(problems)


def _is_inside(target: Path, name: str) -> bool:
    """Return whether a name is that of a file below a folder. Names in archives and stores may have .. or be absolute."""
    folder = os.path.abspath(target)
    return Path(os.path.abspath(os.path.join(folder, name))).is_relative_to(folder)


def _labels_in(folder: Path) -> dict[str, list[str]]:
    """Return the masks and conditioning images in a folder by the name of their image without its ending."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        base, ending = os.path.splitext(name)
        match = MASK_LABEL.search(base) or CONDITION_LABEL.search(base)
        if match and ending:
            found.setdefault(base[: match.start()], []).append(name)
    return found


def _copy_image(images: ImageList, image: ListedImage, target: Path, labels: dict[Path, dict[str, list[str]]]) -> None:
    """Copy an image and what belongs to it.

    Args:
        labels: See _labels_in, by folder; filled in, so that each folder is listed once.
    """
    path, backend = target / image.name, images.backends[image.part]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images.read(image))
    if isinstance(backend, FolderBackend):
        source = Path(backend.root) / image.name
        if source.parent not in labels:
            labels[source.parent] = _labels_in(source.parent)
        own = stem(source.name)
        for name in (*(own + end for end in BESIDE), *labels[source.parent].get(own, ())):
            if (source.parent / name).is_file():
                shutil.copyfile(source.parent / name, path.parent / name)
    elif image.captions and images.parts[image.part].captions not in IN_NO_FILE:
        Path(f"{stem(str(path))}.txt").write_text("\n".join(image.captions) + "\n", "utf-8", newline="\n")


def _copy_tables(images: ImageList, target: Path) -> None:
    """Copy the tables of a folder. Rows of images that are left out name no image, which a run counts."""
    for backend in images.backends.values():
        for file in Path(backend.root).iterdir() if isinstance(backend, FolderBackend) else ():
            if file.suffix.lower() in TABLES and file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def captions_table(report: DatasetReport, images: ImageList) -> str:
    """Return a line of JSON for each image that can be read: file_name, text, and the kinds of its findings.

    DatasetBackend reads it with captions "table", after they were edited.
    """
    kinds: dict[int, dict[str, None]] = {}
    for finding in report.findings:
        for case in finding.cases:
            kinds.setdefault(case.number, {})[finding.kind] = None
    rows = (
        {"file_name": image.name, "text": _caption_of(image), "findings": list(kinds.get(image.number, ()))}
        for image in images.images
        if not image.fault
    )
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _caption_of(image: ListedImage) -> str | list[str]:
    return list(image.captions) if len(image.captions) > 1 else "".join(image.captions)


def write_captions(report: DatasetReport, images: ImageList, path: Path) -> None:
    """Write the table of captions.

    Raises:
        OSError: It can't be written.
    """
    write_atomic(path, captions_table(report, images).encode("utf-8", "backslashreplace"))
