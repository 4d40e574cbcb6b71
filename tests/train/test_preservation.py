"""Differential output preservation: the prediction without the trigger is held at that of the base model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.data.captions import class_caption
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.eval_loss import eval_loss
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.batch import make_batch, pick_prompt
from chroma_trainer.trainer_core.train.step.loop import micro_loss, train_step
from chroma_trainer.trainer_core.train.step.preservation import base_model, preservation_loss
from safetensors.torch import load_file

from tests.workshop import EVALUATED


def requested(workshop, class_word: str = "animal", **training):
    part = replace(workshop.dataset.parts[0], class_word=class_word)
    request = workshop.request(**{"preservation": 1.0, **training})
    return replace(request, dataset=DatasetConfig((part,), workshop.dataset.roots))


def state_of(request, workshop):
    host = workshop.host()
    return build_run(plan_run(request, host), host, PhaseTimer())


@pytest.mark.parametrize("class_word", ["animal", ""])
def test_it_is_the_distance_to_the_base_for_the_class_caption(workshop, class_word):
    state = state_of(requested(workshop, class_word, preservation=0.5), workshop)
    assert preservation_loss(state, 0).item() == 0  # the update is 0 at the start
    for layer in state.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    batch = make_batch(state, 1)
    samples = [state.samples[i] for i in state.plan.batch(1)]
    prompts = [pick_prompt(state.config, sample, 1, i) for i, sample in enumerate(samples)]
    assert any(prompts) and all(text == "" or "sks" in text for text in prompts)
    text = [state.text.get(class_caption(prompt, "sks", class_word)) for prompt in prompts]
    assert all(torch.equal(one, other) for one, other in zip(batch.class_text, text, strict=True))

    def predict():
        with torch.no_grad():
            return state.family.predict(state.transformer, batch.x_sigma, batch.sigma, text)

    with base_model(state):
        base = predict()
    assert torch.equal(preservation_loss(state, 1).detach(), 0.5 * velocity_loss(predict(), base).mean())


def test_a_steps_gradient_is_that_of_both_losses_together(workshop):
    state = state_of(requested(workshop, max_grad_norm=0.0, preservation=2.0, learning_rate=1e-6), workshop)
    for layer in state.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    both = micro_loss(state, 0) + preservation_loss(state, 0)
    gradients = torch.autograd.grad(both, state.parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    loss, trained = train_step(state, 1e-6)
    assert loss == pytest.approx(both.item(), rel=1e-5) and trained == pytest.approx(norm.item(), rel=1e-4)


def test_it_is_off_unless_asked_for(workshop):
    state = state_of(requested(workshop, preservation=0.0), workshop)
    assert not make_batch(state, 0).class_text
    recorded = requested(workshop, preservation=0.0).as_json()["training"]
    assert not {"preservation", "loss", "huber_c", "loss_weighting", "noise_choice"} & recorded.keys()


def test_the_eval_loss_is_mse_whatever_is_trained(workshop):
    plain, other = (
        state_of(workshop.request(**EVALUATED, **values), workshop)
        for values in ({}, {"loss": "mae", "loss_weighting": "sigma"})
    )
    assert eval_loss(plain, workshop.host()) == eval_loss(other, workshop.host())
    assert micro_loss(plain, 0) != micro_loss(other, 0)


def test_the_log_says_what_is_held(workshop):
    host = workshop.host()
    plan_run(requested(workshop), host)
    assert "preservation 1: the prediction for captions with 'animal' in place of 'sks' is held" in host.told()
    host = workshop.host()
    plan_run(requested(workshop, preservation=0.0), host)
    assert "class_word is 'animal', but preservation is 0: it has no effect" in host.told()


def everything(workshop):
    """A request with all that is drawn or weighed in a step."""
    part = replace(workshop.dataset.parts[0], class_word="animal", flip=0.5, tag_dropout=0.5, caption_suffix=", sharp")
    request = workshop.request(
        preservation=0.5, loss="huber", huber_c=0.3, loss_weighting="bell", noise_choice=3, accumulation=2, steps=4
    )
    return replace(request, dataset=DatasetConfig((part,), workshop.dataset.roots))


@pytest.mark.slow
def test_an_interrupted_run_with_all_of_it_ends_with_the_same_bytes(workshop):
    whole = run(everything(workshop), workshop.host())
    host = workshop.host()
    with pytest.raises(Cancelled):
        run(everything(workshop), host.cancelling_at(3))
    resumed = run(everything(workshop), workshop.host(host.paths.output))
    assert resumed.lora.sha256 == whole.lora.sha256
    plain = run(workshop.request(steps=4, accumulation=2), workshop.host())
    ours, theirs = load_file(whole.lora.path), load_file(plain.lora.path)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_loss_weight_of_1_changes_no_byte_and_another_one_scales_the_loss(workshop, tmp_path):
    def state_with(weight: str):
        table = tmp_path / f"{weight}.csv"
        rows = "".join(f"{number},{weight}\n" for number in range(4))
        table.write_text(f"file_name,loss_weight\n{rows}", encoding="utf-8")
        part = replace(workshop.dataset.parts[0], table=table.name)
        dataset = DatasetConfig((part,), workshop.dataset.roots, tables=(str(table),))
        return state_of(replace(workshop.request(), dataset=dataset), workshop)

    plain = state_of(workshop.request(), workshop)
    one, half = state_with("1.0"), state_with("0.5")
    assert make_batch(one, 0).factor is None
    assert torch.equal(micro_loss(one, 0), micro_loss(plain, 0))
    torch.testing.assert_close(micro_loss(half, 0), micro_loss(plain, 0) / 2)
