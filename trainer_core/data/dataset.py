"""The dataset as it will be trained: every image is used, or left out for a reason that is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.dataset import CAPTIONS, DatasetConfig, FolderConfig
from ..errors import Problem, UserError
from ..host import Host, Notice, collect
from ..registry import load
from ..storage.atomic import sha256_texts
from .buckets import place
from .captions import captions_of
from .masks import MaskFolder, Masks, MaskWriter, open_masks
from .sample_table import Sample, TableWriter, columns
from .source.backend import Backend, Entry
from .source.folder import SUFFIXES
from .source.scan import Scan, scans

BACKEND = "folder"
SHOWN = 5  # names in a notice; the report has all
MOST_PROBLEMS = 20  # in an error
NO_CAPTION = "its caption file"  # how the reasons begin that are about captions
LISTED = 10_000  # names in each list of the report; more are counted


@dataclass(frozen=True)
class Index:
    """The samples, and what became of every image.

    Args:
        digest: of all that is trained: bytes, captions, placements, repeats.
        report: JSON values: counts, buckets, and for each image that was not simply used the reason.
        masks: None where no part has any.
    """

    samples: Sequence[Sample]
    digest: str
    report: dict[str, Any]
    backends: tuple[Backend, ...]
    masks: Masks | None = None

    def read(self, sample: Sample) -> bytes:
        return self.backends[sample.part].read(sample.name)


class Unreadable(Exception):
    """Images that looked whole and can't be decoded: {key of the sample: reason}. Build the index again without them."""

    def __init__(self, faults: Mapping[str, str]):
        super().__init__(", ".join(faults))
        self.faults = dict(faults)


def build_index(config: DatasetConfig, host: Host, seed: int, unreadable: Mapping[str, str] | None = None) -> Index:
    """Read every image once (those that are as they were at the last run are not read again), and place it.

    Args:
        unreadable: what Unreadable told of images that are known not to decode.
    Raises:
        UserError: no image can be used; or, where on_broken is "stop", every image that can't.
    """
    writer, mask_writer = TableWriter(), MaskWriter()
    skipped: list[dict[str, str]] = []
    problems: list[Problem] = []
    backends = []
    num_found = num_skipped = num_unlisted = 0
    for part, (settings, root) in enumerate(zip(config.parts, config.roots, strict=True)):
        backend: Backend = load("backend", BACKEND)(Path(root))
        backends.append(backend)
        entries = backend.entries()
        num_found += len(entries)
        if not entries:
            problems.append(
                Problem(
                    "dataset",
                    f"no images in {settings.folder!r} or its subfolders; put files there that end in {' '.join(sorted(SUFFIXES))}",
                )
            )
        found = collect(problems, open_masks, config, part, entries, host)
        mask_folder = found if isinstance(found, MaskFolder) else None
        mask_writer.begin(mask_folder)
        for number, (entry, scan) in enumerate(zip(entries, scans(backend, entries, root, host), strict=True)):
            reason = (unreadable or {}).get(f"{part}/{entry.name}", "")
            sample, reason = (None, reason) if reason else _sample(part, settings, backend, entry, scan, seed)
            mask, reason = mask_folder.mask_of(sample, number) if sample and mask_folder else (None, reason)
            if sample and not reason:
                writer.append(sample)
                if mask:
                    mask_writer.append(mask)
                continue
            num_skipped += 1
            if num_skipped <= LISTED:
                skipped.append({"image": backend.path(entry.name), "reason": reason})
            is_error = settings.on_broken == "stop" and not reason.startswith("its shorter edge")
            if is_error and len(problems) >= LISTED:
                num_unlisted += 1
            elif is_error:
                problems.append(
                    Problem(settings.folder, f"{entry.name}: {reason}; mend or remove it, or set on_broken to skip")
                )
    samples = writer.finish(lambda part, name: backends[part].path(name))
    if num_found and not samples and not problems:
        reasons = "; ".join(f"{entry['image']}: {entry['reason']}" for entry in skipped[:SHOWN])
        more = f"; and {num_skipped - SHOWN} more" if num_skipped > SHOWN else ""
        problems.append(
            Problem("dataset", f"none of {num_found} images can be used: {reasons}{more}{_remedy(skipped)}")
        )
    if problems:
        raise UserError(_first(problems, num_unlisted))
    report = _report(samples, skipped, num_found, config) | {"num_skipped": num_skipped}
    masks = mask_writer.finish()
    if masks:
        report["masks"] = len(masks.samples)
    _tell(report, skipped, host)
    digest = _digest(samples, config)
    return Index(samples, masks.digest(digest) if masks else digest, report, tuple(backends), masks)


def _first(problems: list[Problem], num_unlisted: int) -> list[Problem]:
    """So many as fit on a screen: a folder whose captions lie elsewhere has as many faults as images."""
    if len(problems) <= MOST_PROBLEMS:
        return problems
    more = f"{len(problems) + num_unlisted - MOST_PROBLEMS} more images can't be used, for reasons of the same kind"
    return [*problems[:MOST_PROBLEMS], Problem("dataset", more)]


def _remedy(skipped: list[dict[str, str]]) -> str:
    if not any(entry["reason"].startswith(NO_CAPTION) for entry in skipped):
        return ""
    return f". Write a .txt beside each, or set captions to {' or '.join(map(repr, CAPTIONS[1:]))}"


def _sample(
    part: int, settings: FolderConfig, backend: Backend, entry: Entry, scan: Scan, seed: int
) -> tuple[Sample | None, str]:
    if scan.fault:
        return None, scan.fault
    if min(scan.width, scan.height) < settings.min_size:
        return None, f"its shorter edge has {min(scan.width, scan.height)} pixels, min_size is {settings.min_size}"
    try:
        text = backend.caption_text(entry.name)[0] if settings.captions == "textfile" else None
    except OSError as error:
        return None, f"{NO_CAPTION} can't be read ({error.strerror or error})"
    captions = captions_of(entry.name, text, settings, seed)
    if not captions:
        what = "is empty" if text is not None else "is missing"
        return None, f"{NO_CAPTION} {Path(entry.name).with_suffix('.txt').name} {what}"
    key = f"{part}/{entry.name}"
    placement = place(scan.width, scan.height, settings, seed, key)
    return Sample(
        key, entry.name, backend.path(entry.name), scan.sha256, captions, (scan.width, scan.height), placement, part
    ), ""


def _digest(samples: Sequence[Sample], config: DatasetConfig) -> str:
    return sha256_texts(
        f"{s.key} {s.sha256} {s.placement} {config.parts[s.part].repeats} {s.captions}" for s in samples
    )


def _report(
    samples: Sequence[Sample], skipped: list[dict[str, str]], num_found: int, config: DatasetConfig
) -> dict[str, Any]:
    rows = columns(samples)
    resized = (rows["resize"] != rows["size"]).any(axis=1)
    enlarged: Any = (rows["resize"] > rows["size"]).any(axis=1)
    twins: Any = _has_twin(rows["sha256"])
    sizes, counts = np.unique(rows["bucket"], axis=0, return_counts=True)
    buckets = {f"{width}x{height}": int(count) for (width, height), count in zip(sizes.tolist(), counts, strict=True)}
    return {
        "found": num_found,
        "used": len(samples),
        "skipped": skipped,
        "resized": int(resized.sum()),
        "enlarged": _paths(samples, enlarged),
        "num_enlarged": int(enlarged.sum()),
        "cropped": int((rows["bucket"] != rows["resize"]).any(axis=1).sum()),
        "duplicates": _paths(samples, twins),
        "num_duplicates": int(twins.sum()),
        "buckets": dict(sorted(buckets.items())),
        "triggers": sorted({part.trigger for part in config.parts if part.trigger}),
    }


def _paths(samples: Sequence[Sample], which: np.ndarray) -> list[str]:
    return [samples[int(i)].path for i in np.flatnonzero(which)[:LISTED]]


def _has_twin(digests: np.ndarray) -> np.ndarray:
    """Which of the digests, (rows, 32) bytes, are there more than once."""
    whole = np.ascontiguousarray(digests).view("V32").reshape(-1)
    _, number, counts = np.unique(whole, return_inverse=True, return_counts=True)
    return counts[number.reshape(-1)] > 1


def _tell(report: dict[str, Any], skipped: list[dict[str, str]], host: Host) -> None:
    buckets = ", ".join(f"{name}: {count}" for name, count in report["buckets"].items())
    host.emit(Notice(
        f"{report['used']} of {report['found']} images used ({report['resized']} resized, {report['cropped']} cropped); buckets {buckets}"
    ))  # fmt: skip
    if "masks" in report:
        host.emit(Notice(f"{report['masks']} of them are weighed by masks"))
    for entry in skipped[:SHOWN]:
        host.emit(Notice(f"skipped {entry['image']}: {entry['reason']}", "warning"))
    if report["num_skipped"] > SHOWN:
        where = "all" if report["num_skipped"] <= LISTED else f"the first {LISTED}"
        host.emit(Notice(f"and {report['num_skipped'] - SHOWN} more skipped; {where} are in the report", "warning"))
    if report["enlarged"]:
        host.emit(
            Notice(
                f"{report['num_enlarged']} images are smaller than their bucket and are enlarged; min_size leaves them out",
                "warning",
            )
        )
    if report["duplicates"]:
        host.emit(
            Notice(
                f"{report['num_duplicates']} images have a twin of the same bytes, such as {report['duplicates'][0]}",
                "warning",
            )
        )
