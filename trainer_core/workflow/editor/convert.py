"""The editor's own format -> Graph, by the rules with which the page makes its prompt.

Subgraphs are unfolded (ids "instance:inner"), muted nodes and what only the editor knows are left out, lines are
followed to the nodes that run, and positions in `widgets_values` become names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...errors import Problem, UserError
from ..graph import Graph, Link, Node, Schema
from .graph_json import BYPASS, NEVER, CanvasNode, parse_document
from .links import VIRTUAL, Constant, Scope, source_of
from .subgraphs import unfold
from .widget_values import values_of

GROUP_NODE = ("workflow>", "workflow/")
REWRITTEN = re.compile(r"%(date:[^%.]*|[^%.]+\.[^%.]+)%")  # the page puts in the time, or another node's value
PREFIXES = {"SaveImage": "filename_prefix"}  # of the nodes that run headless


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
    for scope, canvas_node in _running(root):
        node = _node(scope, canvas_node, schemas.get(canvas_node.type), problems)
        problems += [problem.at(node.id, node.type) for problem in _beyond_us(node)]
        nodes[node.id] = node
    if problems:
        raise UserError(problems)
    return Graph({node_id: _without_dropped(node, nodes) for node_id, node in nodes.items()}, "ui", data)


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
        elif source is not None:
            inputs[slot.name] = source
    return Node(node_id, node.type, node.title or (schema.title if schema else "") or node.type, inputs)


def _without_dropped(node: Node, nodes: Mapping[str, Node]) -> Node:
    """Links to what does not run vanish, as in the page."""
    kept = {name: v for name, v in node.inputs.items() if not isinstance(v, Link) or v.node in nodes}
    return replace(node, inputs=kept)


def _beyond_us(node: Node) -> Iterator[Problem]:
    """What only the page can do."""
    if node.type.startswith(GROUP_NODE):
        yield Problem("", "is a group node of an old ComfyUI; turn it into a subgraph in the editor, then export again")
    prefix = node.inputs.get(PREFIXES.get(node.type, ""))
    if isinstance(prefix, str) and REWRITTEN.search(prefix):
        message = f"{prefix!r} is filled in by ComfyUI's page; write a plain name, or use Export (API)"
        yield Problem(PREFIXES[node.type], message)
