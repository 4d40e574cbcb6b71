"""Weight decay pulls the adapter to zero, never the base model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.optim.optimizer import flat, parameter_groups
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run

from tests.workshop import EVALUATED

KINDS = [("dora", "default"), ("lora", "pissa"), ("lora", "olora")]


def request_of(workshop, kind: str, init: str, **values):
    request = workshop.request(init=init, **values)
    return replace(request, adapter=replace(request.adapter, kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "init"), KINDS)
def test_with_nothing_to_learn_the_model_stays_the_base(workshop, kind, init):
    (part,), roots = workshop.dataset.parts, workshop.dataset.roots
    dataset = DatasetConfig((replace(part, prior_preservation=True),), roots)
    request = replace(
        request_of(workshop, kind, init, steps=20, weight_decay=0.01, rank=2, alpha=2.0, **EVALUATED), dataset=dataset
    )
    losses = run(request, workshop.host()).report["eval_loss"]
    assert losses["after"] == losses["before"]


@pytest.mark.parametrize(
    "optimizer", ["adamw", "optimi-lion", "optimi-stableadamw", "prodigy", "schedulefree-adamw", "adafactor", "came"]
)
def test_every_optimizer_decays_only_what_starts_without_the_base(workshop, optimizer):
    """One step of a gradient of zero: only the decay changes a weight."""
    request = request_of(workshop, "dora", "default")
    request, host = replace(request, optimizer=OptimizerConfig(optimizer=optimizer)), workshop.host()
    layers = build_run(plan_run(request, host), host, PhaseTimer()).layers
    layer = next(iter(layers.values()))
    groups = parameter_groups(layers, {})
    built = load("optimizer", optimizer).build(groups, request.optimizer, 0.5, 0.5, 0)
    before = {name: parameter.clone() for name, parameter in layer.trainable()}
    for parameter in flat(groups):
        parameter.grad = parameter.new_zeros(parameter.shape)
    built.step()
    assert layer.magnitude.equal(before["magnitude"]) and not layer.lora_A.equal(before["lora_A"])


def test_an_ordinary_lora_trains_as_before(workshop):
    """Its parameters are one list without groups, as in every run so far, so that its bytes do not change."""
    request, host = request_of(workshop, "lora", "default"), workshop.host()
    layers = build_run(plan_run(request, host), host, PhaseTimer()).layers
    groups = parameter_groups(layers, {})
    assert all(not isinstance(item, dict) for item in groups)
