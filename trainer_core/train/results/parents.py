"""The LoRA that a run starts from, and those that it was made from, by digest: the family tree in a LoRA's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.adapter import NO_LORA
from ...config.request import TrainRequest
from ...errors import UserError, reason_of
from ...storage.atomic import sha256_of
from ...storage.bounded_files import Unusable, parse_json
from ...storage.safetensors_header import read_header

RECORDS = ("chroma_trainer", "chroma_trainer_edit")  # metadata of a trained LoRA, and of one that a tool made
FIELDS = {"name": str, "sha256": str, "step": int}
MAX_GENERATIONS, MAX_PARENTS, MAX_TEXT = 16, 64, 200


def parents_of(request: TrainRequest) -> list[dict[str, Any]]:
    """Return init_lora as a list of one: its name, sha256, the steps of its training, and its own parents.

    Raises:
        UserError: It can't be read.
    """
    if request.adapter.init_lora == NO_LORA:
        return []
    path = Path(request.adapter.init_lora)
    try:
        metadata, digest = read_header(path).metadata, sha256_of(path)
    except (OSError, ValueError) as error:
        raise UserError.at("init_lora", f"{path.name} can't be read: {reason_of(error)} ({path})") from error
    records = [_object(metadata.get(name, "{}")) for name in RECORDS]
    step = next((record["step"] for record in records if isinstance(record.get("step"), int)), None)
    parents = [parent for record in records for parent in _clean(record.get("parents"), MAX_GENERATIONS)]
    own: dict[str, Any] = {"name": path.name, "sha256": digest}
    return [own | ({"step": step} if step is not None else {}) | ({"parents": parents} if parents else {})]


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = parse_json(text)
    except Unusable:  # of another tool, or damaged; `inspect` says so
        return {}
    return value if isinstance(value, dict) else {}


def _clean(parents: Any, generations: int) -> list[dict[str, Any]]:
    """Return the parents that a record names, without anything else that is in it."""
    if not isinstance(parents, list) or not generations:
        return []
    cleaned = []
    for parent in parents[:MAX_PARENTS]:
        if not isinstance(parent, dict):
            continue
        own = {name: parent[name] for name, kind in FIELDS.items() if isinstance(parent.get(name), kind)}
        own = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in own.items()}
        elders = _clean(parent.get("parents"), generations - 1)
        cleaned.append(own | ({"parents": elders} if elders else {}))
    return cleaned
