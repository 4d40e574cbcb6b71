"""Convert the editor's own format to a Graph, by the rules that the web page uses to build its prompt.

Subgraphs are expanded (ids "instance:inner"), muted nodes and editor-only nodes are left out, links are followed to the
nodes that run, and positions in `widgets_values` become names.
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
REWRITTEN = re.compile(r"%(date:[^%.]*|[^%.]+\.[^%.]+)%")  # the web page inserts the time, or another node's value
PREFIXES = {"SaveImage": "filename_prefix"}  # of the nodes that also run headless


def looks_like_editor(data: Any) -> bool:
    """Return whether this is an object with a list of nodes."""
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def graph_from_editor(data: dict[str, Any], schemas: Mapping[str, Schema], where: str) -> Graph:
    """Return the graph that the web page would send.

    Raises:
        UserError: Every problem of the file.
    """
    problems: list[Problem] = []
    main, definitions = parse_document(data, problems, where)
    root = unfold(main, definitions, schemas, problems, where)
    nodes: dict[str, Node] = {}
    for scope, canvas_node in _iterate_active(root):
        node = _convert_node(scope, canvas_node, schemas.get(canvas_node.type), problems)
        problems += [problem.at(node.id, node.type) for problem in _find_unsupported(node)]
        nodes[node.id] = node
    if problems:
        raise UserError(problems)
    return Graph({node_id: _drop_dead_links(node, nodes) for node_id, node in nodes.items()}, "ui", data)


def _iterate_active(scope: Scope) -> Iterator[tuple[Scope, CanvasNode]]:
    """Yield every node that runs, with its scope."""
    for node in scope.canvas.nodes.values():
        if node.mode in (NEVER, BYPASS) or node.type in VIRTUAL:
            continue
        if node.id in scope.children:
            yield from _iterate_active(scope.children[node.id])
        else:
            yield scope, node


def _convert_node(scope: Scope, node: CanvasNode, schema: Schema | None, problems: list[Problem]) -> Node:
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


def _drop_dead_links(node: Node, nodes: Mapping[str, Node]) -> Node:
    """Remove links to nodes that do not run, as the web page does."""
    inputs = {name: v for name, v in node.inputs.items() if not isinstance(v, Link) or v.node in nodes}
    return replace(node, inputs=inputs)


def _find_unsupported(node: Node) -> Iterator[Problem]:
    """Yield a problem for everything that only the web page can do."""
    if node.type.startswith(GROUP_NODE):
        yield Problem(
            "", "is a group node of an old ComfyUI version; convert it to a subgraph in the editor, then export again"
        )
    prefix = node.inputs.get(PREFIXES.get(node.type, ""))
    if isinstance(prefix, str) and REWRITTEN.search(prefix):
        message = f"{prefix!r} is filled in by ComfyUI's web page; use a plain name, or Export (API)"
        yield Problem(PREFIXES[node.type], message)
