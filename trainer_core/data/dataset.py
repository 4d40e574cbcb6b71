"""Index the dataset: every image is either trained on, or skipped for a reason that is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.dataset import DatasetConfig, FolderConfig
from ..errors import Problem, UserError
from ..host import Host, collect
from ..storage.atomic import sha256_texts
from ..storage.stored_names import key_text
from .buckets import place
from .captions import final_captions
from .dataset_report import count_encodings, log_report, make_report
from .masks import MaskFolder, Masks, MaskWriter, open_masks
from .places.open_source import describe_empty, open_source
from .sample_table import Sample, TableWriter
from .skipped_images import SkippedImages, truncate_problems
from .source.backend import Backend, Entry, left_out_report, printable_name
from .source.decode import BrokenImage
from .source.scan import Scan, scans
from .tables.caption_row import Box, Row
from .tables.caption_source import CaptionSource, NoCaption, tables_report


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
    builder = _IndexBuilder(config, host, seed, unreadable or {})
    for part, root in zip(range(len(config.parts)), config.roots, strict=True):
        builder.add_part(part, root)
    return builder.finish()


class _IndexBuilder:
    """The samples so far, and all that is reported of them.

    Args:
        config: As for build_index, like the others.
    """

    def __init__(self, config: DatasetConfig, host: Host, seed: int, unreadable: Mapping[str, str]):
        self.config, self.host, self.seed, self.unreadable = config, host, seed, unreadable
        self.samples, self.masks = TableWriter(), MaskWriter()
        self.problems: list[Problem] = []
        self.skips = SkippedImages(self.problems)
        self.backends: list[Backend] = []
        self.sources: list[CaptionSource] = []
        self.counts = Counter[str]()
        self.num_found = self.num_converted = 0

    def add_part(self, part: int, root: str) -> None:
        """Add the images of a folder or another source."""
        settings, host = self.config.parts[part], self.host
        backend = open_source(root, host)
        self.backends.append(backend)
        entries = backend.entries()
        self.num_found += len(entries) + backend.left_out.num_unreadable
        self.skips.add_unreadable(settings, backend)
        if not entries:
            self.problems.append(Problem("dataset", describe_empty(settings.folder, root, backend)))
        opened_masks = collect(self.problems, open_masks, self.config, part, entries, host)
        masks = opened_masks if isinstance(opened_masks, MaskFolder) else None
        self.masks.begin(masks)
        source = collect(self.problems, CaptionSource.open, self.config, part, backend, entries)
        if not isinstance(source, CaptionSource):
            return
        self.sources.append(source)
        for number, (entry, scan) in enumerate(zip(entries, scans(backend, entries, root, host), strict=True)):
            if reason := self._add_image(part, source, masks, number, entry, scan):
                self.skips.add(settings, backend.path(entry.name), printable_name(entry.name), reason)

    def _add_image(
        self, part: int, source: CaptionSource, masks: MaskFolder | None, number: int, entry: Entry, scan: Scan
    ) -> str:
        """Add an image as a sample, with its mask. Return the reason if it is skipped."""
        settings = self.config.parts[part]
        if reason := self.unreadable.get(f"{part}/{entry.name}", ""):
            return reason
        sample, reason = _make_sample(part, source, number, entry, scan, self.seed, self.counts)
        mask, reason = masks.mask_of(sample, number) if sample and masks else (None, reason)
        if sample and mask and masks and settings.crop_style == "mask":
            sample, mask, reason = _crop_around_mask(sample, mask, masks, settings, self.seed)
        if not sample or reason:
            return reason
        self.samples.append(sample)
        self.num_converted += bool(scan.profile)
        if mask:
            self.masks.append(mask)
        return ""

    def finish(self) -> Index:
        """Return the index, and log its report.

        Raises:
            UserError: As for build_index.
        """
        samples = self.samples.finish(lambda part, name: self.backends[part].path(name))
        if self.num_found and not samples and not self.problems:
            self.problems.append(Problem("dataset", self.skips.describe_none_used(self.num_found)))
        if self.problems:
            raise UserError(truncate_problems(self.problems, self.skips.num_unlisted))
        masks = self.masks.finish()
        report = self._report(samples, masks)
        log_report(report, self.host)
        digest = _digest(samples, self.config)
        return Index(samples, masks.digest(digest) if masks else digest, report, tuple(self.backends), masks)

    def _report(self, samples: Sequence[Sample], masks: Masks | None) -> dict[str, Any]:
        report = make_report(samples, self.skips.listed, self.num_found, self.config)
        report |= {"num_skipped": self.skips.count, "color_converted": self.num_converted}
        report["left_out"], report["caption_encodings"] = left_out_report(self.backends), count_encodings(self.backends)
        report |= {name: count for name, count in self.counts.items() if count}
        if tables := tables_report(self.sources):
            report["tables"] = tables
        if masks:
            report["masks"] = len(masks.samples)
        return report


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
