"""The sweep of a LoRATrainer: its own graph, with other values, once for each combination."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...trainer_core.config.request import TrainedLora
from ...trainer_core.config.training import TrainingConfig
from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host, Notice
from ...trainer_core.runs import layout
from ...trainer_core.storage.atomic import sha256_of
from ...trainer_core.storage.bounded_files import read_json
from ...trainer_core.sweep.combinations import combine, hint_of, read_axes
from ...trainer_core.workflow.execute import with_sources
from ...trainer_core.workflow.graph import Graph
from ...trainer_core.workflow.read import graph_from_json
from .. import CATALOGUE, lora_trainer
from ..widget_schemas import schemas
from .trainer_node import trainer_node


def run_sweep(inputs: lora_trainer.Inputs, host: Any) -> tuple[Any, ...]:
    """Train every combination, and return the outputs of the best run; () where runs in the background train them."""
    from ...trainer_core.sweep.results import table
    from ...trainer_core.sweep.sweep import Sweep, plan_sweep, sweep_name

    assert inputs.sweep
    settings, trainer = inputs.sweep.settings, trainer_node()
    graph = graph_of_runs(inputs, host)
    try:
        name = sweep_name(graph, trainer, settings.name)
        axes = read_axes(settings.lines(), graph, CATALOGUE)
        plans = plan_sweep(graph, combine(axes), name, trainer, host, settings.stop_losers)
    except UserError as error:
        raise UserError(_own(problem) for problem in error.problems) from error
    if hint := hint_of(axes, graph):
        host.emit(Notice(hint, "warning"))
    sweep = Sweep(name, plans, trainer, host, settings.stop_losers)
    if inputs.background and host.background:
        sweep.write()
        for plan in plans:
            if plan.folder not in sweep.results:
                host.background(*trainer.run_instead(plan.graph, lora_trainer.recorded, host))  # type: ignore[misc]
        return ()
    rows = sweep.run()
    host.emit(Notice(table(rows)))
    best = next((row.result for row in rows if row.is_best), rows[-1].result)
    plan = next(plan for plan in plans if plan.folder == best.run)
    host.emit(Notice(f"the best run is {plan.combination.label}; the outputs are its LoRA"))
    return _outputs(plan.name, plan.folder, trainer.request(plan.graph, sweep.quiet).model, host)


def graph_of_runs(inputs: lora_trainer.Inputs, host: Host) -> Graph:
    """Return the graph of this node and what it depends on.

    Values that come from nodes of ComfyUI are those that this node got.
    """
    graph = graph_from_json(dict(host.prompt), schemas())
    node = graph.nodes[host.node_id]
    values = {item.name: getattr(inputs, item.name) for item in fields(TrainingConfig)}
    changed = replace(graph, nodes={**graph.nodes, node.id: replace(node, inputs={**node.inputs, **values})})
    return with_sources(changed, {node.id})


def _outputs(name: str, run: str, model: Any, host: Host) -> tuple[Any, ...]:
    """Return what LoRATrainer returns, of a run that has ended: its best checkpoint's LoRA, where there is one."""
    from ...trainer_core.lora_tools.reader import load_tensors

    output = host.paths.output
    paths = [layout.lora_path(output, name, best=True), layout.lora_path(output, name)]
    path = next((path for path in paths if path.is_file()), paths[-1])
    folder = layout.runs_folder(output) / run
    report = read_json(folder / layout.REPORT, 64 << 20)
    lora = TrainedLora(str(path), layout.listed_name(path, output), sha256_of(path), model, str(folder))
    losses = [loss for loss in report["loss"] if loss is not None and math.isfinite(loss)]
    return lora, load_tensors(Path(lora.path)), {"loss": losses}, lora.name


def _own(problem: Problem) -> Problem:
    """Return a problem of a run's graph as one that the page shows: options of the command are fields of the settings."""
    if problem.field.startswith("--over"):
        return Problem("sweep", f"over: {problem.field.removeprefix('--over').strip()}: {problem.message}")
    if problem.field == "--name":
        return Problem("sweep", f"name: {problem.message}")
    return problem
