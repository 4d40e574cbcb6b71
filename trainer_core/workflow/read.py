"""Read any workflow that ComfyUI writes: the editor's format or the API format, from JSON, an image or a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.local_values import with_local_values
from .api_format import api_from_graph, graph_from_api, looks_like_api
from .editor.convert import graph_from_editor, looks_like_editor
from .embedded import read_carrier
from .graph import Graph, Schema

HOW_TO_EXPORT = (
    "export one from ComfyUI's menu (Workflow > Export or Export (API)); of another trainer's configuration, "
    "chroma-trainer import makes one"
)


def read_workflow(path: Path, schemas: Mapping[str, Schema]) -> Graph:
    """Return the workflow in a file.

    The file is a .json in either format, a .png saved by ComfyUI, or a .safetensors that contains a workflow.

    Args:
        path: The file.
        schemas: Widget orders by node type, because the editor saves values by position.

    Raises:
        UserError: The file does not exist, or its workflow is missing or broken; all problems are listed.
    """
    data = read_carrier(Path(path))
    if isinstance(data, dict) and "request" in data and "workflow" in data:  # a run's request.json
        data = {**data, "workflow": with_local_values(data["workflow"], Path(path).parent)}
    return graph_from_json(data, schemas, str(path))


def graph_from_json(data: Any, schemas: Mapping[str, Schema], where: str = "workflow") -> Graph:
    """Return the workflow in a JSON value.

    Args:
        data: The JSON value.
        schemas: Widget orders by node type.
        where: Name of the workflow in error messages.

    Raises:
        UserError: It is not a workflow, or a broken one.
    """
    if isinstance(data, dict) and looks_like_api(data.get("prompt")):
        data = data["prompt"]  # the body of a request to ComfyUI's /prompt
    elif isinstance(data, dict) and "request" in data and looks_like_api(data.get("workflow")):
        data = data["workflow"]  # a run's request.json
    if looks_like_editor(data):
        return graph_from_editor(data, schemas, where)
    if looks_like_api(data):
        return graph_from_api(data, schemas, where)
    raise UserError.at(where, f"is JSON, but not a ComfyUI workflow; {HOW_TO_EXPORT}")


def to_api(graph: Graph) -> dict[str, dict[str, Any]]:
    """Return ComfyUI's API format: {id: {"class_type", "inputs", "_meta": {"title"}}}, with a link as [id, slot]."""
    return api_from_graph(graph)
