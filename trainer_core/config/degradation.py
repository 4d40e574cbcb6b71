"""How a picture is made worse, as a line of text: `shrink 2-4 + jpeg 10-30`. What it says is done in data/degradation.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

EXAMPLES = "jpeg 10-30, blur 1-3, noise 0.02-0.1 or shrink 2-4"
STEP = re.compile(r"(?P<kind>[a-z]+)\s*(?P<low>\d+(?:\.\d+)?|\.\d+)(?:\s*-\s*(?P<high>\d+(?:\.\d+)?|\.\d+))?")
LIMITS = {  # of strengths, and what they are
    "jpeg": (1, 95, "the quality of a JPEG, a whole number"),
    "blur": (0.1, 100, "the radius of a blur in pixels"),
    "noise": (0.001, 1, "the spread of noise as a share of white"),
    "shrink": (1, 64, "how many times smaller a picture is made before it is enlarged again"),
}


@dataclass(frozen=True)
class Step:
    """One way to make a picture worse, by a strength between low and high, both included; see LIMITS."""

    kind: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind} {self.low:g}-{self.high:g}"


def steps_of(text: str) -> tuple[Step, ...]:
    """What is done to a picture, in this order; () where the text is empty.

    Raises:
        ValueError: it can't be read; says what is wrong, and what to write.
    """
    return tuple(_step(part.strip()) for part in text.split("+")) if text.strip() else ()


def _step(text: str) -> Step:
    found = STEP.fullmatch(text.lower())
    if not found or found["kind"] not in LIMITS:
        raise ValueError(f"{text!r} can't be read; write {EXAMPLES}, or several of them with + in between")
    kind, low, high = found["kind"], float(found["low"]), float(found["high"] or found["low"])
    least, most, what = LIMITS[kind]
    if low > high:
        raise ValueError(f"{text!r} has the larger number first; write {kind} {high:g}-{low:g}")
    is_whole = kind != "jpeg" or (low == int(low) and high == int(high))
    if not (least <= low and high <= most and is_whole):
        raise ValueError(f"{text!r} is out of range: {kind} takes {what}, {least:g} to {most:g}")
    return Step(kind, low, high)
