"""Extract a workflow's JSON from a JSON file, the text chunks of a PNG, or the header of a safetensors file.

Images and LoRAs may contain both formats. `prompt`, the API format, is preferred because it is what was executed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.bounded_files import Unusable, open_regular, parse_json, read_regular
from .lora_metadata import read_lora_header
from .png_metadata import PNG_MAGIC, read_texts

MAX_BYTES = 16 << 20  # of a workflow's text; the largest known workflows have about 5 MB
KEYS = ("prompt", "workflow")
CONFIGURATIONS = (".toml", ".yaml", ".yml", ".sh", ".bat", ".ps1", ".env")  # of other trainers
NO_IMAGE_WORKFLOW = "the image contains no workflow; use one that ComfyUI saved with metadata, or an exported .json"
NO_FILE_WORKFLOW = (
    "the file contains no workflow; use a LoRA that ChromaTrainer saved from a workflow, or an exported .json"
)


def read_carrier(path: Path) -> Any:
    """Return the JSON value in a file, whose format is detected from its content rather than from its name.

    Raises:
        UserError: The file can't be read, contains no workflow, or contains invalid JSON.
    """
    try:
        start = _first_bytes(path)
        if start.startswith(PNG_MAGIC):
            return _parse_first(path, read_texts(path, MAX_BYTES), NO_IMAGE_WORKFLOW)
        if path.suffix.lower() == ".safetensors" or _is_safetensors(start):
            return _parse_first(path, read_lora_header(path).metadata, NO_FILE_WORKFLOW)
        raw = read_regular(path, MAX_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise UserError.at(str(path), f"can't be read: {reason}; use a .json, .png or .safetensors file") from error
    except Unusable as error:
        raise UserError.at(str(path), f"{error}; choose a workflow file: .json, .png or .safetensors") from error
    return parse(raw, str(path))


def _first_bytes(path: Path) -> bytes:
    with os.fdopen(open_regular(path), "rb") as stream:
        return stream.read(9)


def _is_safetensors(start: bytes) -> bool:
    """Return whether the file starts with an 8-byte little-endian length below 2^32 and then a JSON object.

    JSON text never contains zero bytes.
    """
    return start[4:] == b"\0\0\0\0{"


def _parse_first(path: Path, texts: Any, missing: str) -> Any:
    """Return the first of the two formats that is not empty and can be parsed.

    If none can, the error is that of the first broken one.
    """
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
    """Parse JSON from UTF-8 bytes, with or without a byte order mark.

    Raises:
        UserError: The bytes are not UTF-8, not JSON, nested too deeply, or have a number with thousands of digits.
    """
    if not raw.strip():
        raise UserError.at(where, "is empty; export the workflow again")
    try:
        return parse_json(
            raw, finite=False
        )  # ComfyUI writes NaN into is_changed; values that are used are checked later
    except Unusable as error:
        raise UserError.at(where, f"{error}; {_suggest_fix(str(error), where)}") from error


def _suggest_fix(reason: str, where: str) -> str:
    if reason.startswith("is not UTF-8"):
        return "save it as UTF-8, or use a .json, .png or .safetensors file"
    if reason.startswith("is not JSON") and where.endswith(".png"):
        return "is not a PNG either; use an image that ComfyUI saved"
    if reason.startswith("is not JSON") and where.lower().endswith(CONFIGURATIONS):
        return f"a workflow of another trainer's configuration is made by: chroma-trainer import {where}"
    return "export the workflow again"
