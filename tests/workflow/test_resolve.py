"""Values that come over links: from literals, from nodes that ran, and from those that have not."""

from __future__ import annotations

from typing import Any

from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.trainer_core.workflow.graph import Graph, Link, Node
from chroma_trainer.trainer_core.workflow.resolve import PENDING, Resolved, resolve


def resolved(inputs: dict[str, Any], *others: Node, outputs: dict[str, tuple] | None = None) -> Resolved:
    """A LoRATrainer's values."""
    trainer = Node("5", "LoRATrainer", "", inputs)
    return resolve(trainer, Graph({node.id: node for node in (trainer, *others)}), CATALOGUE, outputs or {})


def literal(node_id: str, value: Any) -> Node:
    return Node(node_id, "PrimitiveInt", "", {"value": value})


def test_literals_stand_for_their_value():
    assert resolved({"steps": Link("1", 0)}, literal("1", 7)).values == {"steps": 7}


def test_literals_in_a_row():
    found = resolved({"steps": Link("1", 0)}, literal("1", Link("2", 0)), literal("2", 7))
    assert found.values == {"steps": 7} and not found.problems


def test_literals_in_a_circle_end():
    assert resolved({"steps": Link("1", 0)}, literal("1", Link("1", 0))).values["steps"] == Link("1", 0)


def test_what_ran_and_what_did_not():
    model, quantised = Node("1", "LoadChroma", "", {}), Node("2", "QuantizeModel", "", {})
    inputs = {"model": Link("2", 0)}
    found = resolved(inputs, model, quantised)
    assert found.values == {"model": PENDING} and not found.complete and not found.problems
    found = resolved(inputs, model, quantised, outputs={"2": ("the model",)})
    assert found.values == {"model": "the model"} and found.complete


def test_a_pending_value_of_a_widget_is_left_out():
    other = Node("7", "LoRATrainer", "", {})
    found = resolved({"name": Link("7", 3), "rank": 4}, other)
    assert found.values == {"rank": 4} and not found.complete and not found.problems
