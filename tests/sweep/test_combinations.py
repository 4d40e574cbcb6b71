"""The fields and values of --over, and every fault of them."""

from __future__ import annotations

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.sweep.combinations import combine, hint_of, read_axes
from chroma_trainer.trainer_core.workflow.graph import Graph, Node


def workflow(*more: Node) -> Graph:
    nodes = (
        Node("4", "ValidateSampler", "What to draw", {}),
        Node("5", "LoRATrainer", "LoRA Trainer", {"name": "cat"}),
        *more,
    )
    return Graph({node.id: node for node in nodes})


def axes_of(*texts: str, graph: Graph | None = None):
    return read_axes(texts, graph or workflow(), CATALOGUE)


def test_combinations_of_short_and_long_names():
    axes = axes_of("rank=8,16", "LoRATrainer.steps=10, 20", "What to draw.cfg=1")
    assert [axis.target for axis in axes] == ["5.rank", "5.steps", "4.cfg"]
    combinations = combine(axes)
    assert [c.label for c in combinations][:2] == [
        "rank=8, LoRATrainer.steps=10, What to draw.cfg=1",
        "rank=8, LoRATrainer.steps=20, What to draw.cfg=1",
    ]
    assert combinations[3].settings == ("5.rank=16", "5.steps=20", "4.cfg=1")
    assert combinations[0].slug == "rank-8-steps-10-cfg-1"


def test_values_with_commas_are_a_json_list():
    (axis,) = axes_of('targets=["all", "*.to_q,*.to_k"]')
    assert axis.values == ("all", "*.to_q,*.to_k") and combine([axis])[1].slug == "targets-_.to_q_.to_k"
    assert axes_of("learning_rate=[0.1, 2]")[0].values == ("0.1", "2")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rank", "is not FIELD=VALUE"),
        ("rank=", "is not FIELD=VALUE"),
        ("rank=8,,16", "is not FIELD=VALUE"),
        ("rank=[8", "is not FIELD=VALUE"),
        ("rank=8,8", "a value twice"),
        ("steps=1,2", "a field of 2 nodes; write ValidateSampler.steps or LoRATrainer.steps"),
        ("rnk=1,2", "did you mean 'rank'"),
        ("LoraTrainer.rank=1,2", "did you mean 'LoRATrainer'"),
        ("LoRATrainer.model=1,2", "has a field 'model'"),
        ("holdout=0.1,0.2", "can't be swept: runs are compared by the same held-out images"),
        ("name=a,b", "can't be swept"),
    ],
)
def test_faults(text, part):
    with pytest.raises(UserError) as raised:
        axes_of(text, "learning_rate=1e-4")
    (problem,) = raised.value.problems
    assert part in problem.message and problem.field.startswith("--over ")


def test_all_faults_at_once_and_too_many_runs():
    with pytest.raises(UserError) as raised:
        axes_of("rank=1,1", "nothing=2", "seed=0,1")
    assert len(raised.value.problems) == 3
    with pytest.raises(UserError, match="600 runs"):
        axes_of(f"rank={','.join(map(str, range(1, 601)))}")
    fields = ("rank", "LoRATrainer.seed", "LoRATrainer.steps", "batch_size", "accumulation", "patience", "noise_choice")
    with pytest.raises(UserError, match=f"makes {49**7} runs"):  # none of them is made
        axes_of(*(f"{field}={','.join(map(str, range(1, 50)))}" for field in fields))
    with pytest.raises(UserError, match="is missing"):
        axes_of()
    with pytest.raises(UserError, match="swept twice"):
        axes_of("rank=1,2", "5.rank=3")


def test_two_trainers_are_told_apart_by_their_ids():
    with pytest.raises(UserError, match=r"write 5.rank or 6.rank"):
        axes_of("rank=1,2", graph=workflow(Node("6", "LoRATrainer", "Other", {})))


def test_a_rank_with_a_fixed_alpha_is_warned_about():
    graph = workflow()
    graph.nodes["5"].inputs["alpha"] = 16  # type: ignore[index]
    assert "--set 5.alpha=0" in hint_of(axes_of("rank=8,16", graph=graph), graph)
    assert (
        hint_of(axes_of("rank=8,16", "alpha=8,16", graph=graph), graph)
        == hint_of(axes_of("seed=1", graph=Graph({"5": graph.nodes["5"]})), graph)
        == ""
    )
