"""Values of new nodes, and what a workflow that lacks the field trains on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.nodes import lora_trainer
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.prepare import plan_run

FIELDS = {field.name: field for field in lora_trainer.SPEC.fields()}


def test_a_missing_field_keeps_its_default():
    assert (TrainingConfig().alpha, TrainingConfig().sigma_density) == (16.0, "chroma")
    assert (FIELDS["alpha"].default, FIELDS["sigma_density"].default) == (16.0, "chroma")
    assert (FIELDS["alpha"].initial, FIELDS["sigma_density"].initial) == (0.0, "auto")
    others = [field for name, field in FIELDS.items() if name not in ("alpha", "sigma_density")]
    assert all(field.initial == field.default for field in others)


@pytest.mark.parametrize(("family", "density"), [("chroma", "chroma"), ("flux", "logit-normal")])
def test_auto_is_the_familys_density(family, density, tiny_chroma_model, tiny_flux_model):
    model = {"chroma": tiny_chroma_model, "flux": tiny_flux_model}[family]
    resolve = load("family", family)().resolve_training
    assert resolve(model, TrainingConfig(sigma_density="auto")).sigma_density == density
    assert resolve(model, TrainingConfig(sigma_density="uniform")).sigma_density == "uniform"


def test_a_run_with_the_values_of_new_nodes_is_the_run_that_they_stand_for(workshop):
    new_host, old_host = workshop.host(), workshop.host()
    new = plan_run(workshop.request(alpha=0.0, sigma_density="auto"), new_host)
    old = plan_run(workshop.request(alpha=4.0, sigma_density="chroma"), old_host)
    assert new.folder.name == old.folder.name and new.request.as_json() == old.request.as_json()
    told = new_host.told()
    assert "sigma_density auto: chroma, which suits this Chroma model" in told and "alpha 0: 4, as the rank" in told
    assert not any("alpha" in text for text in old_host.told())


def test_alpha_above_rank_is_said(workshop):
    host = workshop.host()
    plan_run(replace(workshop.request(), training=replace(workshop.request().training, alpha=16.0)), host)
    assert any("alpha is 16 and rank 4: the update is scaled by alpha / rank, 4 times" in text for text in host.told())
