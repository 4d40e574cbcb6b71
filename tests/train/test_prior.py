"""Pictures that keep the model as it is: their target is what the base predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.load import read_lora
from chroma_trainer.trainer_core.adapters.inject import set_strength_
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.eval_loss import eval_loss
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.batch import make_batch
from chroma_trainer.trainer_core.train.step.loop import micro_loss
from safetensors.torch import load_file

from tests.workshop import EVALUATED


def dataset(workshop, *is_prior: bool) -> DatasetConfig:
    """The workshop's folder so many times."""
    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    return DatasetConfig(tuple(replace(part, prior_preservation=keeps) for keeps in is_prior), (root,) * len(is_prior))


def test_alone_they_teach_nothing(workshop):
    """The update begins at 0, where the model is the base, so that there is nothing to correct."""
    host = workshop.host()
    trained = run(replace(workshop.request(steps=3, weight_decay=0.0), dataset=dataset(workshop, True)), host)
    assert [event.loss for event in host.all(StepReport)] == [0.0, 0.0, 0.0]
    weights = load_file(trained.lora.path)
    assert not any(weights[key].any() for key in weights if "lora_B" in key)


def test_alone_they_teach_nothing_on_a_base_that_loftq_corrects(workshop):
    """The file is for the clean base, which the corrected one stands for. Held at the quantized one, it would undo the correction."""
    model = replace(workshop.model, quantization=QuantizationConfig(level="int4-quanto"))
    asked = workshop.request(model=model, steps=3, weight_decay=0.0, init="loftq")
    host = workshop.host()
    trained = run(replace(asked, dataset=dataset(workshop, True)), host)
    assert max(event.loss for event in host.all(StepReport)) < 1e-10
    for name, update in read_lora(trained.lora.path).items():
        assert update.delta(torch.zeros(update.shape)).abs().max() < 1e-6, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_loss_of_a_mixed_batch_is_the_formula(workshop, kind):
    asked = replace(workshop.request(batch_size=4), dataset=dataset(workshop, False, True))
    asked = replace(asked, adapter=replace(asked.adapter, kind=kind))
    host = workshop.host()
    made = build_run(plan_run(asked, host), host, PhaseTimer())
    for layer in made.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    micro = next(
        m for m in range(20) if (found := make_batch(made, m).prior) is not None and found.any() and not found.all()
    )
    batch = make_batch(made, micro)
    assert batch.prior is not None

    def predicted(strength: float) -> torch.Tensor:
        set_strength_(made.transformer, strength)
        with torch.no_grad():
            return made.family.predict(made.transformer, batch.x_sigma, batch.sigma, batch.text)

    base, ours = predicted(0.0), predicted(1.0)
    errors = torch.stack([velocity_loss(ours, base), velocity_loss(ours, batch.velocity)])
    expected = torch.where(batch.prior, *errors).mean()
    assert torch.equal(micro_loss(made, micro).detach(), expected)
    assert all(layer.strength == 1.0 for layer in made.layers.values())


def test_they_are_not_what_a_checkpoint_is_judged_by(workshop):
    one, both = (
        replace(workshop.request(**EVALUATED), dataset=dataset(workshop, *keeps)) for keeps in ((False,), (False, True))
    )
    losses = []
    for asked in (one, both):
        host = workshop.host()
        losses.append(eval_loss(build_run(plan_run(asked, host), host, PhaseTimer()), host))
    assert losses[0] == losses[1]


def test_it_is_in_the_record_only_where_it_is_asked_for(workshop):
    asked = replace(workshop.request(), dataset=dataset(workshop, False, True))
    without, with_it = asked.as_json()["dataset"]["parts"]
    assert "prior_preservation" not in without and with_it["prior_preservation"] is True
