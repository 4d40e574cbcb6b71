"""Count texts that are longer than the text encoder takes. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_LISTED = 1000  # names in the report
NUM_SHOWN = 3  # names in a message


@dataclass
class LongTexts:
    """Texts with more tokens than a limit; what is beyond is cut off.

    Attributes:
        limit: Tokens that the text encoder takes, with the end token.
        count: Number of texts that are longer.
        names: Where the first MAX_LISTED of them come from, without duplicates.
        longest: Tokens of the longest.
    """

    limit: int
    count: int = 0
    names: list[str] = field(default_factory=list)
    longest: int = 0

    def add(self, name: str, num_tokens: int) -> None:
        """Add a text that may be too long."""
        if num_tokens <= self.limit:
            return
        self.count += 1
        self.longest = max(self.longest, num_tokens)
        if len(self.names) < MAX_LISTED and name not in self.names[-1:]:  # captions of one image follow each other
            self.names.append(name)

    def describe(self, what: str) -> str:
        """Return a warning; "" if no text is too long. what: Name of the texts, in the plural."""
        if not self.count:
            return ""
        more = ", ..." if len(self.names) > NUM_SHOWN else ""
        return (
            f"{what} longer than the {self.limit} tokens that the text encoder takes: {self.count}; what is beyond is "
            f"cut off. The longest has {self.longest} tokens. {', '.join(self.names[:NUM_SHOWN])}{more}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values of the report."""
        return {"count": self.count, "limit": self.limit, "longest": self.longest, "images": self.names}


def watch_lengths(
    texts: Iterable[tuple[str, str]], long: LongTexts, count_tokens: Callable[[str], int]
) -> Iterator[str]:
    """Yield the texts of (name, text) pairs, and add those that are too long.

    Args:
        texts: Where each text comes from, and the text.
        long: Receives them.
        count_tokens: Returns the number of tokens with the end token. Not called for texts that are short in any case.
    """
    for name, text in texts:
        if len(text) + 2 > long.limit:  # a token is at least one character, plus the space in front and the end token
            long.add(name, count_tokens(text))
        yield text
