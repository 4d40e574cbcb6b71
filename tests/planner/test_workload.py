"""Forward passes beside the one that learns: what the plan expects against what is drawn and computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.data.batch_sampler import BatchPlan
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.planner.cost_model import Shape, forward_flops, step_flops
from chroma_trainer.trainer_core.planner.meta_counter import MemoryTracker
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.planner.workload import PriorShares, prior_shares, rollout_passes
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.planning import plan_request
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.step.batch import draw_rollout_levels, make_batch
from chroma_trainer.trainer_core.train.step.loop import micro_loss


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_shares_are_those_of_the_batches_that_are_drawn(batch_size):
    buckets = np.array([(32, 32)] * 9 + [(64, 32)] * 5 + [(96, 32)] * 2)
    is_prior, repeats = np.arange(16) % 3 == 1, np.array([1, 2] * 8)
    is_prior[14:] = True  # a bucket of nothing else
    plan = BatchPlan(buckets, repeats, batch_size, seed=3)
    count = 600 * plan.batches_per_epoch
    drawn = [is_prior[list(plan.batch(micro))] for micro in range(count)]
    found = prior_shares(buckets, is_prior, repeats, batch_size)
    assert found.some == pytest.approx(np.mean([kept.any() for kept in drawn]), abs=0.01)
    assert found.only == pytest.approx(np.mean([kept.all() for kept in drawn]), abs=0.01)
    assert 0 < found.only <= found.some < 1
    assert prior_shares(buckets, is_prior & False, repeats, batch_size) == PriorShares()


def test_rollouts_are_drawn_as_often_as_expected(workshop):
    training = workshop.request(rollout_probability=0.4, rollout_steps=5).training
    levels = [draw_rollout_levels(training, micro, torch.tensor([0.5]), None) for micro in range(20_000)]
    counted = np.mean([0 if level is None else len(level) - 1 for level in levels])
    assert counted == pytest.approx(rollout_passes(training, PriorShares()), rel=0.03)
    assert rollout_passes(training, PriorShares(some=0.5, only=0.25)) == pytest.approx(0.75 * 0.4 * 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rollout", "prior"])
def test_the_plan_of_a_step_is_what_is_counted_in_it(workshop, case):
    """A real step's operations on the CPU. Rank 1, for the base's own prediction is one without the adapter;
    attention by matrices, for torch's counter knows no other on a CPU."""
    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    keeps = case == "prior"
    dataset = DatasetConfig((replace(part, prior_preservation=keeps),), (root,))
    asked = workshop.request(
        batch_size=1, rank=1, **({} if keeps else {"rollout_probability": 1.0, "rollout_steps": 3})
    )
    asked = replace(asked, dataset=dataset, memory=MemoryConfig(attention="math"))
    host = workshop.host()
    made = build_run(plan_run(asked, host), host, PhaseTimer())
    plain = MetaModel(ChromaFamily(), asked, "cpu")
    for micro in range(4):
        batch = make_batch(made, micro)
        shape = Shape(batch.x_sigma.shape[3] * 8, batch.x_sigma.shape[2] * 8, 1, len(batch.text[0]))
        cost = plain.cost(shape)
        passes = 1 if batch.levels is None else len(batch.levels) - 1
        with MemoryTracker() as counter:
            micro_loss(made, micro).backward()
        assert counter.flops == pytest.approx(step_flops(cost, ()) + passes * forward_flops(cost), rel=0.03)


@pytest.mark.slow
def test_the_plan_tells_them(workshop):
    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    plain, _, _ = plan_request(workshop.request(batch_size=1), workshop.host())
    rolled, _, _ = plan_request(
        workshop.request(batch_size=1, rollout_probability=0.5, rollout_steps=3), workshop.host()
    )
    both = DatasetConfig(tuple(replace(part, prior_preservation=keeps) for keeps in (False, True)), (root, root))
    kept, _, _ = plan_request(replace(workshop.request(batch_size=1), dataset=both), workshop.host())
    # One forward pass more on average, and one in every second batch.
    assert rolled.flops_per_step - plain.flops_per_step == pytest.approx(
        2 * (kept.flops_per_step - plain.flops_per_step), rel=1e-6
    )
    assert 1.3 < rolled.flops_per_step / plain.flops_per_step < 1.6  # a tiny model's embeddings have no backward pass
    assert "rollouts of 1 to 3 steps in 50% of the batches" in rolled.settings and "rollouts" not in plain.settings
    assert rolled.device_peak == plain.device_peak
    # Rollouts see every token, whatever is routed.
    routed = {"batch_size": 1, "routed_share": 0.5, "route_first": 1}
    without, _, _ = plan_request(workshop.request(**routed), workshop.host())
    with_them, _, _ = plan_request(
        workshop.request(rollout_probability=0.5, rollout_steps=3, **routed), workshop.host()
    )
    assert (
        without.flops_per_step < plain.flops_per_step
        and "50% of the image tokens skip blocks 1 to -2" in without.settings
    )
    assert with_them.flops_per_step - without.flops_per_step == rolled.flops_per_step - plain.flops_per_step
