"""Check a whole prompt when it is queued, so that ComfyUI shows every problem on its node before the first node runs.

ComfyUI validates one node after another, each without the values of the others. The prompt is remembered when it
arrives, checked as a headless run is, and each node reports its own problems. Imports no ComfyUI.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from typing import Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host
from ...trainer_core.spec import Field, NodeSpec, check_value
from ...trainer_core.workflow.check import check
from ...trainer_core.workflow.graph import Graph, Link, Node
from ...trainer_core.workflow.read import graph_from_json
from .. import CATALOGUE
from ..widget_schemas import schemas

# A request and its validation are one asyncio task, so that two requests at the same time have a check each.
_current: ContextVar[PromptCheck | None] = ContextVar("chroma_trainer_prompt", default=None)


def remember(request: dict[str, Any], host: Callable[[], Host]) -> dict[str, Any]:
    """Handle a request to /prompt before ComfyUI validates it. Returns the request unchanged."""
    _current.set(PromptCheck(request.get("prompt"), host, str(request.get("client_id") or "")))
    return request


async def problems_of(node_id: str) -> list[Problem]:
    """Return the problems of a node of the prompt that is being validated, without those that ComfyUI reports itself."""
    current = _current.get()
    return await current.problems_of(node_id) if current else []


def asking_page() -> str:
    """Return the client id of the page that queued the prompt that is being validated, "" if no page did."""
    current = _current.get()
    return current.page if current else ""


def message_of(node_id: str, problems: list[Problem]) -> dict[str, Any]:
    """Return the problems of a node for the page, each with the name of its field."""
    return {"node": node_id, "problems": [[problem.field, problem.message] for problem in problems]}


def reported_field(spec: NodeSpec) -> str:
    """Return the field that ComfyUI shows the problems of a node at: the first widget, else the first input.

    It leaves out its own checks of the fields that a node validates, and repeats an error for each of them.
    """
    fields = spec.fields()
    return next((field for field in fields if field.is_widget), fields[0]).name


def text_of(problems: list[Problem], spec: NodeSpec) -> str:
    """Return the problems as ComfyUI shows them after the name of the reported field."""
    first = reported_field(spec)
    problems = sorted(problems, key=lambda problem: problem.field != first)
    return "\n".join(
        problem.message if problem.field == first else f"{problem.field}: {problem.message}" for problem in problems
    )


class PromptCheck:
    """The check of one prompt. It runs once, in a thread, when the first node asks.

    Args:
        prompt: the prompt as it was sent.
        host: returns the host of the check.
        page: client id of the page that queued it.
    """

    def __init__(self, prompt: Any, host: Callable[[], Host], page: str = ""):
        self._prompt, self._host, self.page = prompt, host, page

    async def problems_of(self, node_id: str) -> list[Problem]:
        """Return the problems of a node."""
        return (await self._result).get(node_id, [])

    @cached_property
    def _result(self) -> asyncio.Future[dict[str, list[Problem]]]:
        return asyncio.ensure_future(asyncio.to_thread(self._check))

    def _check(self) -> dict[str, list[Problem]]:
        try:
            graph = as_comfyui_converts(graph_from_json(self._prompt, schemas()))
            problems = check(graph, CATALOGUE, self._host(), connections=False)
        except UserError:  # not a graph: ComfyUI says so itself
            return {}
        except Exception:  # a fault of the check must not stop a prompt that could run
            logging.exception("[ChromaTrainer] the prompt could not be checked before its start")
            return {}
        by_node: dict[str, list[Problem]] = {}
        for problem in problems:
            node = graph.nodes.get(problem.node)
            if node and node.type in CATALOGUE and not _is_reported_by_comfyui(problem, node):
                by_node.setdefault(node.id, []).append(problem)
        return by_node


def as_comfyui_converts(graph: Graph) -> Graph:
    """Return the graph with values of the fields' types: ComfyUI converts them before it runs a node."""
    return replace(graph, nodes={node_id: _converted(node) for node_id, node in graph.nodes.items()})


def _converted(node: Node) -> Node:
    spec = CATALOGUE.get(node.type)
    if spec is None:
        return node
    kinds = {field.name: field.kind for field in spec.fields() if field.is_widget}
    return replace(node, inputs={name: _convert(value, kinds.get(name)) for name, value in node.inputs.items()})


def _convert(value: Any, kind: Any) -> Any:
    if kind not in (int, float, str, bool) or isinstance(value, (Link, dict, list)):
        return value
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _is_reported_by_comfyui(problem: Problem, node: Node) -> bool:
    """Return whether ComfyUI's own validation finds a problem: a missing input, a value out of range or not in a list."""
    fields: Mapping[str, Field] = {field.name: field for field in CATALOGUE[node.type].fields()}
    field = fields.get(problem.field)
    if field is None or problem.field == reported_field(CATALOGUE[node.type]):
        return False
    if problem.field not in node.inputs:
        return field.required
    value = node.inputs[problem.field]
    has_bounds = field.range or field.choice or field.model_file
    return bool(has_bounds and not isinstance(value, Link) and check_value(field, value)[1])
