"""SweepSettings: trains every combination of some values with LoRATrainer, and compares them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host
from ...trainer_core.spec import NodeSpec, Output
from ...trainer_core.sweep.sweep_config import Sweep, SweepConfig
from ...trainer_core.workflow.graph import Graph, Link

TRAINER = "LoRATrainer"


@dataclass(frozen=True, kw_only=True)
class Inputs(SweepConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[Sweep]:
    """Return the settings of the sweep, and what trains it in place of one run."""
    settings = SweepConfig(**{field.name: getattr(inputs, field.name) for field in fields(SweepConfig)})
    return (Sweep(settings, _train),)


def _train(inputs: Any, host: Any) -> tuple[Any, ...]:
    from .train_sweep import run_sweep

    return run_sweep(inputs, host)


def within(inputs: Inputs, graph: Graph, node_id: str) -> list[Problem]:
    """Return what the graph around the trainers that get this sweep has no field, or no such value, for."""
    from ...trainer_core.sweep.combinations import read_axes, value_problems
    from ...trainer_core.workflow.execute import with_sources
    from .. import CATALOGUE

    if inputs.problems():
        return []
    problems: list[Problem] = []
    for trainer in graph.nodes.values():
        if trainer.type != TRAINER or not any(v == Link(node_id, 0) for v in trainer.inputs.values()):
            continue
        around = with_sources(graph, {trainer.id})
        around = replace(around, nodes={id: node for id, node in around.nodes.items() if id != node_id})
        try:
            problems += value_problems(read_axes(inputs.lines(), around, CATALOGUE), around, CATALOGUE)
        except UserError as error:
            problems += error.problems
    return [
        Problem("over", f"{problem.field.removeprefix('--over').strip()}: {problem.message}") for problem in problems
    ]


SPEC = NodeSpec(
    id="SweepSettings",
    title="Sweep Settings",
    category="ChromaTrainer/settings",
    description="Lets LoRATrainer train every combination of some values, one after another, and compare them by the loss of held-out "
    "images. LoRATrainer's outputs are those of the best run.",
    inputs=Inputs,
    outputs=(Output("sweep", "TRAIN_SWEEP", "The values to try, for LoRATrainer."),),
    run=run,
    light=True,
    within=within,
    search_aliases=("sweep", "grid search", "hyperparameters", "compare learning rates", "ablation"),
)
