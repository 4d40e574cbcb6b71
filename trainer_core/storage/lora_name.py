"""The name of a LoRA as people type it: with its ending, in a subfolder, with a date, as in ComfyUI's SaveImage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ..errors import quoted

ENDING = ".safetensors"
MAX_BYTES = 120
PLACEHOLDER = re.compile(r"%([A-Za-z][^%/\\]*)%")
DATE_FORMAT = "yyyy-MM-dd"  # of %date%
DATE_PARTS = re.compile(r"yyyy|yy|MM|M|dd|d|hh|h|mm|m|ss|s")  # of %date:...%, as ComfyUI's page reads them
NAMED_PARTS = {"year": "yyyy", "month": "MM", "day": "dd", "hour": "hh", "minute": "mm", "second": "ss"}
STRFTIME = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
PART_PATTERN = re.compile(r"[^<>:\"/\\|?*\x00-\x1f]+")
PORTS = [f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"]
RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$", *PORTS})  # by Windows, with any ending


def resolve_name(typed: str, now: datetime) -> str:
    """Return the name without its ending, with / between subfolders, and with the date in place of %date%.

    `%date:yyyy-MM-dd%` and its like are those of ComfyUI's page, `%year%` to `%second%` those of its SaveImage.
    """
    name = PLACEHOLDER.sub(lambda match: _expand(match, now), typed).replace("\\", "/")
    return name[: -len(ENDING)] if name.lower().endswith(ENDING) else name


def _expand(match: re.Match[str], now: datetime) -> str:
    kind, _, form = match[1].partition(":")
    if kind == "date":
        return DATE_PARTS.sub(lambda part: _date_part(part[0], now), form or DATE_FORMAT)
    return _date_part(NAMED_PARTS[kind], now) if match[1] in NAMED_PARTS else match[0]


def _date_part(part: str, now: datetime) -> str:
    text = now.strftime(STRFTIME[part if part in STRFTIME else part * 2])
    return text if part in STRFTIME else str(int(text))


def numbered(path: Path) -> Iterator[Path]:
    """Yield NAME-2, NAME-3 and so on, in the folder of a path and with its ending."""
    return (path.with_stem(f"{path.stem}-{number}") for number in range(2, 1_000_000))


def free_path(path: Path) -> Path:
    """Return the path, or the first of NAME-2, NAME-3 and so on that nothing has. A broken link counts too."""
    return path if not os.path.lexists(path) else next(other for other in numbered(path) if not os.path.lexists(other))


def faults_of_name(typed: str) -> list[str]:
    """Return what is wrong with a name, one sentence for each fault."""
    name = resolve_name(typed, datetime(2000, 12, 31, 23, 59, 59))
    faults = []
    unknown = PLACEHOLDER.search(name)
    if unknown:
        known = ", ".join(f"%{part}%" for part in NAMED_PARTS)
        faults.append(
            f"{unknown[0]!r} is not known here; use %date%, %date:yyyy-MM-dd%, {known}, or type the value itself"
        )
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        faults.append(
            f"{quoted(typed)} is outside the folder of LoRAs; use a name, or a path within it such as styles/my-lora"
        )
    elif not all(is_portable(part) for part in parts):
        faults.append(
            f"{quoted(typed)} is not a valid file name on every system; use letters, digits, spaces, - and _, and / for "
            "subfolders"
        )
    size = len(name.encode("utf-8", "replace"))
    return [*faults, *([f"is {size} bytes long; use at most {MAX_BYTES}"] if size > MAX_BYTES else [])]


def faults_of_folder(name: str) -> list[str]:
    """Return what is wrong with the name of a folder, which may have / between subfolders."""
    if not name:
        return ["is empty; enter a name"]
    if not all(is_portable(part) and part.isprintable() and not part.startswith(".") for part in name.split("/")):
        rule = "use letters, digits, spaces, - and _, and / for subfolders; no dot in front"
        return [f"{name[:60]!r} is not a valid folder name on every system; {rule}"]
    size = len(name.encode("utf-8", "replace"))
    return [f"is {size} bytes long; use at most {MAX_BYTES}"] if size > MAX_BYTES else []


def is_portable(part: str) -> bool:
    """Return whether this can be the name of a file or folder on Linux, Windows and macOS."""
    reserved = part.partition(".")[0].strip().lower() in RESERVED_NAMES
    return bool(PART_PATTERN.fullmatch(part)) and part == part.strip(" .") and not reserved
