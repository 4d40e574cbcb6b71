"""What happened to the images of a dataset: the report as JSON values, and what the log says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config.dataset import DatasetConfig
from ..host import Host, Notice
from .buckets import MAX_DISTORTION
from .sample_table import Sample, columns
from .skipped_images import NUM_SHOWN
from .source.backend import MAX_LISTED, Backend, describe_left_out
from .source.text_encoding import WESTERN


def make_report(
    samples: Sequence[Sample], skipped: list[dict[str, str]], num_found: int, config: DatasetConfig
) -> dict[str, Any]:
    """Return what happened to the samples: counts, buckets, and paths of those that were changed."""
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


def count_encodings(backends: Sequence[Backend]) -> dict[str, int]:
    """Return how many captions were read in each encoding that is not UTF-8."""
    return dict(sorted(sum((backend.encodings for backend in backends), Counter[str]()).items()))


def log_report(report: Mapping[str, Any], host: Host) -> None:
    """Log a report: what is used, what captions and tables say, and what the user may want to change."""
    parts = (_describe_use, _describe_captions, _describe_unused_files, _describe_skipped, _describe_changes)
    for notice in (notice for describe in parts for notice in describe(report)):
        host.emit(notice)


def _describe_use(report: Mapping[str, Any]) -> Iterator[Notice]:
    buckets = ", ".join(f"{name}: {count}" for name, count in report["buckets"].items())
    yield Notice(
        f"{report['used']} of {report['found']} images used ({report['resized']} resized, {report['cropped']} "
        f"cropped); buckets {buckets}"
    )
    if "masks" in report:
        yield Notice(f"{report['masks']} of them have a mask that weights the loss")
    if report["color_converted"]:
        yield Notice(f"{report['color_converted']} images have another color profile and are converted to sRGB")


def _describe_captions(report: Mapping[str, Any]) -> Iterator[Notice]:
    if report["caption_encodings"]:
        yield Notice(_describe_encodings(report["caption_encodings"]), "warning")
    for line in _describe_rows(report):
        yield Notice(line)


def _describe_unused_files(report: Mapping[str, Any]) -> Iterator[Notice]:
    for table in report.get("tables", ()):
        if table["unused_rows"]:
            text = f"{table['unused_rows']} rows of {table['table']} name no image of the folder, such as"
            yield Notice(f"{text} {table['example']!r}", "warning")
    for left_out in report["left_out"]:
        yield Notice(describe_left_out(left_out), "warning")


def _describe_skipped(report: Mapping[str, Any]) -> Iterator[Notice]:
    for entry in report["skipped"][:NUM_SHOWN]:
        yield Notice(f"skipped {entry['image']}: {entry['reason']}", "warning")
    if report["num_skipped"] > NUM_SHOWN:
        where = "all" if report["num_skipped"] <= MAX_LISTED else f"the first {MAX_LISTED}"
        text = f"and {report['num_skipped'] - NUM_SHOWN} more skipped; {where} are in the report"
        yield Notice(text, "warning")


def _describe_changes(report: Mapping[str, Any]) -> Iterator[Notice]:
    if report["enlarged"]:
        text = f"{report['num_enlarged']} images are smaller than their bucket and are upscaled; "
        yield Notice(f"{text}set min_size to skip them", "warning")
    if report["cropped_despite_off"]:
        yield Notice(
            f"{report['num_cropped_despite_off']} images are cropped although crop is off, because resizing them "
            f"to their bucket would distort them by more than {MAX_DISTORTION - 1:.0%}, for example "
            f"{report['cropped_despite_off'][0]}",
            "warning",
        )
    if report["duplicates"]:
        text = f"{report['num_duplicates']} images are duplicates (identical bytes), "
        yield Notice(f"{text}for example {report['duplicates'][0]}", "warning")


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
