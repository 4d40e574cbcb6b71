"""Every problem of a workflow at once, before anything is loaded. Needs neither torch nor ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..errors import Problem
from ..host import Host, collect
from ..spec import NodeSpec, draft_inputs
from .graph import Graph, Node
from .images import SAVERS
from .resolve import LITERALS, PENDING, Resolved, resolve, unknown_types

SHOWN = 5  # names in a message


def check(graph: Graph, catalogue: Mapping[str, NodeSpec], host: Host) -> list[Problem]:
    """All faults, in the order in which the nodes would run; an empty list means that a run can begin.

    Light nodes are run, so that a folder that is not there is found here; heavy ones are asked for their preflight.
    """
    problems = unknown_types(graph, catalogue)
    if not any(node.type in catalogue and catalogue[node.type].is_output for node in graph.nodes.values()):
        outputs = " or ".join(spec.id for spec in catalogue.values() if spec.is_output)
        foreign = list_skipped(graph, catalogue)
        only_there = foreign and not any(node.type in catalogue for node in graph.nodes.values())
        beside = f": its nodes run in ComfyUI alone ({_some(foreign)})" if only_there else ""
        problems.append(Problem("workflow", f"has nothing to run{beside}; add a {outputs} node"))
    values: dict[str, tuple[Any, ...]] = {}
    order = collect(problems, graph.order) or tuple(graph.nodes)
    for node_id in order:  # type: ignore[union-attr]
        node = graph.nodes[node_id]
        if node.type not in catalogue:
            continue
        spec = catalogue[node.type]
        found = resolve(node, graph, catalogue, values)
        missing = {problem.field for problem in found.problems}
        draft = draft_inputs(spec, found.values)
        faults = found.problems + [fault for fault in draft.problems if fault.field not in missing]
        if spec.light and draft.complete and found.complete:
            faulty, sound = {fault.field for fault in faults}, not faults
            ran: list[Problem] = []
            result = collect(ran, spec.run, draft.inputs, host)
            faults += [fault for fault in ran if fault.field not in faulty]
            if result is not None and sound:
                values[node_id] = result  # type: ignore[assignment]
        elif spec.preflight and not faults and _is_known(spec, node, found):
            faults.extend(spec.preflight(_without_pending(draft.inputs), host))
        problems.extend(fault.at(node.id, node.type) for fault in faults)
    return problems


def _is_known(spec: NodeSpec, node: Node, found: Resolved) -> bool:
    """All that a preflight looks at is there; optional connections may come from nodes that have not run."""
    optional = {field.name for field in spec.fields() if field.socket and not field.required}
    return all(found.values.get(name, PENDING) is not PENDING for name in node.inputs.keys() - optional)


def _without_pending(inputs: Any) -> Any:
    """The same inputs, with nothing connected where the value is not there: its node comes later, or has a fault of its own."""
    pending = {field.name: None for field in fields(inputs) if getattr(inputs, field.name) is PENDING}
    return replace(inputs, **pending)


def _some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def list_skipped(graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[str]:
    """Nodes that a headless run leaves out, as "9 (LoraLoader)"."""
    return [
        f"{node.id} ({node.type})"
        for node in graph.nodes.values()
        if node.type not in catalogue and node.type not in SAVERS and node.type not in LITERALS
    ]
