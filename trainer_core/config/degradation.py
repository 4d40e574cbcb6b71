"""Parser of image degradations such as `shrink 2-4 + jpeg 10-30`. data/degradation.py applies them."""

from __future__ import annotations

import re
from dataclasses import dataclass

EXAMPLES = "jpeg 10-30, blur 1-3, noise 0.02-0.1 or shrink 2-4"
STEP = re.compile(r"(?P<kind>[a-z]+)\s*(?P<low>\d+(?:\.\d+)?|\.\d+)(?:\s*-\s*(?P<high>\d+(?:\.\d+)?|\.\d+))?")
LIMITS = {  # kind -> lowest strength, highest strength, meaning
    "jpeg": (1, 95, "a JPEG quality, a whole number"),
    "blur": (0.1, 100, "a blur radius in pixels"),
    "noise": (0.001, 1, "a noise standard deviation as a share of white"),
    "shrink": (1, 64, "a factor to downscale by, before upscaling again"),
}


@dataclass(frozen=True)
class Step:
    """One degradation, with a strength from low to high, both included. LIMITS has the meaning of the strength."""

    kind: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind} {self.low:g}-{self.high:g}"


def steps_of(text: str) -> tuple[Step, ...]:
    """Parse a degradation into its steps, in order; () for an empty text.

    Raises:
        ValueError: the text is invalid; the message says what is wrong and what to write.
    """
    return tuple(_parse_step(part.strip()) for part in text.split("+")) if text.strip() else ()


def _parse_step(text: str) -> Step:
    match = STEP.fullmatch(text.lower())
    if not match or match["kind"] not in LIMITS:
        raise ValueError(f"{text!r} is not a valid degradation; write {EXAMPLES}, or several of them joined by +")
    kind, low, high = match["kind"], float(match["low"]), float(match["high"] or match["low"])
    least, most, meaning = LIMITS[kind]
    if low > high:
        raise ValueError(f"{text!r} has the larger number first; write {kind} {high:g}-{low:g}")
    is_whole = kind != "jpeg" or (low == int(low) and high == int(high))
    if not (least <= low and high <= most and is_whole):
        raise ValueError(f"{text!r} is out of range: {kind} takes {meaning}, from {least:g} to {most:g}")
    return Step(kind, low, high)
