"""The combinations of a sweep: `--over rank=8,16 --over learning_rate=1e-4,2e-4` are four. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..config.training import MIN_HELD_OUT, TrainingConfig
from ..errors import Problem, UserError, nearest
from ..spec import NodeSpec, check_value
from ..storage.bounded_files import Unusable, parse_json
from ..workflow.graph import Graph
from ..workflow.overrides import override

MAX_RUNS = 100
MAX_SLUG = 80  # characters of a combination in the name of its run
UNSAFE = re.compile(r"[^\w.+-]+", re.ASCII)
# Fields that name a run, say how it is computed, or change what the runs are compared by.
FIXED = {
    "name": "each run of a sweep has a name of its own",
    "resume": "a sweep resumes its runs itself",
    "on_change": "it decides nothing about a new run",
    "devices": "the result does not depend on it",
    "background": "the result does not depend on it",
    "detached": "the result does not depend on it",
    "holdout": "runs are compared by the same held-out images",
    "eval_images": "runs are compared by the same held-out images",
}


@dataclass(frozen=True)
class Axis:
    """A field and its values.

    Attributes:
        target: NODE.FIELD as for --set, with the node's id.
        name: How the field is called in tables: its name, or NODE.FIELD as it was given.
        values: As they were written.
    """

    target: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """One value of each axis.

    Attributes:
        values: Value by the axis's name.
        settings: The same as for --set.
    """

    values: Mapping[str, str]
    settings: tuple[str, ...]

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values.items())

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        text = "-".join(f"{name.rpartition('.')[2]}-{value}" for name, value in self.values.items())
        return UNSAFE.sub("_", text).strip("._")[:MAX_SLUG]


def read_axes(texts: Sequence[str], graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[Axis]:
    """Return the axes of --over options.

    Raises:
        UserError: every option that names no field, several fields, a field that can't be swept, or no values.
    """
    problems: list[Problem] = []
    axes: list[Axis] = []
    if not texts:
        problems.append(Problem("--over", "is missing; for example: --over rank=8,16 --over learning_rate=1e-4,2e-4"))
    for text in texts:
        name, equals, rest = text.partition("=")
        option = f"--over {text[:60]}"
        values = _values(rest)
        if not equals or not name or not all(values):
            problems.append(Problem(option, "is not FIELD=VALUE,VALUE; for example: rank=8,16"))
            continue
        target = _target(name.strip(), graph, catalogue)
        if isinstance(target, str):
            problems.append(Problem(option, target))
        elif reason := FIXED.get(target[1]):
            problems.append(Problem(option, f"{target[1]} can't be swept: {reason}"))
        elif len(set(values)) < len(values):
            problems.append(Problem(option, "has a value twice"))
        elif ".".join(target) in [axis.target for axis in axes]:
            problems.append(Problem(option, f"{name} is swept twice; write all of its values into one --over"))
        else:
            axes.append(Axis(".".join(target), name.strip(), values))
    count = math.prod(len(axis.values) for axis in axes)
    if not problems and count > MAX_RUNS:
        problems.append(Problem("--over", f"makes {count} runs, more than {MAX_RUNS}; use fewer values"))
    if problems:
        raise UserError(problems)
    return axes


def _values(text: str) -> tuple[str, ...]:
    """Return the values of an option: separated by commas, or a JSON list for values that contain commas."""
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except Unusable:
            return ("",)
        plain = isinstance(items, list) and all(isinstance(item, str | int | float) for item in items)
        return tuple(item if isinstance(item, str) else str(item) for item in items) if plain and items else ("",)
    return tuple(part.strip() for part in text.split(","))


def _target(name: str, graph: Graph, catalogue: Mapping[str, NodeSpec]) -> tuple[str, str] | str:
    """Return the id of the node and the field, or what is wrong with the name."""
    node_name, _, field = name.rpartition(".")
    fields = [
        (node, item.name)
        for node in graph.nodes.values()
        if node.type in catalogue
        for item in catalogue[node.type].fields()
        if item.is_widget
    ]
    own = [(node, f) for node, f in fields if not node_name or node_name in (node.id, node.title, node.type)]
    matches = [node for node, f in own if f == field]
    if len(matches) == 1:
        return matches[0].id, field
    if matches:
        ways = ", ".join(dict.fromkeys(f"{node.type if not node_name else node.id}.{field}" for node in matches))
        if not node_name and len({node.type for node in matches}) < len(matches):
            ways = ", ".join(f"{node.id}.{field}" for node in matches)
        return f"{name!r} is a field of {len(matches)} nodes; write {ways.replace(', ', ' or ')}"
    if node_name and not own:
        return f"there is no node {node_name!r}{nearest(node_name, [node.type for node in graph.nodes.values()])}"
    return f"no node of the workflow has a field {field!r}{nearest(field, [f for _, f in own])}"


def value_problems(axes: Sequence[Axis], graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[Problem]:
    """Return a problem for each value that its field does not take."""
    problems: list[Problem] = []
    for axis in axes:
        node_id, _, name = axis.target.rpartition(".")
        field = next(f for f in catalogue[graph.nodes[node_id].type].fields() if f.name == name)
        for text in axis.values:
            try:
                changed = override(graph, [f"{axis.target}={text}"], catalogue)
            except UserError as error:
                problems += [Problem(f"{axis.name}={text}", problem.message) for problem in error.problems]
                continue
            problem = check_value(field, changed.nodes[node_id].inputs[name])[1]
            if problem:
                problems.append(Problem(f"{axis.name}={text}", problem.message))
    return problems


def requirements(training: TrainingConfig, stop_losers: bool) -> list[Problem]:
    """Return what a run lacks to be compared with others."""
    problems = []
    if not training.holdout:
        text = "is 0, but the runs of a sweep are compared by the loss of held-out images; set it to 0.2"
        problems.append(Problem("holdout", f"{text} (headless: --set LoRATrainer.holdout=0.2)"))
    elif training.eval_images < MIN_HELD_OUT:
        problems.append(Problem("eval_images", f"is {training.eval_images}; a sweep needs {MIN_HELD_OUT} or more"))
    if stop_losers and not training.checkpoint_every:
        text = "is 0, but stop_losers (--stop-losers) decides at checkpoints; use a tenth of the steps"
        problems.append(Problem("checkpoint_every", text))
    if stop_losers and training.devices.strip():
        text = f"is {training.devices!r}, but stop_losers (--stop-losers) needs runs of this process"
        problems.append(Problem("devices", f"{text}; leave it empty, or the option out"))
    return problems


def hint_of(axes: Sequence[Axis], graph: Graph) -> str:
    """Return a warning where the axes change more than they name; "" where they do not."""
    targets = [axis.target for axis in axes]
    for target in targets:
        node, _, field = target.rpartition(".")
        alpha = graph.nodes[node].inputs.get("alpha", 0)
        if field == "rank" and f"{node}.alpha" not in targets and alpha:
            return f"rank is swept and alpha stays {alpha}, so the scale alpha / rank changes too; --set {node}.alpha=0 keeps it at 1"
    return ""


def combine(axes: Sequence[Axis]) -> list[Combination]:
    """Return all combinations, the last axis varying fastest."""
    return [
        Combination(
            dict(zip((axis.name for axis in axes), values, strict=True)),
            tuple(f"{axis.target}={value}" for axis, value in zip(axes, values, strict=True)),
        )
        for values in product(*(axis.values for axis in axes))
    ]
