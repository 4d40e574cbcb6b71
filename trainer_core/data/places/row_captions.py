"""Captions of images that come with a row of named values: of a parquet file, or of a table of addresses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..tables.caption_row import CAPTION_COLUMNS

MAX_TEXT = 1 << 20  # characters of a row


def row_json(values: Mapping[str, Any]) -> bytes:
    """Return the values of a row that can be captions, weights, boxes or sizes, as a .json file beside the image."""
    texts = {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | list)}
    raw = json.dumps(texts, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    return raw if len(raw) <= MAX_TEXT else b"{}"


def row_caption(raw: bytes) -> str | None:
    """Return the usual caption of a row, one line for each of several; None if it has none."""
    values = json.loads(raw)
    value = next((values[name] for name in CAPTION_COLUMNS if values.get(name)), None)
    texts = value if isinstance(value, list) else [value]
    lines = [" ".join(text.split()) for text in texts if isinstance(text, str)]
    return "\n".join(filter(None, lines)) or None
