"""The workflow that is saved in the LoRA file: enough to run it again, and the same from the editor and headless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..trainer_core.host import Host
from ..trainer_core.spec import check_value
from . import CATALOGUE


def record_prompt(host: Host) -> dict[str, Any]:
    """Return the running node and all its upstream nodes, in ComfyUI's API format, ordered by node id.

    ComfyUI converts numbers to the type of a field before it runs a node, and an export may leave out defaults.
    Therefore values are converted and defaults are added here. Titles are left out.
    """
    prompt = host.prompt
    visited: set[str] = set()
    pending = [host.node_id] if host.node_id in prompt else []
    while pending:
        node_id = pending.pop()
        if node_id not in visited:
            visited.add(node_id)
            pending.extend(value[0] for value in prompt[node_id]["inputs"].values() if _is_link(value, prompt))
    return {node_id: _record_inputs(prompt[node_id], prompt) for node_id in sorted(visited)}


def _record_inputs(node: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    values = node["inputs"]
    if node["class_type"] not in CATALOGUE:
        return {"class_type": node["class_type"], "inputs": dict(sorted(values.items()))}
    inputs = {}
    unrecorded = getattr(CATALOGUE[node["class_type"]].inputs, "UNRECORDED", ())
    for field in sorted(CATALOGUE[node["class_type"]].fields(), key=lambda field: field.name):
        if field.name in unrecorded:
            continue
        if field.name in values and _is_link(values[field.name], prompt):
            inputs[field.name] = list(values[field.name])
        elif field.is_widget:
            inputs[field.name] = check_value(field, values.get(field.name, field.default))[0]
    return {"class_type": node["class_type"], "inputs": inputs}


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[0] in prompt and isinstance(value[1], int)
