"""What of the running workflow is written into the LoRA: enough to run it again, and the same from the editor and headless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..trainer_core.host import Host


def recorded_prompt(host: Host) -> dict[str, Any]:
    """The running node and all that leads to it, in ComfyUI's API form, ordered by node id; titles and foreign nodes' looks are left out."""
    prompt = host.prompt
    wanted: set[str] = set()
    waiting = [host.node_id] if host.node_id in prompt else []
    while waiting:
        node_id = waiting.pop()
        if node_id in wanted or node_id not in prompt:
            continue
        wanted.add(node_id)
        waiting.extend(value[0] for value in prompt[node_id]["inputs"].values() if _is_link(value, prompt))
    return {
        node_id: {
            "class_type": prompt[node_id]["class_type"],
            "inputs": dict(sorted(prompt[node_id]["inputs"].items())),
        }
        for node_id in sorted(wanted)
    }


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[0] in prompt and isinstance(value[1], int)
