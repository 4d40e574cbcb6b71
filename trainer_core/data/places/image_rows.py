"""Images that come with a row of named values: of a parquet file, or of a table of addresses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 1 << 20  # characters of a row


def row_json(values: Mapping[str, Any]) -> bytes:
    """Return the values of a row that can be captions, weights, boxes or sizes, as a .json file beside the image."""
    texts = {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | list | None)}
    raw = json.dumps(texts, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    return raw if len(raw) <= MAX_TEXT else b"{}"
