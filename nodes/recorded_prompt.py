"""What of the running workflow is written into the LoRA: enough to run it again, and the same from the editor and headless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..trainer_core.host import Host
from ..trainer_core.spec import check_value
from . import CATALOGUE


def record_prompt(host: Host) -> dict[str, Any]:
    """The running node and all that leads to it, in ComfyUI's API form, ordered by node id.

    ComfyUI rewrites numbers to a field's type before it runs a node, and an export may leave out defaults; so both are done here.
    Titles are left out.
    """
    prompt = host.prompt
    wanted: set[str] = set()
    waiting = [host.node_id] if host.node_id in prompt else []
    while waiting:
        node_id = waiting.pop()
        if node_id not in wanted:
            wanted.add(node_id)
            waiting.extend(value[0] for value in prompt[node_id]["inputs"].values() if _is_link(value, prompt))
    return {node_id: _record_inputs(prompt[node_id], prompt) for node_id in sorted(wanted)}


def _record_inputs(node: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    given = node["inputs"]
    if node["class_type"] not in CATALOGUE:
        return {"class_type": node["class_type"], "inputs": dict(sorted(given.items()))}
    inputs = {}
    for field in sorted(CATALOGUE[node["class_type"]].fields(), key=lambda field: field.name):
        if field.name in given and _is_link(given[field.name], prompt):
            inputs[field.name] = list(given[field.name])
        elif field.is_widget:
            inputs[field.name] = check_value(field, given.get(field.name, field.default))[0]
    return {"class_type": node["class_type"], "inputs": inputs}


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[0] in prompt and isinstance(value[1], int)
