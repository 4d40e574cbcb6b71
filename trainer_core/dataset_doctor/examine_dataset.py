"""Examine a dataset: every image once at its training size, its copies, repeated marks and captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.dataset import DatasetConfig
from ..data.cache.latents import place_image
from ..data.sample_table import Sample
from ..data.source.backend import describe_left_out, left_out_report
from ..data.source.decode import BrokenImage, decode
from ..host import Host, PhaseProgress, PhaseStarted
from .checks.caption_checks import CountTokens, case_of, check_captions
from .checks.copies import Copy, find_copies
from .checks.image_measures import Measures, measure
from .checks.loss_outliers import LossReport, check_losses
from .checks.repeated_marks import find_marks, gradients_of, pick_for_marks
from .findings import NOTE, WARNING, Case, DatasetReport, Finding, count_of
from .image_list import ImageList, ListedImage, list_images
from .thresholds import BLURRY, BRIGHT_LEVEL, DARK_LEVEL, ENLARGED, FLAT_RANGE, TINY

PHASE = "looking at the images"
SLICE = 16  # images between two progress reports
WORKERS = max(1, min(4, os.cpu_count() or 1))  # each holds one decoded image


@dataclass(frozen=True)
class Looked:
    """What was measured of one image.

    Attributes:
        image: The image.
        measures: Its measures.
        gradients: See repeated_marks; None if it is not compared.
    """

    image: ListedImage
    measures: Measures
    gradients: np.ndarray | None


def examine_dataset(
    config: DatasetConfig,
    host: Host,
    limit: int = 0,
    count_tokens: CountTokens | None = None,
    run: Path | None = None,
) -> tuple[DatasetReport, ImageList]:
    """Return the report about a dataset, and its images.

    Args:
        config: The dataset.
        host: Receives progress, and can cancel.
        limit: Tokens that the text encoder takes.
        count_tokens: See check_captions.
        run: Folder of a run that has trained on the images. Its losses are looked at, see loss_outliers.
    Raises:
        UserError: There are no images, or a table can't be used.
    """
    images = list_images(config, host)
    looked, broken = _look(images, host)
    unreadable = [case_of(image, image.fault) for image in images.images if image.fault] + broken
    findings = [
        *_unreadable(unreadable),
        *_check_copies(looked, host),
        *_check_sizes(images.images),
        *_check_pixels(looked),
    ]
    findings += [*_check_marks(looked, host), *check_captions(images, limit, count_tokens)]
    losses = check_losses(images, run) if run else LossReport((), "")
    findings += losses.findings
    faulty = {case.number for case in unreadable} | {image.number for image in images.images if image.caption_fault}
    order = {WARNING: 0, NOTE: 1}
    return DatasetReport(
        tuple(images.parts[part].folder for part in images.parts),
        len(images.images),
        len(images.images) - len(faulty),
        Counter("{}x{}".format(*image.placement.bucket) for image in images.images if image.placement),
        tuple(sorted(findings, key=lambda finding: order[finding.severity])),
        tuple(filter(None, [*_remarks(images, is_length_checked=count_tokens is not None), losses.remark])),
    ), images


def _remarks(images: ImageList, is_length_checked: bool) -> tuple[str, ...]:
    lines = [describe_left_out(entry) for entry in left_out_report(list(images.backends.values()))]
    if images.num_repeated:
        lines.append(
            f"folders at several resolutions are examined once, at the highest ({images.num_repeated} left out)"
        )
    if not is_length_checked:
        lines.append("the length of captions is not checked, because T5's tokenizer is not at hand")
    return tuple(lines)


def _look(images: ImageList, host: Host) -> tuple[list[Looked], list[Case]]:
    """Decode and measure every readable image. Return the results, and the images that can't be decoded."""
    readable = [image for image in images.images if not image.fault]
    compared = set(pick_for_marks(len(readable)))
    host.emit(PhaseStarted(PHASE, len(readable), "images"))
    looked: list[Looked] = []
    broken: list[Case] = []

    def look(index: int) -> Looked | Case:
        image = readable[index]
        try:
            return _look_at(images, image, index in compared)
        except (OSError, BrokenImage) as error:
            return case_of(image, f"can't be decoded: {error}")

    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(readable), SLICE):
            host.check_cancelled()
            for result in pool.map(look, range(start, min(start + SLICE, len(readable)))):
                (broken if isinstance(result, Case) else looked).append(result)  # type: ignore[arg-type]
            host.emit(PhaseProgress(PHASE, min(start + SLICE, len(readable)), len(readable)))
    return looked, broken


def _look_at(images: ImageList, image: ListedImage, is_compared: bool) -> Looked:
    assert image.placement
    whole = decode(images.read(image), at_least=max(image.placement.resize))
    sample = Sample("", image.name, image.path, image.sha256, (), image.size, image.placement, image.part)
    return Looked(image, measure(place_image(whole, sample)), gradients_of(whole) if is_compared else None)


def _unreadable(cases: Sequence[Case]) -> list[Finding]:
    return _finding("unreadable", WARNING, cases, "can't be read", "; they are not trained", is_drawn=False)


def _finding(
    kind: str, severity: str, cases: Sequence[Case], what: str, advice: str, is_drawn: bool = True
) -> list[Finding]:
    return [Finding(kind, severity, f"{what}: {count_of(cases)}{advice}", tuple(cases), is_drawn)] if cases else []


def _check_copies(looked: Sequence[Looked], host: Host) -> list[Finding]:
    """Return the images that are copies of others, each group with the image that it is a copy of."""
    copies = find_copies([item.measures for item in looked], host.check_cancelled)
    groups: dict[int, list[Copy]] = {}
    for copy in copies:
        groups.setdefault(copy.of, []).append(copy)
    cases = []
    for number, (first, group) in enumerate(groups.items(), 1):
        original = looked[first].image
        cases.append(case_of(original, group=number))
        for copy in group:
            image, how = looked[copy.index].image, "mirror image of" if copy.is_mirrored else "nearly"
            how = "exact copy of" if image.sha256 == original.sha256 else how
            cases.append(case_of(image, f"{how} #{original.number}", group=number))
    text = f"equal or nearly equal to another: {count_of(copies)}; what they show is trained more often; leave them out"
    return [Finding("copies", WARNING, text, tuple(cases))] if cases else []


def _check_sizes(images: Sequence[ListedImage]) -> list[Finding]:
    enlarged = [image for image in images if image.placement and image.enlargement > ENLARGED]
    tiny = [case_of(image, _enlargement_text(image)) for image in enlarged if image.enlargement >= TINY]
    other = [case_of(image, _enlargement_text(image)) for image in enlarged if image.enlargement < TINY]
    return [
        *_finding("tiny", WARNING, tiny, f"enlarged at least {TINY:g} times", "; train at a lower resolution, or set "
                  "max_upscale or min_size to leave them out"),
        *_finding("enlarged", NOTE, other, "enlarged", "; max_upscale 1 leaves them out"),
    ]  # fmt: skip


def _enlargement_text(image: ListedImage) -> str:
    return f"{image.size[0]} x {image.size[1]}, enlarged {image.enlargement:.2f} times"


def _check_pixels(looked: Sequence[Looked]) -> list[Finding]:
    blurry = sorted(
        (item.measures.detail, item.image.number, item)
        for item in looked
        if item.measures.detail is not None and item.measures.detail < BLURRY and item.image.enlargement <= ENLARGED
    )
    exposed = [(item, _exposure(item.measures)) for item in looked]
    return [
        *_finding(
            "blurry", WARNING, [case_of(item.image, f"detail {detail:.2f}") for detail, _, item in blurry],
            f"blurry at their training size (detail below {BLURRY})", ", as if an image of half the size was enlarged; "
            "the LoRA learns the blur",
        ),
        *_finding(
            "exposure", WARNING, [case_of(item.image, text) for item, text in exposed if text],
            "nearly all black, white or gray", "",
        ),
    ]  # fmt: skip


def _exposure(measures: Measures) -> str:
    """Return what is wrong with the brightness of an image, in words; "" if nothing is."""
    levels = f"98 % of its pixels are between {measures.dark} and {measures.bright} of 255"
    if measures.bright < DARK_LEVEL:
        return f"dark: {levels}"
    if measures.dark > BRIGHT_LEVEL:
        return f"bright: {levels}"
    return f"without contrast: {levels}" if measures.bright - measures.dark < FLAT_RANGE else ""


def _check_marks(looked: Sequence[Looked], host: Host) -> list[Finding]:
    compared = [item for item in looked if item.gradients is not None]
    copies = {copy.index for copy in find_copies([item.measures for item in compared])}
    compared = [item for index, item in enumerate(compared) if index not in copies]
    findings = []
    for mark in find_marks([item.gradients for item in compared if item.gradients is not None], host.check_cancelled):
        cases = tuple(_marked(compared[index].image, mark.box(*compared[index].image.size)) for index in mark.indices)
        text = (
            f"the same mark in the {mark.place}: {len(cases)} of the {mark.num_compared} images that were compared; a "
            "watermark, logo or text is learned with the images: crop it or mask it"
        )
        findings.append(Finding("mark", WARNING, text, cases))
    return findings


def _marked(image: ListedImage, box: Sequence[float]) -> Case:
    width, height = image.size
    return case_of(image, "", (box[0] / width, box[1] / height, box[2] / width, box[3] / height))
