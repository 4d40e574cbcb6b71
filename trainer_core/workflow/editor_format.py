"""The editor's own format -> Graph, by the rules with which the page makes its prompt.

Subgraphs are unfolded (ids "instance:inner"), muted nodes and what only the editor knows are left out, links are followed to
the nodes that run, and positions in `widgets_values` become names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..problems import Problem, UserError
from .canvas import BYPASS, NEVER, CanvasNode, parse_document
from .graph import Graph, Link, Node, Schema
from .lines import VIRTUAL, Constant, Muted, Scope, source_of
from .subgraphs import unfold
from .widget_values import values_of

REWRITTEN_PREFIX = re.compile(r"%(date:[^%]*|[^%]+\.[^%]+)%")
DYNAMIC_PROMPT = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*(?<!\\)\}")
SAVERS = ("SaveImage",)
GROUP_NODE = ("workflow>", "workflow/")


def looks_like_editor(data: Any) -> bool:
    """An object with a list of nodes."""
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def graph_from_editor(data: dict[str, Any], schemas: Mapping[str, Schema], where: str) -> Graph:
    """The graph that the page would send.

    Raises:
        UserError: every fault of the file.
    """
    problems: list[Problem] = []
    main, definitions = parse_document(data, problems, where)
    root = unfold(main, definitions, schemas, problems, where)
    nodes: dict[str, Node] = {}
    for scope, node in _running(root):
        if node.type.startswith(GROUP_NODE):
            problems.append(Problem("", "is a group node, which ComfyUI has replaced; open the workflow there, turn it into a subgraph, export again", scope.prefix + node.id, node.type))
            continue
        made = _node(scope, node, schemas.get(node.type), problems)
        nodes[made.id] = made
    if problems:
        raise UserError(problems)
    return Graph({key: _without_muted(node, nodes) for key, node in nodes.items()}, "ui", data)


def _running(scope: Scope) -> Iterator[tuple[Scope, CanvasNode]]:
    for node in scope.canvas.nodes.values():
        if node.mode in (NEVER, BYPASS) or node.type in VIRTUAL:
            continue
        if node.id in scope.children:
            yield from _running(scope.children[node.id])
        else:
            yield scope, node


def _node(scope: Scope, node: CanvasNode, schema: Schema | None, problems: list[Problem]) -> Node:
    node_id = scope.prefix + node.id
    inputs: dict[str, Any] = values_of(node, schema)
    inputs.update({name: value for (owner, name), value in scope.inner.items() if owner == node.id and name in inputs})
    for slot in node.inputs:
        source = source_of(scope, slot)
        if isinstance(source, Problem):
            problems.append(source.at(node_id, node.type))
        elif isinstance(source, Constant):
            inputs[slot.name] = source.value
        elif isinstance(source, Muted):
            inputs.pop(slot.name, None)
        elif isinstance(source, Link):
            inputs[slot.name] = source
    problems += [problem.at(node_id, node.type) for problem in _rewritten(node, inputs, schema)]
    return Node(node_id, node.type, node.title or (schema.title if schema else "") or node.type, inputs)


def _without_muted(node: Node, nodes: Mapping[str, Node]) -> Node:
    """Inputs from nodes that do not run vanish."""
    inputs = {name: value for name, value in node.inputs.items() if not isinstance(value, Link) or value.node in nodes}
    return Node(node.id, node.type, node.title, inputs)


def _rewritten(node: CanvasNode, inputs: Mapping[str, Any], schema: Schema | None) -> Iterator[Problem]:
    """Texts that the page rewrites each time it queues, so that no two runs are the same."""
    prefix = inputs.get("filename_prefix")
    if node.type in SAVERS and isinstance(prefix, str) and REWRITTEN_PREFIX.search(prefix):
        yield Problem("filename_prefix", f"{prefix!r} is filled in by ComfyUI's page, headless it can't be; write a plain name, or use Export (API)")
    for widget in schema.widgets if schema else ():
        text = inputs.get(widget.name)
        if widget.dynamic_prompts and isinstance(text, str) and DYNAMIC_PROMPT.search(text):
            yield Problem(widget.name, "has a choice {a|b}, from which ComfyUI's page draws; write one of them, or use Export (API)")
