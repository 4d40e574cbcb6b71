"""Index the dataset: every image is either trained on, or skipped for a reason that is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.dataset import CAPTIONS, DatasetConfig, FolderConfig
from ..config.serialize import key_text
from ..errors import Problem, UserError
from ..host import Host, Notice, collect
from ..storage.atomic import sha256_texts
from .buckets import MAX_DISTORTION, place
from .captions import final_captions
from .masks import MaskFolder, Masks, MaskWriter, open_masks
from .places.open_source import describe_empty, open_source
from .sample_table import Sample, TableWriter, columns
from .source.backend import MAX_LISTED, Backend, Entry, describe_left_out, left_out_report, printable_name
from .source.decode import BrokenImage
from .source.scan import Scan, scans
from .source.text_encoding import WESTERN
from .tables.caption_row import Box, Row
from .tables.caption_source import NO_CAPTION, CaptionSource, NoCaption, tables_report

NUM_SHOWN = 5  # names in a log message; the report lists them all
MAX_PROBLEMS = 20  # shown in one error
# Reasons that are the user's choice: these images are no error with on_broken "stop".
BY_CHOICE = ("its shorter edge", "its aspect ratio", "it would be enlarged")


@dataclass(frozen=True)
class Index:
    """The samples, and what happened to every image.

    Attributes:
        samples: The images that are trained on.
        digest: SHA-256 of everything that affects training: image bytes, captions, placements and repeats.
        report: JSON values: counts, buckets, and the reason for every image that was skipped or changed.
        backends: One image source per part of the dataset.
        masks: None if no part has masks.
    """

    samples: Sequence[Sample]
    digest: str
    report: dict[str, Any]
    backends: tuple[Backend, ...]
    masks: Masks | None = None

    def read(self, sample: Sample) -> bytes:
        """Return the bytes of a sample's image file."""
        return self.backends[sample.part].read(sample.name)


class Unreadable(Exception):
    """Raised for images that passed the integrity check but can't be decoded. Build the index again without them.

    Attributes:
        faults: Reason by key of the sample.
    """

    def __init__(self, faults: Mapping[str, str]):
        super().__init__(", ".join(faults))
        self.faults = dict(faults)


def build_index(config: DatasetConfig, host: Host, seed: int, unreadable: Mapping[str, str] | None = None) -> Index:
    """Scan and place every image. Images that have not changed since the last run are not read again.

    Args:
        config: The dataset's folders and their settings.
        host: Receives log messages and progress; its cache folder holds the results of earlier scans.
        seed: Seed of random crops and tag orders.
        unreadable: `Unreadable.faults` of an earlier attempt; these images are skipped.
    Raises:
        UserError: No image can be used, or, with on_broken "stop", any image can't be used (all of them are listed).
    """
    writer, mask_writer = TableWriter(), MaskWriter()
    problems: list[Problem] = []
    skips = _Skips(problems)
    backends: list[Backend] = []
    sources: list[CaptionSource] = []
    counts = Counter[str]()
    num_found = num_converted = 0
    for part, (settings, root) in enumerate(zip(config.parts, config.roots, strict=True)):
        backend = open_source(root, host)
        backends.append(backend)
        entries = backend.entries()
        num_found += len(entries) + backend.left_out.num_unreadable
        skips.add_unreadable(settings, backend)
        if not entries:
            problems.append(Problem("dataset", describe_empty(settings.folder, root, backend)))
        opened_masks = collect(problems, open_masks, config, part, entries, host)
        mask_folder = opened_masks if isinstance(opened_masks, MaskFolder) else None
        mask_writer.begin(mask_folder)
        source = collect(problems, CaptionSource.open, config, part, backend, entries)
        if not isinstance(source, CaptionSource):
            continue
        sources.append(source)
        for number, (entry, scan) in enumerate(zip(entries, scans(backend, entries, root, host), strict=True)):
            reason = (unreadable or {}).get(f"{part}/{entry.name}", "")
            sample, reason = (None, reason) if reason else _make_sample(part, source, number, entry, scan, seed, counts)
            mask, reason = mask_folder.mask_of(sample, number) if sample and mask_folder else (None, reason)
            if sample and mask and mask_folder and settings.crop_style == "mask":
                sample, mask, reason = _crop_around_mask(sample, mask, mask_folder, settings, seed)
            if sample and not reason:
                writer.append(sample)
                num_converted += bool(scan.profile)
                if mask:
                    mask_writer.append(mask)
                continue
            skips.add(settings, backend.path(entry.name), printable_name(entry.name), reason)
    samples = writer.finish(lambda part, name: backends[part].path(name))
    if num_found and not samples and not problems:
        reasons = "; ".join(f"{entry['image']}: {entry['reason']}" for entry in skips.listed[:NUM_SHOWN])
        more = f"; and {skips.count - NUM_SHOWN} more" if skips.count > NUM_SHOWN else ""
        problems.append(
            Problem(
                "dataset",
                f"none of {num_found} images can be used: {reasons}{more}{_suggest_caption_fix(skips.listed)}",
            )
        )
    if problems:
        raise UserError(_truncate_problems(problems, skips.num_unlisted))
    report = _make_report(samples, skips.listed, num_found, config) | {"num_skipped": skips.count}
    report["color_converted"] = num_converted
    report["left_out"], report["caption_encodings"] = left_out_report(backends), _count_encodings(backends)
    report |= {name: count for name, count in counts.items() if count}
    if tables := tables_report(sources):
        report["tables"] = tables
    masks = mask_writer.finish()
    if masks:
        report["masks"] = len(masks.samples)
    _log_report(report, skips.listed, host)
    digest = _digest(samples, config)
    return Index(samples, masks.digest(digest) if masks else digest, report, tuple(backends), masks)


class _Skips:
    """The images that are not used, with their reasons.

    Args:
        problems: Receives a problem for each one of a folder with on_broken "stop".
    """

    def __init__(self, problems: list[Problem]):
        self.listed: list[dict[str, str]] = []
        self.count = self.num_unlisted = 0  # num_unlisted: problems beyond those that are listed
        self._problems = problems

    def add(self, settings: FolderConfig, location: str, name: str, reason: str) -> None:
        """Add an image.

        Args:
            settings: Those of its folder.
            location: Where it is, for the report.
            name: Its name in the folder.
            reason: Why it is not used.
        """
        self.count += 1
        if self.count <= MAX_LISTED:
            self.listed.append({"image": location, "reason": reason})
        is_error = settings.on_broken == "stop" and not reason.startswith(BY_CHOICE)
        if is_error and len(self._problems) >= MAX_LISTED:
            self.num_unlisted += 1
        elif is_error:
            text = f"{name}: {reason}; fix or remove it, or set on_broken to skip"
            self._problems.append(Problem(settings.folder, text))

    def add_unreadable(self, settings: FolderConfig, backend: Backend) -> None:
        """Add the files that the backend could not even list as images."""
        for location, reason in sorted(backend.left_out.unreadable):
            self.add(settings, location, Path(location).name, reason)
        self.count += backend.left_out.num_unreadable - len(backend.left_out.unreadable)


def _count_encodings(backends: Sequence[Backend]) -> dict[str, int]:
    return dict(sorted(sum((backend.encodings for backend in backends), Counter[str]()).items()))


def _truncate_problems(problems: list[Problem], num_unlisted: int) -> list[Problem]:
    """Return as many problems as fit on a screen.

    If the captions are in another folder, every image has the same problem.
    """
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = f"{len(problems) + num_unlisted - MAX_PROBLEMS} more images can't be used, for similar reasons"
    return [*problems[:MAX_PROBLEMS], Problem("dataset", more)]


def _suggest_caption_fix(skipped: list[dict[str, str]]) -> str:
    if not any(entry["reason"].startswith(NO_CAPTION) for entry in skipped):
        return ""
    return f". Add a .txt file next to each image, or set captions to {', '.join(map(repr, CAPTIONS[1:]))}"


def _make_sample(
    part: int, source: CaptionSource, number: int, entry: Entry, scan: Scan, seed: int, counts: Counter[str]
) -> tuple[Sample | None, str]:
    """Return the sample of an image, or None and the reason why it is skipped.

    Args:
        part: Index of its folder.
        source: The rows of its folder.
        number: Index of the image in the folder.
        entry: The image.
        scan: What was read of it.
        seed: Seed of random crops and tag variants.
        counts: Counts what the report says of images that are used.
    """
    settings = source.settings
    if scan.fault:
        return None, scan.fault
    if reason := _why_skipped(scan.width, scan.height, settings):
        return None, reason
    try:
        row = source.row(number, entry.name)
        captions = final_captions(row.captions, settings, seed, row.is_tags is not False)
        box = _box_of(row, scan, settings, counts)
    except NoCaption as error:
        return None, str(error)
    key = f"{part}/{entry.name}"
    placement = place(scan.width, scan.height, settings, seed, key, box)
    factor = max(placement.bucket[0] / scan.width, placement.bucket[1] / scan.height)
    if settings.max_upscale and factor > settings.max_upscale:
        return None, f"it would be enlarged {factor:.2f} times, max_upscale is {settings.max_upscale:g}"
    counts["table_sizes_differ"] += row.size is not None and {*row.size} != {scan.width, scan.height}
    counts["num_weighted"] += row.loss_weight != 1.0
    return Sample(
        key, entry.name, source.backend.path(entry.name), scan.pixels_sha256, captions, (scan.width, scan.height), placement,
        part, row.loss_weight,
    ), ""  # fmt: skip


def _why_skipped(width: int, height: int, settings: FolderConfig) -> str:
    """Return why an image of this size is left out by choice; "" if it is not."""
    if min(width, height) < settings.min_size:
        return f"its shorter edge has {min(width, height)} pixels, min_size is {settings.min_size}"
    aspect, low, high = width / height, settings.min_aspect, settings.max_aspect
    if low and aspect < low:
        return f"its aspect ratio {width} x {height} is {aspect:.3g}, min_aspect is {low:g}"
    if high and aspect > high:
        return f"its aspect ratio {width} x {height} is {aspect:.3g}, max_aspect is {high:g}"
    return ""


def _box_of(row: Row, scan: Scan, settings: FolderConfig, counts: Counter[str]) -> Box | None:
    """Return the box around all boxes of an image; None if it has none, or the crop does not need it.

    Raises:
        NoCaption: A box is outside of the image.
    """
    if settings.crop_style != "boxes":
        return None
    if not row.boxes:
        counts["num_without_boxes"] += 1
        return None
    for box in row.boxes:
        if box[0] < 0 or box[1] < 0 or box[2] > scan.width or box[3] > scan.height:
            edges = ", ".join(f"{edge:g}" for edge in box)
            raise NoCaption(f"its box [{edges}] is outside of the image, which has {scan.width} x {scan.height} pixels")
    lefts, tops, rights, bottoms = zip(*row.boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _crop_around_mask(
    sample: Sample, mask: Sample, folder: MaskFolder, settings: FolderConfig, seed: int
) -> tuple[Sample, Sample, str]:
    """Return an image and its mask, cropped around the white area, and "", or the reason why that can't be done."""
    try:
        box = folder.white_box(mask, sample.size)
    except (OSError, BrokenImage) as error:
        return sample, mask, f"its mask {printable_name(mask.captions[0])}: {error}"
    placement = place(*sample.size, settings, seed, sample.key, box)
    return replace(sample, placement=placement), replace(mask, placement=placement), ""


def _digest(samples: Sequence[Sample], config: DatasetConfig) -> str:
    return sha256_texts(
        f"{s.key} {s.sha256} {key_text(s.placement)} {config.parts[s.part].repeats} {s.captions}"
        + (f" {s.loss_weight}" if s.loss_weight != 1.0 else "")
        for s in samples
    )


def _make_report(
    samples: Sequence[Sample], skipped: list[dict[str, str]], num_found: int, config: DatasetConfig
) -> dict[str, Any]:
    rows = columns(samples)
    resized = (rows["resize"] != rows["size"]).any(axis=1)
    enlarged: Any = (rows["resize"] > rows["size"]).any(axis=1)
    cropped: Any = (rows["bucket"] != rows["resize"]).any(axis=1)
    whole = np.array([not part.crop for part in config.parts])[rows["part"]]
    duplicates: Any = _has_duplicate(rows["sha256"])
    sizes, counts = np.unique(rows["bucket"], axis=0, return_counts=True)
    buckets = {f"{width}x{height}": int(count) for (width, height), count in zip(sizes.tolist(), counts, strict=True)}
    return {
        "found": num_found,
        "used": len(samples),
        "skipped": skipped,
        "resized": int(resized.sum()),
        "enlarged": _paths(samples, enlarged),
        "num_enlarged": int(enlarged.sum()),
        "cropped": int(cropped.sum()),
        "cropped_despite_off": _paths(samples, cropped & whole),
        "num_cropped_despite_off": int((cropped & whole).sum()),
        "duplicates": _paths(samples, duplicates),
        "num_duplicates": int(duplicates.sum()),
        "buckets": dict(sorted(buckets.items())),
        "triggers": sorted({part.trigger for part in config.parts if part.trigger}),
    }


def _paths(samples: Sequence[Sample], which: np.ndarray) -> list[str]:
    return [samples[int(i)].path for i in np.flatnonzero(which)[:MAX_LISTED]]


def _has_duplicate(digests: np.ndarray) -> np.ndarray:
    """Return a mask of the digests, (rows, 32) bytes, that occur more than once."""
    whole = np.ascontiguousarray(digests).view("V32").reshape(-1)
    _, number, counts = np.unique(whole, return_inverse=True, return_counts=True)
    return counts[number.reshape(-1)] > 1


def _log_report(report: dict[str, Any], skipped: list[dict[str, str]], host: Host) -> None:
    buckets = ", ".join(f"{name}: {count}" for name, count in report["buckets"].items())
    host.emit(
        Notice(
            f"{report['used']} of {report['found']} images used ({report['resized']} resized, {report['cropped']} "
            f"cropped); buckets {buckets}"
        )
    )
    if "masks" in report:
        host.emit(Notice(f"{report['masks']} of them have a mask that weights the loss"))
    if report["color_converted"]:
        text = f"{report['color_converted']} images have another color profile and are converted to sRGB"
        host.emit(Notice(text))
    if report["caption_encodings"]:
        host.emit(Notice(_describe_encodings(report["caption_encodings"]), "warning"))
    for line in _describe_rows(report):
        host.emit(Notice(line))
    for table in report.get("tables", ()):
        if table["unused_rows"]:
            text = f"{table['unused_rows']} rows of {table['table']} name no image of the folder, such as"
            host.emit(Notice(f"{text} {table['example']!r}", "warning"))
    for left_out in report["left_out"]:
        host.emit(Notice(describe_left_out(left_out), "warning"))
    for entry in skipped[:NUM_SHOWN]:
        host.emit(Notice(f"skipped {entry['image']}: {entry['reason']}", "warning"))
    if report["num_skipped"] > NUM_SHOWN:
        where = "all" if report["num_skipped"] <= MAX_LISTED else f"the first {MAX_LISTED}"
        host.emit(Notice(f"and {report['num_skipped'] - NUM_SHOWN} more skipped; {where} are in the report", "warning"))
    if report["enlarged"]:
        host.emit(
            Notice(
                f"{report['num_enlarged']} images are smaller than their bucket and are upscaled; "
                "set min_size to skip them",
                "warning",
            )
        )
    if report["cropped_despite_off"]:
        host.emit(
            Notice(
                f"{report['num_cropped_despite_off']} images are cropped although crop is off, because resizing them "
                f"to their bucket would distort them by more than {MAX_DISTORTION - 1:.0%}, for example "
                f"{report['cropped_despite_off'][0]}",
                "warning",
            )
        )
    if report["duplicates"]:
        host.emit(
            Notice(
                f"{report['num_duplicates']} images are duplicates (identical bytes), "
                f"for example {report['duplicates'][0]}",
                "warning",
            )
        )


def _describe_rows(report: Mapping[str, Any]) -> list[str]:
    """Return what the log says about the rows of tables."""
    texts = {
        "num_weighted": "images have a loss_weight that is not 1",
        "num_without_boxes": "images have no boxes and are cropped around their middle",
        "table_sizes_differ": "images have another size than their row says; their own is used",
    }
    return [f"{report[name]} {text}" for name, text in texts.items() if name in report]


def _describe_encodings(counts: Mapping[str, int]) -> str:
    names = {WESTERN: "Windows-1252", "gb18030": "GBK", "cp932": "Shift-JIS"}
    parts = ", ".join(f"{count} as {names.get(name, name)}" for name, count in counts.items())
    return f"captions that are not UTF-8 are read in the encoding that they appear to have: {parts}; check crops.png"
