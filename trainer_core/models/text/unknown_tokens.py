"""Find texts with characters that the tokenizer's vocabulary lacks. Needs no torch.

T5's pieces cover English, German, French and Romanian. It reads each run of other characters (Chinese, Japanese,
Korean, Hindi, Arabic, Greek, emoji, and { } < ~ ^) as one and the same unknown token, so that different captions get
equal embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

# Every T5 vocabulary has these, so texts of nothing else need no tokenizer: most English captions.
PLAIN = re.compile(r"[A-Za-z0-9\s.,'!?():-]*")
MAX_LENGTH = 200  # characters of the example in messages


class Encoding(Protocol):
    """What a tokenizer's `encode` returns."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def offsets(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class UnknownText:
    """Texts that the tokenizer can't read completely.

    Args:
        num_texts: How many texts have unknown tokens.
        example: The first of them.
        parts: Its parts that are read as unknown tokens.
    """

    num_texts: int
    example: str
    parts: tuple[str, ...]

    def describe(self, what: str) -> str:
        """Return a warning. what: Name of the texts, in the plural."""
        parts = ", ".join(map(repr, self.parts[:3])) + (", ..." if len(self.parts) > 3 else "")
        return (
            f"{what} with characters that T5's vocabulary lacks: {self.num_texts}. It reads each run of such "
            f"characters as the same unknown token, so different {what} may become equal. For example "
            f"{_shorten(self.example)!r}, where {parts} can't be read; write English instead"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values of the report."""
        return {"count": self.num_texts, "example": _shorten(self.example), "unknown": list(self.parts[:3])}


def find_unknown(
    texts: Iterable[str], encode: Callable[[str], Encoding], unknown_id: int | Callable[[], int | None]
) -> UnknownText | None:
    """Count the texts with unknown tokens. Return None if there are none.

    Args:
        texts: The texts, read once.
        encode: The tokenizer's `encode`. It is not called where every text is plain.
        unknown_id: Id of the unknown token, or a function that returns it; None: the tokenizer has none.
    """
    result: UnknownText | None = None
    for text in texts:
        if PLAIN.fullmatch(text):
            continue
        parts = unknown_parts(text, encode(text), unknown_id if isinstance(unknown_id, int) else unknown_id())
        if parts and result is None:
            result = UnknownText(0, text, tuple(dict.fromkeys(parts)))
        if parts and result is not None:
            result = replace(result, num_texts=result.num_texts + 1)
    return result


def unknown_parts(text: str, encoding: Encoding, unknown_id: int | None) -> Sequence[str]:
    """Return the parts of a text that became unknown tokens."""
    spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown_id]
    return [text[begin:end].strip() or text[begin:end] for begin, end in spans]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."
