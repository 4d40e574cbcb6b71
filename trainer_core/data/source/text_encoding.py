"""Decode caption files: Unicode with certainty, other encodings only where there is no doubt.

Captions that are not Unicode come from editors with a regional encoding. A single short caption often is valid in
several of them, so the caption files of a folder are judged together (docs/decisions/0042).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BOMS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
WESTERN = "cp1252"
REGIONAL = (
    "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252", "cp1250", "cp1253", "cp1254",
    "cp1255", "cp1256",
)  # fmt: skip
MAX_BYTES = 1 << 20  # of a caption file
ENOUGH_BYTES = 1 << 16  # of text that decide about a folder
DOUBT = 0.01  # charset-normalizer's "chaos" up to which two encodings are equally plausible
LEAD = 0.1  # its "coherence" by which one of them must be ahead
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # without tabs, line breaks and page breaks
MAX_CONTROL = 1 / 20  # share of control characters up to which it is a text with a slip
HIGH_LETTERS = re.compile(r"[^\W\d_\x00-\x7f]{3,}")  # no western language has three accented letters in a row
# No western word contains a symbol or an undefined character.
SYMBOL_IN_WORD = re.compile(r"[^\W\d_](?:(?![\xa0\xad´·ªº°])[\x80-\xbf×÷€‚ƒ„†‡ˆ‰‹•˜›])[^\W\d_]")
ADVICE = "save it as UTF-8"


class UnreadableText(Exception):
    """A caption file can't be decoded. str() is the reason, for the user."""


def decode_unicode(raw: bytes) -> str | None:
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 (with a byte order mark, or unmistakable).

    Returns:
        The text, or None if it is not Unicode.
    Raises:
        UnreadableText: It is damaged or not a text.
    """
    for mark, encoding in BOMS:
        if raw.startswith(mark):
            text = _decode(raw, encoding)
            if text is None:
                raise UnreadableText(f"is damaged: it is not valid {encoding.removesuffix('-sig').upper()}; {ADVICE}")
            return _checked(text)
    if b"\0" in raw:
        return _checked(_utf16_without_mark(raw))
    text = _decode(raw, "utf-8")
    return None if text is None else _checked(text)


def is_western(raw: bytes) -> bool:
    """Return whether a text that is not Unicode is plausible as Windows-1252."""
    text = _decode(raw, WESTERN)
    return (
        text is not None and not _is_binary(text) and not HIGH_LETTERS.search(text) and not SYMBOL_IN_WORD.search(text)
    )


def encoding_of(texts: Iterable[bytes]) -> str:
    """Return the encoding of texts that are not Unicode and come from one place, or "" if it is in doubt."""
    pool, size = [], 0
    for raw in texts:
        if _is_binary(raw.decode("latin-1")):
            continue
        pool.append(raw)
        size += len(raw)
        if size >= ENOUGH_BYTES:
            break
    if all(map(is_western, pool)):
        return WESTERN
    try:
        from charset_normalizer import from_bytes
    except ImportError:  # comes with requests, which huggingface_hub's older versions and diffusers need
        return ""
    matches = list(from_bytes(b"\n".join(pool), cp_isolation=list(REGIONAL)))
    least = min((match.chaos for match in matches), default=0.0)
    ranked = sorted((m for m in matches if m.chaos <= least + DOUBT), key=lambda match: -match.coherence)
    is_sure = len(ranked) == 1 or (len(ranked) > 1 and ranked[0].coherence > ranked[1].coherence + LEAD)
    return ranked[0].encoding if is_sure else ""


def decode_regional(raw: bytes, encoding: str) -> tuple[str, str]:
    """Return a text that is not Unicode, and its encoding.

    Args:
        raw: The file.
        encoding: That of its folder, see encoding_of; "" if it is in doubt.
    Raises:
        UnreadableText: It is in doubt.
    """
    for name in filter(None, (encoding, WESTERN if is_western(raw) else "")):
        text = _decode(raw, name)
        if text is not None and not _is_binary(text):
            return text, name
    raise UnreadableText(f"is not UTF-8, and its encoding can't be told for sure; {ADVICE}")


def _utf16_without_mark(raw: bytes) -> str:
    """Return a text that contains NUL bytes: UTF-16 without a byte order mark, or not a text."""
    for encoding in ("utf-16-le", "utf-16-be"):
        text = _decode(raw, encoding)
        # ASCII has a NUL in every other byte; read with the other byte order, it is no letter.
        if text is not None and sum(char < "\x80" for char in text) * 2 > len(text) and not _is_binary(text):
            return text
    raise UnreadableText(f"contains NUL bytes: it is not a text, or UTF-16 without a byte order mark; {ADVICE}")


def _checked(text: str) -> str:
    if _is_binary(text):
        raise UnreadableText("is not a text: it contains control characters; replace it with a text in UTF-8")
    return text


def _is_binary(text: str) -> bool:
    return "\0" in text or len(CONTROL.findall(text)) > MAX_CONTROL * len(text)


def _decode(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None
