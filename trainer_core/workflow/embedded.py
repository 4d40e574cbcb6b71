"""Extract a workflow's JSON from a JSON file, the text chunks of a PNG, or the header of a safetensors file.

Images and LoRAs may contain both formats. `prompt`, the API format, is preferred because it is what was executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lora_metadata import read_header
from .png_metadata import PNG_MAGIC, read_texts

MAX_BYTES = 64 << 20  # of a workflow's text; the largest known workflows have about 5 MB
KEYS = ("prompt", "workflow")
NO_IMAGE_WORKFLOW = "the image contains no workflow; use one that ComfyUI saved with metadata, or an exported .json"
NO_FILE_WORKFLOW = (
    "the file contains no workflow; use a LoRA that ChromaTrainer saved from a workflow, or an exported .json"
)


def read_carrier(path: Path) -> Any:
    """Return the JSON value in a file, whose format is detected from its content rather than from its name.

    Raises:
        UserError: The file can't be read, contains no workflow, or contains invalid JSON.
    """
    if path.is_dir():
        raise UserError.at(str(path), "is a folder; choose a workflow file in it")
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
        size = path.stat().st_size
        if start.startswith(PNG_MAGIC):
            return _parse_first(path, read_texts(path, MAX_BYTES), NO_IMAGE_WORKFLOW)
        if path.suffix.lower() == ".safetensors" or _is_safetensors(start):
            return _parse_first(path, _read_metadata(path), NO_FILE_WORKFLOW)
        if size > MAX_BYTES:
            message = f"is {size >> 20} MiB in size; a workflow has at most {MAX_BYTES >> 20} MiB"
            raise UserError.at(str(path), message)
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        reason = error.strerror or error
        raise UserError.at(str(path), f"can't be read: {reason}; use a .json, .png or .safetensors file") from error


def _is_safetensors(start: bytes) -> bool:
    """Return whether the file starts with an 8-byte little-endian length below 2^32 and then a JSON object.

    JSON text never contains zero bytes.
    """
    return start[4:] == b"\0\0\0\0{"


def _read_metadata(path: Path) -> Any:
    return read_header(path).get("__metadata__")


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
        UserError: The bytes are not UTF-8, not JSON, or nested too deeply.
    """
    if not raw.strip():
        raise UserError.at(where, "is empty; export the workflow again")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}); save it as UTF-8, or use a .json, .png or .safetensors file"
        raise UserError.at(where, message) from error
    except json.JSONDecodeError as error:
        fix = (
            "is not a PNG either; use an image that ComfyUI saved"
            if where.endswith(".png")
            else "export the workflow again"
        )
        message = f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}; {fix}"
        raise UserError.at(where, message) from error
    except RecursionError as error:
        raise UserError.at(where, "is nested too deeply to be a workflow; export it again") from error
    except ValueError as error:  # a number with thousands of digits
        raise UserError.at(where, "has a number that is too long; export the workflow again") from error
