"""Run a sweep: check all combinations, then train them one after another. A sweep that was ended goes on.

OUTPUT/sweeps/NAME/sweep.json    results of the runs that have ended, from which a sweep goes on
OUTPUT/sweeps/NAME/table.json    the table
OUTPUT/sweeps/NAME/sweep.png     the same as a chart
OUTPUT/loras/NAME/...            the LoRAs, each with its run folder as always
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.training import MIN_HELD_OUT
from ..data.holdout import num_held
from ..errors import Problem, UserError
from ..host import Host, Notice, SinkHost, SweepReported
from ..plots.image_grid import save_png
from ..plots.sweep_chart import SweepBar, draw_sweep_chart
from ..runs import layout
from ..storage.atomic import write_json
from ..storage.bounded_files import Unusable, read_json
from ..storage.lora_name import faults_of_name
from ..train.figures.paired_evals import Evaluation
from ..train.prepare import RunPlan, plan_run
from ..train.run import TrainResult
from ..workflow.execute import TrainerNode, with_sources
from ..workflow.graph import Graph
from ..workflow.overrides import override
from .combinations import Combination, requirements
from .results import Row, RunResult, as_json, rows_of, why_lost
from .stored_sweep import CHART, MAX_BYTES, STATE, TABLE, result_of, sweep_folder

NOT_OF_A_RUN = ("sweep", "background", "detached")  # inputs of LoRATrainer that the runs of a sweep do not have


@dataclass(frozen=True)
class PlannedRun:
    """A combination that can be trained."""

    combination: Combination
    graph: Graph
    folder: str  # name of the run's folder
    num_steps: int
    name: str  # of the LoRA


def sweep_name(graph: Graph, trainer: TrainerNode, name: str) -> str:
    """Return the name of a sweep: the one that is asked for, or the name of the workflow's LoRA.

    Raises:
        UserError: it is no name, or holds a date, by which tomorrow's sweep could not go on.
    """
    given = name or str(graph.nodes[trainer.only_id(graph)].inputs.get("name") or "sweep")
    faults = faults_of_name(given)
    if "%" in given:
        faults = [f"{given!r} holds a date, so that a sweep could not go on another day; give another --name"]
    if faults:
        raise UserError(Problem("--name", fault) for fault in faults)
    return given


def plan_sweep(
    graph: Graph,
    combinations: Sequence[Combination],
    name: str,
    trainer: TrainerNode,
    host: Host,
    stop_losers: bool,
) -> list[PlannedRun]:
    """Check every combination before anything is trained.

    Raises:
        UserError: the problems of all combinations.
    """
    node, quiet = trainer.only_id(graph), quiet_host(host)
    graph = without_sweep(graph, node)
    problems: dict[Problem, list[str]] = {}
    plans: list[PlannedRun] = []
    names = _names(combinations, name)
    for combination, own_name in zip(combinations, names, strict=True):
        host.check_cancelled()
        host.emit(Notice(f"checking {combination.label}"))
        try:
            settings = [*combination.settings, f"{node}.name={own_name}"]
            own = override(graph, settings, trainer.catalogue)
            plan = trainer.run_instead(own, _planner(trainer, stop_losers), quiet)
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(combination.label)
            continue
        assert isinstance(plan, RunPlan)
        plans.append(PlannedRun(combination, own, plan.folder.name, _num_steps(plan), own_name))
    if problems:
        raise UserError(_with_labels(problem, labels, len(combinations)) for problem, labels in problems.items())
    return plans


def without_sweep(graph: Graph, trainer: str) -> Graph:
    """Return the trainer and what it depends on, without a sweep of its own: each run is recorded as one that stands alone."""
    node = graph.nodes[trainer]
    inputs = {name: value for name, value in node.inputs.items() if name not in NOT_OF_A_RUN}
    return with_sources(replace(graph, nodes={**graph.nodes, trainer: replace(node, inputs=inputs)}), {trainer})


def quiet_host(host: Host) -> SinkHost:
    """Return an environment with the folders and the device of another one, to which it sends no events."""
    return SinkHost(
        host.paths, is_cancelled=lambda: bool(host.check_cancelled()), device=host.device, machines=host.machines
    )


def _names(combinations: Sequence[Combination], name: str) -> list[str]:
    """Return the name of each run. Combinations whose slugs are equal get a number."""
    names: list[str] = []
    for combination in combinations:
        first = f"{name}/{combination.slug}"
        number, own = 2, first
        while own.lower() in (other.lower() for other in names):
            own, number = f"{first}-{number}", number + 1
        names.append(own)
    return names


def _planner(trainer: TrainerNode, stop_losers: bool) -> Callable[[Any, SinkHost], RunPlan]:
    def plan(inputs: Any, host: SinkHost) -> RunPlan:
        request = trainer.request_of(inputs)
        if problems := requirements(request.training, stop_losers):
            raise UserError(problems)
        checked = plan_run(request, host)
        held = num_held(checked.index.samples, request.training.holdout)
        if held < MIN_HELD_OUT:
            text = f"{held} of {len(checked.index.samples)} images are held out; a sweep needs {MIN_HELD_OUT} or more"
            raise UserError.at("holdout", f"{text}, to tell runs apart; set it higher, or add images")
        return checked

    return plan


def _with_labels(problem: Problem, labels: Sequence[str], count: int) -> Problem:
    """Return a problem with the combinations that have it, unless all do."""
    if len(labels) == count:
        return problem
    return replace(problem, message=f"{problem.message} (with {'; '.join(labels)})")


def _num_steps(plan: RunPlan) -> int:
    from ..train.build import plan_batches

    return plan_batches(plan.request, plan.index)[3]


class Sweep:
    """A planned sweep.

    Args:
        name: Of the sweep.
        plans: From plan_sweep.
        trainer: See TrainerNode.
        host: Environment.
        stop_losers: End runs early that lose to another one at the same step.
    """

    def __init__(self, name: str, plans: Sequence[PlannedRun], trainer: TrainerNode, host: Any, stop_losers: bool):
        self.plans, self.trainer, self.host, self.stop_losers = plans, trainer, host, stop_losers
        self.name, self.folder = name, sweep_folder(host.paths.output, name)
        self.quiet = quiet_host(host)
        self.results = self._read()
        self.failed: dict[str, tuple[Problem, ...]] = {}  # by combination, in words; errors would hold a run's memory

    def run(self) -> list[Row]:
        """Train all runs that have not ended yet, in order, and return the table.

        A run that fails, such as one that does not fit in the memory, is left out; another start tries it again.

        Raises:
            UserError: All runs failed.
        """
        self.write()
        for number, plan in enumerate(self.plans, 1):
            of = f"run {number} of {len(self.plans)}: {plan.combination.label}"
            if plan.folder in self.results:
                self.host.emit(Notice(f"{of}: has ended before"))
                continue
            self.host.emit(Notice(of))
            try:
                self.results[plan.folder] = self._train(plan)
            except UserError as error:
                self.failed[plan.combination.label] = error.problems
                self.host.emit(Notice(f"{of}: failed: {error}; the sweep goes on without it", "warning"))
            self.write()
        if self.failed and not self._finished():
            raise UserError(
                replace(problem, message=f"{problem.message} (with {label})")
                for label, problems in self.failed.items()
                for problem in problems
            )
        return self.write()

    def _train(self, plan: PlannedRun) -> RunResult:
        others = self._finished()

        def judge(step: int, evaluations: Mapping[int, Evaluation]) -> str:
            return why_lost(evaluations, step, plan.num_steps, others)

        def train(inputs: Any, host: SinkHost) -> TrainResult:
            return self.trainer.train(inputs, host, judge if self.stop_losers else None)

        result = self.trainer.run_instead(plan.graph, train, self.host)
        assert isinstance(result, TrainResult)
        return result_of(Path(result.lora.folder), plan.combination.values, plan.name)

    def _finished(self) -> list[RunResult]:
        """Return the results of this sweep's runs, in their order."""
        return [self.results[plan.folder] for plan in self.plans if plan.folder in self.results]

    def _read(self) -> dict[str, RunResult]:
        """Return the results of an earlier start, by run folder. Those whose LoRA is gone are trained again."""
        try:
            stored = read_json(self.folder / STATE, MAX_BYTES)["runs"]
            results = [RunResult.from_json(value) for value in stored]
        except FileNotFoundError:
            return {}
        except (OSError, Unusable, KeyError, TypeError, ValueError, AttributeError):
            self.host.emit(Notice(f"{self.folder / STATE} is damaged; finished runs are looked at again", "warning"))
            return {}
        return {result.run: result for result in results if self._has_lora(result)}

    def _has_lora(self, result: RunResult) -> bool:
        return layout.lora_path(self.host.paths.output, result.name).is_file()

    def write(self) -> list[Row]:
        """Write the state, the table and the chart, and report the table."""
        rows = rows_of(self._finished())
        table = as_json(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / STATE, {"runs": [result.as_json() for result in self.results.values()]})
        plans = [
            {"values": dict(plan.combination.values), "run": plan.folder, "name": plan.name} for plan in self.plans
        ]
        write_json(self.folder / TABLE, {"runs": table, "planned": len(self.plans), "plans": plans})
        bars = [_bar(row) for row in rows]
        save_png(
            draw_sweep_chart(bars, f"{self.folder.name}: {len(rows)} of {len(self.plans)} runs"),
            self.folder / CHART,
            {},
        )
        axes = tuple(self.plans[0].combination.values) if self.plans else ()
        self.host.emit(SweepReported(self.name, axes, len(self.plans), tuple(table)))
        return rows


def _bar(row: Row) -> SweepBar:
    result = row.result
    seconds = None if result.seconds_per_step is None else result.seconds_per_step * result.steps
    label = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in result.values.items())
    return SweepBar(
        label, row.loss, row.difference, row.is_best, row.is_worse, result.leak, seconds, bool(result.stopped)
    )
