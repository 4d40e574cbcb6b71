"""Scheduled sampling in runs: what a rolled-out batch is, who learns from it, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import set_micro_, set_strength_
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.batch import make_batch
from chroma_trainer.trainer_core.train.step.loop import micro_loss
from chroma_trainer.trainer_core.train.step.scheduled_sampling import roll_out
from PIL import Image, ImageOps

from tests.narrowing import present

ALWAYS = {"rollout_probability": 1.0, "rollout_steps": 3}


def built(workshop, request):
    """With an adapter that does something."""
    host = workshop.host()
    made = build_run(plan_run(request, host), host, PhaseTimer())
    for i, parameter in enumerate(made.parameters):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    return made


@pytest.fixture(scope="module", params=["chroma", "flux", "kontext"])
def request_of(request, workshop, tiny_flux_model, tmp_path_factory):
    model, dataset = workshop.model, workshop.dataset
    if request.param != "chroma":
        model = replace(tiny_flux_model, flavour="kontext" if request.param == "kontext" else "dev")
    if request.param == "kontext":
        starts = tmp_path_factory.mktemp("starts")
        for path in Path(dataset.roots[0]).glob("*.png"):
            with Image.open(path) as image:
                ImageOps.invert(image).save(starts / path.name)
        parts = tuple(replace(part, references=str(starts)) for part in dataset.parts)
        dataset = DatasetConfig(parts, dataset.roots, (str(starts),))

    def make(**values):
        return replace(workshop.request(model=model, **values), dataset=dataset)

    return make


def test_the_loss_of_a_rolled_out_batch_is_the_formula(workshop, request_of):
    made = built(workshop, request_of(**ALWAYS))
    batches = enumerate(make_batch(made, m) for m in range(20))
    micro, batch = next((m, b) for m, b in batches if len(present(b.levels)) == 4 and len(b.sigma) == 2)
    levels, x0 = present(batch.levels), present(batch.x0)
    straight = make_batch(replace(made, config=replace(made.config, rollout_probability=0.0)), micro)
    assert torch.equal(batch.sigma, straight.sigma) and torch.equal(levels[-1], batch.sigma)
    x = interpolate(x0, batch.velocity + x0, levels[0])[0]
    torch.testing.assert_close(batch.x_sigma, x, rtol=0, atol=1e-6)
    with torch.no_grad():
        for i in range(3):
            step = (levels[i + 1] - levels[i])[:, None, None, None]
            x = x + step * made.family.predict(made.transformer, x, levels[i], batch.text, **batch.beside)
        found = made.family.predict(made.transformer, x, batch.sigma, batch.text, **batch.beside)
    sigma, start = batch.sigma[:, None, None, None], levels[0][:, None, None, None]
    expected = ((x - sigma * found - x0) / start).square().mean((1, 2, 3)).mean()
    torch.testing.assert_close(micro_loss(made, micro).detach(), expected, rtol=1e-5, atol=0)
    assert (x - straight.x_sigma).abs().max() > 1e-2


@pytest.mark.slow
def test_cancelled_and_resumed_it_is_the_same(workshop, request_of):
    asked = request_of(rollout_probability=0.5, rollout_steps=2)
    whole = run(asked, workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(asked, host)
    resumed = run(asked, host.cancelling_at(0))
    assert resumed.report["resumed_from"] == 3
    assert resumed.losses == whole.losses and resumed.lora.sha256 == whole.lora.sha256
    assert whole.losses != run(request_of(), workshop.host()).losses


def test_only_the_last_pass_has_a_gradient(workshop):
    """As if the input were a constant; and a model that could see through the steps would have another gradient."""
    made = built(workshop, workshop.request(**ALWAYS))
    batch = roll_out(made, make_batch(made, 0))
    assert not batch.x_sigma.requires_grad and not batch.velocity.requires_grad
    micro_loss(made, 0).backward()
    gradients = [present(parameter.grad) for parameter in made.parameters]
    made.optimizer.zero_grad()
    found = made.family.predict(made.transformer, batch.x_sigma, batch.sigma, batch.text)
    velocity_loss(present(batch.share) * found, batch.velocity).mean().backward()
    again = [present(parameter.grad) for parameter in made.parameters]
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
    assert any(gradient.any() for gradient in gradients)


def test_without_rollouts_the_record_and_the_batches_are_as_they_were(workshop):
    plain = workshop.request()
    assert (
        "rollout_probability" not in plain.as_json()["training"]
        and plain.as_json() == workshop.request(rollout_steps=9).as_json()
    )
    assert workshop.request(**ALWAYS).as_json()["training"]["rollout_steps"] == 3
    made = built(workshop, workshop.request(rollout_probability=0.5))
    batches = [make_batch(made, micro) for micro in range(200)]
    rolled = [len(batch.levels) for batch in batches if batch.levels is not None]
    assert 70 < len(rolled) < 130 and set(rolled) == {2, 3, 4}
    never = replace(made, config=replace(made.config, rollout_probability=0.0))
    for micro, batch in enumerate(batches):
        other = make_batch(never, micro)
        assert torch.equal(batch.sigma, other.sigma) and torch.equal(batch.velocity, other.velocity)
        assert (batch.levels is None) == torch.equal(batch.x_sigma, other.x_sigma)


def test_dropout_is_for_the_last_pass_alone(workshop):
    asked = replace(workshop.request(**ALWAYS), adapter=AdapterConfig(dropout=0.5))
    made, plain = built(workshop, asked), built(workshop, workshop.request(**ALWAYS))
    set_micro_(made.layers, 0)
    batch = make_batch(made, 0)
    one, other = roll_out(made, batch), roll_out(plain, batch)
    assert torch.equal(one.x_sigma, other.x_sigma)
    assert micro_loss(made, 0) != micro_loss(plain, 0)
    assert {layer.dropout.micro for layer in made.layers.values()} == {0}


def test_what_keeps_the_model_as_it_is_stays_on_the_path(workshop):
    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    both = DatasetConfig(tuple(replace(part, prior_preservation=keeps) for keeps in (False, True)), (root, root))
    made = built(workshop, replace(workshop.request(batch_size=4, **ALWAYS), dataset=both))
    micro = next(
        m for m in range(20) if (found := make_batch(made, m).prior) is not None and found.any() and not found.all()
    )
    batch = make_batch(made, micro)
    never = replace(made, config=replace(made.config, rollout_probability=0.0))
    straight = make_batch(never, micro)
    rolled = roll_out(made, batch)
    prior, share = present(batch.prior), present(rolled.share)
    assert torch.equal(rolled.x_sigma[prior], straight.x_sigma[prior])
    assert (share[prior] == 1).all() and (share[~prior] < 1).all()
    with torch.no_grad():
        ours = made.family.predict(made.transformer, rolled.x_sigma, batch.sigma, batch.text)
        set_strength_(made.transformer, 0.0)
        base = made.family.predict(made.transformer, rolled.x_sigma, batch.sigma, batch.text)
        set_strength_(made.transformer, 1.0)
    wanted = torch.where(prior, velocity_loss(ours, base), velocity_loss(share * ours, rolled.velocity)).mean()
    assert torch.equal(micro_loss(made, micro).detach(), wanted)
    alone = DatasetConfig((replace(part, prior_preservation=True),), (root,))
    with pytest.raises(UserError, match="rollout_probability: is above 0, but every image has prior_preservation"):
        plan_run(replace(workshop.request(**ALWAYS), dataset=alone), workshop.host())


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(group_offload="block", activation_offload=True),
        pytest.param(MemoryConfig(checkpointing_interval=2), marks=pytest.mark.slow),
    ],
)
def test_the_same_wherever_weights_wait(workshop, memory):
    asked = workshop.request(gradient_checkpointing=True, steps=2, **ALWAYS)
    losses = run(replace(asked, memory=memory), workshop.host()).losses
    assert losses == run(workshop.request(steps=2, **ALWAYS), workshop.host()).losses
