"""The dataset as it will be trained: every image is used, or left out for a reason that is told."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.dataset import DatasetConfig, FolderConfig
from ..files import sha256_text, write_atomic
from ..host import Host, Notice, PhaseProgress
from ..problems import Problem, UserError
from ..registry import load
from .buckets import Placement, place
from .captions import captions_of
from .contract import Backend, Entry
from .folder import SUFFIXES
from .images import BrokenImage, decode

BACKEND = "folder"
SHOWN = 5  # names in a notice; the report has all
PROGRESS_EVERY = 100  # images


@dataclass(frozen=True)
class Sample:
    """One image that is trained on.

    Args:
        key: part number and name; the same on every machine, so that seeds are as well.
        path: where it lies, for messages.
        sha256: of its bytes.
        captions: at least one; which is used is drawn for every step.
        size: (width, height) as it is.
        part: number of the dataset's part.
    """

    key: str
    name: str
    path: str
    sha256: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    placement: Placement
    part: int


@dataclass(frozen=True)
class Index:
    """The samples, and what became of every image.

    Args:
        digest: of all that is trained: bytes, captions, placements, repeats.
        report: JSON values: counts, buckets, and for each image that was not simply used the reason.
    """

    samples: tuple[Sample, ...]
    digest: str
    report: dict[str, Any]
    backends: tuple[Backend, ...]

    def read(self, sample: Sample) -> bytes:
        return self.backends[sample.part].read(sample.name)


@dataclass(frozen=True)
class Scan:
    """What reading an image once told: its hash and size, or why it can't be used."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    fault: str = ""


def build_index(config: DatasetConfig, host: Host, seed: int) -> Index:
    """Read every image once (those that are as they were at the last run are not read again), and place it.

    Raises:
        UserError: no image can be used; or, where on_broken is "stop", every image that can't.
    """
    samples: list[Sample] = []
    skipped: list[dict[str, str]] = []
    problems: list[Problem] = []
    backends = []
    num_found = 0
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
        for entry, scan in zip(entries, _scan(backend, entries, root, host), strict=True):
            sample, reason = _sample(part, settings, backend, entry, scan, seed)
            if sample:
                samples.append(sample)
                continue
            skipped.append({"image": backend.path(entry.name), "reason": reason})
            if settings.on_broken == "stop" and not reason.startswith("its shorter edge"):
                problems.append(
                    Problem(settings.folder, f"{entry.name}: {reason}; mend or remove it, or set on_broken to skip")
                )
    if num_found and not samples and not problems:
        reasons = "; ".join(f"{entry['image']}: {entry['reason']}" for entry in skipped[:SHOWN])
        problems.append(Problem("dataset", f"none of {num_found} images can be used: {reasons}"))
    if problems:
        raise UserError(problems)
    report = _report(samples, skipped, num_found, config)
    _tell(report, skipped, host)
    return Index(tuple(samples), _digest(samples, config), report, tuple(backends))


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
        return None, f"its caption file can't be read ({error.strerror or error})"
    captions = captions_of(entry.name, text, settings)
    if not captions:
        what = "is empty" if text is not None else "is missing"
        return None, f"its caption file {Path(entry.name).with_suffix('.txt').name} {what}"
    key = f"{part}/{entry.name}"
    placement = place(scan.width, scan.height, settings, seed, key)
    return Sample(
        key, entry.name, backend.path(entry.name), scan.sha256, captions, (scan.width, scan.height), placement, part
    ), ""


def _scan(backend: Backend, entries: Sequence[Entry], root: str, host: Host) -> Iterator[Scan]:
    """A Scan for each entry, in order; read in threads, which Pillow and hashlib let run side by side."""
    memory = host.paths.cache / "index" / f"{sha256_text(str(root))[:16]}.json"
    known = _known(memory)
    fresh: dict[str, list[Any]] = {}
    total = len(entries)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, total, PROGRESS_EVERY):  # in slices: a million images are never in the queue at once
            host.check_cancelled()
            part = entries[start : start + PROGRESS_EVERY]
            scans = pool.map(lambda entry: _scan_one(backend, entry, known), part)
            for entry, scan in zip(part, scans, strict=True):
                if not scan.fault:  # a fault may be gone though the file is as it was: rights, a network share
                    fresh[entry.name] = [entry.stamp, scan.sha256, scan.width, scan.height]
                yield scan
            if total > PROGRESS_EVERY:
                host.emit(PhaseProgress("start", min(start + PROGRESS_EVERY, total), total))
    if fresh != known:
        write_atomic(memory, json.dumps(fresh))


def _known(memory: Path) -> dict[str, list[Any]]:
    try:
        return json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _scan_one(backend: Backend, entry: Entry, known: dict[str, list[Any]]) -> Scan:
    if entry.name in known and known[entry.name][0] == entry.stamp:
        return Scan(*known[entry.name][1:])
    try:
        raw = backend.read(entry.name)
        width, height = decode(raw).size  # the whole picture: a file that is cut short is found now, not at step 399
    except OSError as error:
        return Scan(fault=f"it can't be read ({error.strerror or error})")
    except BrokenImage as error:
        return Scan(fault=str(error))
    return Scan(hashlib.sha256(raw).hexdigest(), width, height)


def _digest(samples: Sequence[Sample], config: DatasetConfig) -> str:
    lines = (f"{s.key} {s.sha256} {s.placement} {config.parts[s.part].repeats} {s.captions}" for s in samples)
    return sha256_text(*lines)


def _report(
    samples: Sequence[Sample], skipped: list[dict[str, str]], num_found: int, config: DatasetConfig
) -> dict[str, Any]:
    twins = Counter(sample.sha256 for sample in samples)
    enlarged = [s.path for s in samples if s.placement.resize[0] > s.size[0] or s.placement.resize[1] > s.size[1]]
    buckets = Counter(f"{s.placement.bucket[0]}x{s.placement.bucket[1]}" for s in samples)
    return {
        "found": num_found,
        "used": len(samples),
        "skipped": skipped,
        "resized": sum(s.placement.resize != s.size for s in samples),
        "enlarged": enlarged,
        "cropped": sum(s.placement.is_cropped for s in samples),
        "duplicates": [s.path for s in samples if twins[s.sha256] > 1],
        "buckets": dict(sorted(buckets.items())),
        "triggers": sorted({part.trigger for part in config.parts if part.trigger}),
    }


def _tell(report: dict[str, Any], skipped: list[dict[str, str]], host: Host) -> None:
    buckets = ", ".join(f"{name}: {count}" for name, count in report["buckets"].items())
    host.emit(Notice(
        f"{report['used']} of {report['found']} images used ({report['resized']} resized, {report['cropped']} cropped); buckets {buckets}"
    ))  # fmt: skip
    for entry in skipped[:SHOWN]:
        host.emit(Notice(f"skipped {entry['image']}: {entry['reason']}", "warning"))
    if len(skipped) > SHOWN:
        host.emit(Notice(f"and {len(skipped) - SHOWN} more skipped; all are in the report", "warning"))
    if report["enlarged"]:
        host.emit(
            Notice(
                f"{len(report['enlarged'])} images are smaller than their bucket and are enlarged; min_size leaves them out",
                "warning",
            )
        )
    if report["duplicates"]:
        host.emit(
            Notice(
                f"{len(report['duplicates'])} images have a twin of the same bytes, such as {report['duplicates'][0]}",
                "warning",
            )
        )
