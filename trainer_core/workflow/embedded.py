"""The workflow's JSON out of a file: a JSON file itself, a PNG's text, or a safetensors header.

Pictures and LoRAs may carry both forms: `prompt`, the API's, comes first, because it holds what really ran.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lora_metadata import read_header
from .png_metadata import PNG_MAGIC, read_texts

MAX_BYTES = 64 << 20  # of a workflow's text; the largest in the wild are near 5 MB
KEYS = ("prompt", "workflow")
NO_PICTURE = "the picture carries no workflow; use one that ComfyUI saved with its metadata, or an exported .json"
NO_FILE = "the file carries no workflow; use a LoRA that ChromaTrainer wrote from a workflow, or an exported .json"


def read_carrier(path: Path) -> Any:
    """The JSON value in a file, by what the file is rather than by its name.

    Raises:
        UserError: can't be read, carries none, or carries something that is no JSON.
    """
    if path.is_dir():
        raise UserError.at(str(path), "is a folder; name a workflow file in it")
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
        size = path.stat().st_size
        if start.startswith(PNG_MAGIC):
            return _first(path, read_texts(path, MAX_BYTES), NO_PICTURE)
        if path.suffix.lower() == ".safetensors" or _is_safetensors(start):
            return _first(path, _metadata(path), NO_FILE)
        if size > MAX_BYTES:
            message = f"is {size >> 20} MiB large; a workflow has at most {MAX_BYTES >> 20} MiB"
            raise UserError.at(str(path), message)
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        reason = error.strerror or error
        raise UserError.at(str(path), f"can't be read: {reason}; name a .json, .png or .safetensors file") from error


def _is_safetensors(start: bytes) -> bool:
    """Eight bytes of length, little-endian and below 2^32, then a JSON object. No JSON text has zero bytes."""
    return start[4:] == b"\0\0\0\0{"


def _metadata(path: Path) -> Any:
    return read_header(path).get("__metadata__")


def _first(path: Path, texts: Any, missing: str) -> Any:
    """The first of the two forms that is not empty and reads; a broken one is named where the other can't stand in."""
    errors: list[UserError] = []
    for key in KEYS:
        text = texts.get(key) if isinstance(texts, dict) else None
        if not isinstance(text, str) or not text.strip():
            continue
        try:
            value = parse(text.encode("utf-8", "surrogatepass"), f"{path}, its {key}")
        except UserError as error:
            errors.append(error)
            continue
        if value:
            return value
    raise errors[0] if errors else UserError.at(str(path), missing)


def parse(raw: bytes, where: str) -> Any:
    """JSON from UTF-8 bytes, a byte order mark allowed.

    Raises:
        UserError: not UTF-8, not JSON, nested too deeply.
    """
    if not raw.strip():
        raise UserError.at(where, "is empty; export the workflow again")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = (
            f"is not text in UTF-8 (byte {error.start}); save it as UTF-8, or name a .json, .png or .safetensors file"
        )
        raise UserError.at(where, message) from error
    except json.JSONDecodeError as error:
        remedy = (
            "is no PNG either; name a picture that ComfyUI saved"
            if where.endswith(".png")
            else "export the workflow again"
        )
        message = f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}; {remedy}"
        raise UserError.at(where, message) from error
    except RecursionError as error:
        raise UserError.at(where, "is nested too deeply to be a workflow; export it again") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError.at(where, "has a number that is too long; export the workflow again") from error
