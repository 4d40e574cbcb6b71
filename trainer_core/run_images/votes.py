"""A blind vote on the images of two versions: which side each is shown on, the votes, and what they say. Needs no torch.

The order of the rows and the sides follow from digests of the set, so that nobody has to store them, nobody can guess them, and
a vote goes on where it was. Rows that were called equal say nothing about which version is better: as in a sign test, the
share is that of the others. Its interval is Wilson's (1927, J. Am. Stat. Assoc. 22), which also holds for few votes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import layout
from ..storage.atomic import sha256_text, write_json
from ..storage.bounded_files import Unusable, read_json
from .image_sets import VOTE, ImageSet, read_set, sets_of

VOTES = "votes.json"
VOTES_BYTES = 4 << 20
LEFT, RIGHT, EQUAL = "left", "right", "equal"
SIDES = (LEFT, RIGHT)
CHOICES = (LEFT, RIGHT, EQUAL)
Z = 1.959963984540054  # of 95 %


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Outcome:
    """What the votes say.

    Attributes:
        first, second: The two versions.
        wins: Votes for each.
        equal: Rows that were called equal.
        num_rows: All rows.
    """

    first: str
    second: str
    wins: tuple[int, int]
    equal: int
    num_rows: int

    @property
    def decided(self) -> int:
        """Votes for one of the two."""
        return sum(self.wins)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of the second version."""
        return wilson(self.wins[1], self.decided)

    @property
    def better(self) -> str:
        """The version that is better with 95 % certainty; "" if they can't be told apart yet."""
        low, high = self.interval
        return self.second if low > 0.5 else self.first if high < 0.5 else ""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values."""
        low, high = self.interval
        return {
            "first": self.first, "second": self.second, "wins": list(self.wins), "equal": self.equal, "rows": self.num_rows,
            "share": self.wins[1] / self.decided if self.decided else None, "low": low, "high": high, "better": self.better,
        }  # fmt: skip

    def text(self) -> str:
        """Return one line."""
        voted = self.decided + self.equal
        line = f"{self.second} against {self.first}: {voted} of {self.num_rows} pairs voted"
        if not voted:
            return line
        low, high = self.interval
        verdict = f"{self.better} is better (95 % certainty)" if self.better else "they can't be told apart yet"
        share = f"{self.second} preferred in {self.wins[1]} of {self.decided} ({low:.0%} to {high:.0%})"
        return f"{line}, {share}, {self.equal} equal: {verdict}"


@dataclass(frozen=True)
class Vote:
    """A vote.

    Attributes:
        folder: Of the set.
        images: The set.
        choices: By row: 0 or 1 for a version, EQUAL as -1.
    """

    folder: Path
    images: ImageSet
    choices: Mapping[int, int]

    @property
    def order(self) -> list[int]:
        """The rows in the order in which they are shown."""
        return sorted(range(len(self.images.rows)), key=lambda row: sha256_text(self._secret, "order", str(row)))

    def version_at(self, row: int, side: str) -> int:
        """Return which version is shown on a side."""
        is_swapped = int(sha256_text(self._secret, "side", str(row)), 16) & 1
        return is_swapped if side == LEFT else 1 - is_swapped

    @property
    def _secret(self) -> str:
        return sha256_text(self.folder.name, *(version.sha256 for version in self.images.versions))

    def side_of(self, row: int) -> str:
        """Return what was chosen for a row, as it is shown: a side, EQUAL, or "" for no vote."""
        choice = self.choices.get(row)
        if choice is None:
            return ""
        return EQUAL if choice < 0 else next(side for side in SIDES if self.version_at(row, side) == choice)

    def with_choice(self, row: int, choice: str) -> Vote:
        """Return the vote with a choice for a row: a side, EQUAL, or "" to take it back."""
        choices = {other: value for other, value in self.choices.items() if other != row}
        if choice:
            choices[row] = -1 if choice == EQUAL else self.version_at(row, choice)
        return Vote(self.folder, self.images, choices)

    @property
    def is_complete(self) -> bool:
        """Whether every row has a vote."""
        return len(self.choices) == len(self.images.rows)

    @property
    def outcome(self) -> Outcome:
        """What the votes say."""
        values = list(self.choices.values())
        first, second = (version.label for version in self.images.versions[:2])
        return Outcome(first, second, (values.count(0), values.count(1)), values.count(-1), len(self.images.rows))

    def save(self) -> None:
        """Write votes.json, with the outcome for people who open it.

        Raises:
            OSError: It can't be written.
        """
        votes = [
            {"row": row, "version": choice if choice >= 0 else None} for row, choice in sorted(self.choices.items())
        ]
        write_json(self.folder / VOTES, {"votes": votes, "outcome": self.outcome.as_json()})


def read_vote(folder: Path) -> Vote | None:
    """Return the vote on a set; None if it is no whole set of two versions. Damaged votes are left out."""
    images = read_set(folder)
    if images is None or images.kind != VOTE or len(images.versions) != 2:
        return None
    return Vote(folder, images, _choices(folder, len(images.rows)))


def _choices(folder: Path, num_rows: int) -> dict[int, int]:
    try:
        value = read_json(folder / VOTES, VOTES_BYTES)
    except (OSError, Unusable):
        return {}
    votes = value.get("votes") if isinstance(value, dict) else None
    choices: dict[int, int] = {}
    for vote in votes if isinstance(votes, list) else ():
        row, version = (vote.get("row"), vote.get("version")) if isinstance(vote, dict) else (None, 9)
        if (
            type(row) is int
            and 0 <= row < num_rows
            and (version is None or (type(version) is int and version in (0, 1)))
        ):
            choices[row] = -1 if version is None else version
    return choices


def outcomes_of(run: Path) -> list[Outcome]:
    """Return the outcomes of all votes of a run that have begun."""
    votes = (read_vote(run / layout.IMAGE_SETS / name) for name, _ in sets_of(run))
    return [vote.outcome for vote in votes if vote and vote.choices]
