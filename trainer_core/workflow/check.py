"""Report every problem of a workflow at once, before anything is loaded. Needs neither torch nor ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from ..errors import Problem
from ..host import Host, collect
from ..spec import Draft, NodeSpec, draft_inputs
from .graph import Graph, Link, Node
from .images import SAVERS, saver_problems
from .recordable import value_problems
from .resolve import LITERALS, PENDING, Resolved, resolve, unknown_types

NUM_SHOWN = 5  # names in an error message


def check(
    graph: Graph,
    catalogue: Mapping[str, NodeSpec],
    host: Host,
    warnings: list[str] | None = None,
    connections: bool = True,
) -> list[Problem]:
    """Return all problems, in the order in which the nodes would run; an empty list means that the run can start.

    Light nodes are executed, so that a missing folder, for example, is found here. Heavy nodes run their preflight.

    Args:
        warnings: receives what the nodes' review finds, which is no problem. None: the nodes are not reviewed.
        connections: Whether connections are checked as well. ComfyUI checks them itself, and runs all nodes.
    """
    problems = unknown_types(graph, catalogue)
    if not any(node.type in catalogue and catalogue[node.type].is_output for node in graph.nodes.values()):
        foreign = list_skipped(graph, catalogue)
        comfyui_only = foreign and not any(node.type in catalogue for node in graph.nodes.values())
        detail = f": its nodes can only run in ComfyUI ({_join_names(foreign)})" if comfyui_only else ""
        problems.append(Problem("workflow", f"has nothing to run{detail}; add a {_names_of_runs(catalogue)} node"))
    for node in graph.nodes.values():
        problems += value_problems(node)
        if node.type in SAVERS:
            problems += saver_problems(node, graph, catalogue)
    values: dict[str, tuple[Any, ...]] = {}
    owners: dict[tuple[str, str], str] = {}
    made: dict[str, Any] = {}  # inputs by node id
    order = collect(problems, graph.order) or tuple(graph.nodes)
    for node_id in order:  # type: ignore[union-attr]
        node = graph.nodes[node_id]
        if node.type not in catalogue:
            continue
        spec = catalogue[node.type]
        resolved = resolve(node, graph, catalogue, values)
        missing = {problem.field for problem in resolved.problems}
        draft = draft_inputs(spec, resolved.values)
        faults = (resolved.problems if connections else []) + [
            fault for fault in draft.problems if fault.field not in missing
        ]
        faults += _shared_identity(spec, node, draft, resolved, owners)
        made[node_id] = _without_pending(draft.inputs)
        if spec.accepts and not faults:
            links = {name: value for name, value in node.inputs.items() if isinstance(value, Link)}
            sources = {name: made[link.node] for name, link in links.items() if link.node in made}
            faults += spec.accepts(made[node_id], sources)
        if spec.within and not faults:
            faults += spec.within(made[node_id], graph, node_id)
        if quick_run := _quick_run(spec, node, draft, resolved, connections):
            faulty_fields, is_sound = {fault.field for fault in faults}, not faults and resolved.complete
            run_problems: list[Problem] = []
            result = collect(run_problems, quick_run, made[node_id], host)
            faults += [fault for fault in run_problems if fault.field not in faulty_fields]
            if result is not None and is_sound:
                values[node_id] = result  # type: ignore[assignment]
        elif spec.preflight and not faults and _has_inputs(spec, node, resolved):
            faults.extend(spec.preflight(made[node_id], host))
            if warnings is not None and spec.review and not faults:
                found = collect(faults, spec.review, made[node_id], host)
                if isinstance(found, list):
                    warnings += (f"node {node.id} ({node.type}): {text}" for text in found)
        problems.extend(fault.at(node.id, node.type) for fault in faults)
    return problems


def _names_of_runs(catalogue: Mapping[str, NodeSpec]) -> str:
    """Return the nodes that train, plan or sample: one of them is what a graph without outputs lacks."""
    outputs = (spec for spec in catalogue.values() if spec.is_output)
    return " or ".join(
        spec.id
        for spec in outputs
        if "VALIDATION" in {item.type for item in (*(f.socket for f in spec.fields() if f.socket), *spec.outputs)}
    )


def _shared_identity(
    spec: NodeSpec, node: Node, draft: Draft, resolved: Resolved, owners: dict[tuple[str, str], str]
) -> list[Problem]:
    """Return a problem if an earlier node writes the same file.

    Args:
        owners: node ids by type and identity; this node is added.
    """
    if spec.identity is None:
        return []
    field, value = spec.identity(draft.inputs)
    if isinstance(node.inputs.get(field), Link) and field not in resolved.values:
        return []  # not known yet
    owner = owners.setdefault((spec.id, value.casefold()), node.id)  # as file systems of Windows and macOS compare
    if owner == node.id:
        return []
    return [
        Problem(
            field,
            f"{value!r} is also the {field} of node {owner} ({spec.id}), whose file this node would replace; change "
            "one of them",
        )
    ]


def _has_inputs(spec: NodeSpec, node: Node, resolved: Resolved) -> bool:
    """Return whether everything that a preflight, or the run of a light node, needs is available.

    Optional connections may come from nodes that have not run.
    """
    optional = {field.name for field in spec.fields() if field.socket and not field.required}
    return all(resolved.values.get(name, PENDING) is not PENDING for name in node.inputs.keys() - optional)


def _quick_run(
    spec: NodeSpec, node: Node, draft: Draft, resolved: Resolved, connections: bool
) -> Callable[[Any, Any], tuple[Any, ...]] | None:
    """Return what the check can call for the outputs of a node: the run of a light node, or what is stored."""
    if not draft.complete:
        return None
    if resolved.is_stored:  # in ComfyUI itself, its nodes run and the outputs are made
        return spec.stored if connections and resolved.complete else None
    return spec.run if spec.light and _has_inputs(spec, node, resolved) else None


def _without_pending(inputs: Any) -> Any:
    """Return the inputs with pending values set to None. Their nodes run later, or have problems of their own."""
    pending = {field.name: None for field in fields(inputs) if getattr(inputs, field.name) is PENDING}
    return replace(inputs, **pending)


def _join_names(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more


def list_skipped(graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[str]:
    """Return the nodes that a headless run skips, as "9 (LoraLoader)"."""
    return [
        f"{node.id} ({node.type})"
        for node in graph.nodes.values()
        if node.type not in catalogue and node.type not in SAVERS and node.type not in LITERALS
    ]
