"""Expand subgraph definitions into scopes, one for each instance."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import Problem, UserError
from ..graph import Schema
from .graph_json import AGAIN, Canvas, CanvasNode
from .links import Scope
from .promoted_widgets import Promotion

MAX_NODES = 20_000  # after expansion: nested definitions multiply
MAX_DEPTH = 32
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def unfold(
    main: Canvas, definitions: Mapping[str, Canvas], schemas: Mapping[str, Schema], problems: list[Problem], where: str
) -> Scope:
    """Return the scope of the main canvas, with nested scopes for all subgraph instances.

    Raises:
        UserError: A subgraph contains itself, they are nested too deeply, or the result is too large.
    """
    fault = _check_nesting(main, definitions, (), {})
    if fault:
        raise UserError([*problems, Problem(where, fault)])
    promotion = Promotion(definitions, schemas)
    root = Scope(main)
    waiting, num_nodes = [root], len(main.nodes)
    while waiting:
        scope = waiting.pop()
        for node in scope.canvas.nodes.values():
            definition = definitions.get(node.type)
            if definition is None:
                problems += _find_undefined(scope, node)
                continue
            num_nodes += len(definition.nodes)
            if num_nodes > MAX_NODES:
                fault = f"has more than {MAX_NODES} nodes after its subgraphs are expanded; export a smaller one"
                raise UserError([*problems, Problem(where, fault)])
            child = Scope(definition, f"{scope.prefix}{node.id}:", node, scope, *promotion.values(scope.inner, node))
            scope.children[node.id] = child
            waiting.append(child)
    return root


def _check_nesting(
    canvas: Canvas, definitions: Mapping[str, Canvas], path: tuple[str, ...], depths: dict[str, int]
) -> str:
    """Return what is wrong with the nesting of definitions, or "".

    Args:
        canvas: Where to start.
        definitions: Subgraph definitions by id.
        path: Definitions that lead to the canvas.
        depths: Depth of each definition that has been checked; filled here.
    """
    deepest = 0
    for kind in dict.fromkeys(node.type for node in canvas.nodes.values() if node.type in definitions):
        if kind in path:
            cycle = " > ".join(definitions[key].name or key for key in (*path[path.index(kind) :], kind))
            return f"has a subgraph that contains itself: {cycle}; remove the innermost one"
        if kind not in depths and len(path) < MAX_DEPTH:
            fault = _check_nesting(definitions[kind], definitions, (*path, kind), depths)
            if fault:
                return fault
        deepest = max(deepest, 1 + depths.get(kind, 0))
        if len(path) + deepest > MAX_DEPTH:
            return f"has subgraphs nested more than {MAX_DEPTH} levels deep; export a simpler workflow"
    if path:
        depths[path[-1]] = deepest
    return ""


def _find_undefined(scope: Scope, node: CanvasNode) -> list[Problem]:
    if not UUID.fullmatch(node.type):
        return []
    message = f"is a subgraph that the workflow does not define; {AGAIN}"
    return [Problem("", message, scope.prefix + node.id, node.title or node.type)]
