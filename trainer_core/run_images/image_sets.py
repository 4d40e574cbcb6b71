"""Single images of a run for the page: of two versions for a blind vote, or of one LoRA at several strengths. Needs no torch.

RUN/image-sets/VOTE-KEY/
    set.json          what the images are; written last, so that a set is whole or not there
    0003-1.png        row 3 (a prompt, a seed and a size), version 1
    votes.json        the votes, see votes.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runs import layout
from ..storage.bounded_files import Unusable, read_json

VOTE, STRENGTHS = "vote", "strengths"
SET = "set.json"
SET_BYTES = 16 << 20
MAX_ROWS, MAX_VERSIONS = 2000, 200
NAME = re.compile(r"(vote|strengths)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Shown:
    """A version whose images are in a set.

    Attributes:
        label: Such as "step 250", or the name of a LoRA.
        sha256: Digest of the LoRA; "" for the base model.
        strength: Of the LoRA.
        step: Of its checkpoint, with STRENGTHS; 0 in sets that are older than sliders of several checkpoints.
    """

    label: str
    sha256: str
    strength: float
    step: int = 0


@dataclass(frozen=True)
class Row:
    """What the images of a row share.

    Attributes:
        name: Of the prompt in its library.
        prompt: The prompt.
        seed: Of the initial noise.
        size: Width and height.
    """

    name: str
    prompt: str
    seed: int
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageSet:
    """The images of a set.

    Attributes:
        kind: VOTE or STRENGTHS.
        versions: The columns.
        rows: The rows.
        step: Of the last checkpoint that STRENGTHS are of; 0 for a vote.
    """

    kind: str
    versions: tuple[Shown, ...]
    rows: tuple[Row, ...]
    step: int = 0

    def step_of(self, version: Shown) -> int:
        """Return the step of a version's checkpoint."""
        return version.step or self.step

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values of set.json."""
        return asdict(self)


def set_folder(run: Path, kind: str, key: str) -> Path:
    """Return the folder of a set. key: a digest of what its images depend on."""
    return run / layout.IMAGE_SETS / f"{kind}-{key[:8]}"


def image_name(row: int, version: int) -> str:
    """Return the name of an image's file."""
    return f"{row:04}-{version}.png"


def read_set(folder: Path) -> ImageSet | None:
    """Return a set; None if it is not whole, or damaged."""
    try:
        value = read_json(folder / SET, SET_BYTES)
        kind, versions, rows = str(value["kind"]), value["versions"], value["rows"]
        return ImageSet(
            kind if kind in (VOTE, STRENGTHS) else VOTE,
            tuple(
                Shown(str(v["label"]), str(v["sha256"]), float(v["strength"]), int(v.get("step", 0)))
                for v in versions[:MAX_VERSIONS]
            ),
            tuple(
                Row(str(r["name"]), str(r["prompt"]), int(r["seed"]), (int(r["size"][0]), int(r["size"][1])))
                for r in rows[:MAX_ROWS]
            ),
            int(value.get("step", 0)),
        )
    except (OSError, Unusable, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return None


def sets_of(run: Path) -> Iterator[tuple[str, ImageSet]]:
    """Yield the name of each whole set of a run, and the set; the newest first."""
    root = run / layout.IMAGE_SETS
    folders = [path for path in root.iterdir() if NAME.fullmatch(path.name)] if root.is_dir() else []
    for folder in sorted(folders, key=_changed, reverse=True):
        if found := read_set(folder):
            yield folder.name, found


def _changed(folder: Path) -> float:
    try:
        return (folder / SET).stat().st_mtime
    except OSError:
        return 0.0


def find_set(run: Path, name: str) -> Path | None:
    """Return the folder of a set by its name; None if there is none."""
    folder = run / layout.IMAGE_SETS / name
    return folder if NAME.fullmatch(name) and read_set(folder) else None
