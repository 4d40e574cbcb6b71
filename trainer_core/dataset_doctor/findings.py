"""What is wrong with a dataset: each finding with its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WARNING, NOTE = "warning", "note"
MAX_IN_JSON = 10_000  # images of a finding
LEAVES_OUT = ("unreadable", "copies", "tiny", "blurry", "exposure")  # kinds of findings that name images to leave out


@dataclass(frozen=True)
class Case:
    """An image of a finding.

    Attributes:
        number: Of the image.
        path: Of the image.
        label: Number and name, as printed.
        value: What was measured, in words.
        box: The part of the image that is meant, (left, top, right, bottom) as shares of its edges; () for all of it.
        group: Number of the images that belong together, such as copies of one; 0 for none.
    """

    number: int
    path: str
    label: str
    value: str = ""
    box: tuple[float, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class Finding:
    """One kind of problem, and the images that have it.

    Attributes:
        kind: Name in JSON.
        severity: WARNING, or NOTE for what may be intended.
        text: What it is and what to do, in one line.
        cases: The images.
        is_drawn: Whether the images are shown on the sheet.
    """

    kind: str
    severity: str
    text: str
    cases: tuple[Case, ...]
    is_drawn: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values."""
        images = [
            {"number": case.number, "image": case.path, "value": case.value}
            | ({"group": case.group} if case.group else {})
            | ({"box": [round(edge, 4) for edge in case.box]} if case.box else {})
            for case in self.cases[:MAX_IN_JSON]
        ]
        return {
            "kind": self.kind, "severity": self.severity, "text": self.text, "count": len(self.cases), "images": images,
        }  # fmt: skip


def count_of(images: Sequence[object]) -> str:
    """Return the number of images in words."""
    return "1 image" if len(images) == 1 else f"{len(images)} images"


@dataclass(frozen=True)
class DatasetReport:
    """The findings of a dataset, and its sizes.

    Attributes:
        names: The folders, as the user wrote them.
        num_images: Images that were looked at, those that can't be read included.
        num_usable: Images that can be read and have a caption.
        buckets: Number of images by the size they are trained at, such as "832x1216".
        findings: What is wrong, the most important first.
        remarks: What was left out, or not checked, one line each.
    """

    names: tuple[str, ...]
    num_images: int
    num_usable: int
    buckets: Counter[str]
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = field(default=())

    @property
    def is_sound(self) -> bool:
        """Whether there is no warning."""
        return all(finding.severity == NOTE for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values."""
        return {
            "folders": list(self.names),
            "images": self.num_images,
            "usable": self.num_usable,
            "buckets": dict(sorted(self.buckets.items(), key=lambda item: bucket_order(item[0]))),
            "findings": [finding.as_json() for finding in self.findings],
            "remarks": list(self.remarks),
        }


def bucket_order(name: str) -> tuple[float, int]:
    """Return the sort key of a bucket such as "832x1216": by aspect ratio, then by width."""
    width, height = map(int, name.split("x"))
    return width / height, width


BAR_WIDTH, LINES_SHOWN = 30, 6
MARKS = {WARNING: "! ", NOTE: "- "}


def dataset_text(report: DatasetReport) -> str:
    """Return the report as lines of text."""
    lines = [
        f"{', '.join(report.names)}: {report.num_usable} of {report.num_images} images can be trained",
        *_bucket_lines(report.buckets),
        "",
    ]
    for finding in report.findings:
        lines.append(f"  {MARKS[finding.severity]}{finding.text}")
        lines += [
            f"      {case.label}{f': {case.value}' if case.value else ''}" for case in finding.cases[:LINES_SHOWN]
        ]
        if len(finding.cases) > LINES_SHOWN:
            lines.append(f"      and {len(finding.cases) - LINES_SHOWN} more")
    if not report.findings:
        lines.append("  nothing is wrong with it")
    return "\n".join([*lines, *(f"  {MARKS[NOTE]}{remark}" for remark in report.remarks)])


def _bucket_lines(buckets: Counter[str]) -> Sequence[str]:
    """Return a line for each size, from tall to wide, with a bar."""
    most = max(buckets.values(), default=1)
    return [
        f"  {name:>9} {count:>6}  {'#' * max(1, round(count / most * BAR_WIDTH))}"
        for name, count in sorted(buckets.items(), key=lambda item: bucket_order(item[0]))
    ]
