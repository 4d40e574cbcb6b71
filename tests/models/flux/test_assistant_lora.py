"""A LoRA that acts while a Flux trains and not while it draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.setup.placement import place_

from .test_transformer import inputs

FAMILY = FluxFamily()


def lora_file(model, path, kind="lora"):
    transformer = FAMILY.load_transformer(model)
    names = resolve_targets(transformer, FAMILY, "ai-toolkit")
    draw = torch.Generator().manual_seed(4)
    layers = inject_(transformer, names, 2, 2, generator=draw, config=AdapterConfig(kind=kind, lokr_factor=4))
    with torch.no_grad():
        for _, parameter in trainable_parameters(layers):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    export_lora(layers, transformer, path, {})
    return path


@pytest.fixture
def assisted(tiny_flux_model, tmp_path):
    file = lora_file(tiny_flux_model, tmp_path / "assistant.safetensors")
    return replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, assistant_file=str(file), drawn_guidance=1.0))


@torch.no_grad()
def test_on_in_training_off_in_drawing(assisted):
    plain, helped, wanted = (FAMILY.load_transformer(assisted) for _ in range(3))
    FAMILY.prepare_(helped, assisted)
    apply_lora_(wanted, assisted.flux.assistant_file)
    torch.testing.assert_close(
        FAMILY.predict(helped, *inputs()), FAMILY.predict(wanted, *inputs()), rtol=1e-5, atol=1e-5
    )
    assert (FAMILY.predict(helped, *inputs()) - FAMILY.predict(plain, *inputs())).abs().max() > 0.01
    with FAMILY.drawing(helped):
        assert torch.equal(FAMILY.predict(helped, *inputs()), FAMILY.predict(plain, *inputs()))
    assert FAMILY.predict(helped, *inputs()).allclose(FAMILY.predict(wanted, *inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("level", ["none", "int8-quanto"])
def test_a_lora_learns_on_top_and_is_exported_without_it(assisted, tmp_path, kind, level):
    transformer = FAMILY.load_transformer(assisted)
    load("quantization", level)().quantize_(transformer, FAMILY.full_precision)
    FAMILY.prepare_(transformer, assisted)
    before = FAMILY.predict(transformer, *inputs())
    names = resolve_targets(transformer, FAMILY, "all")
    config = AdapterConfig(kind=kind)
    layers = inject_(transformer, names, 2, 2, generator=torch.Generator().manual_seed(0), config=config)
    after = FAMILY.predict(transformer, *inputs())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(layers))
    saved = export_lora(layers, transformer, tmp_path / "new.safetensors", {})
    assert saved.applied == saved.num_keys
    assert not any("assistant" in name for name in transformer.state_dict())


def gradients(model, memory, folder):
    transformer = FAMILY.load_transformer(model)
    FAMILY.prepare_(transformer, model)
    names = resolve_targets(transformer, FAMILY, "all+ffs")
    layers = inject_(transformer, names, 2, 2, generator=torch.Generator().manual_seed(0))
    place_(transformer, FAMILY, memory, torch.device("cpu"), checkpointing=True, disk=folder)
    loss = FAMILY.predict(transformer, *inputs()).square().mean()
    return torch.autograd.grad(loss, [parameter for _, parameter in trainable_parameters(layers)])


@pytest.mark.parametrize("kind", ["block", "leaf"])
def test_gradients_go_through_it_wherever_weights_wait(assisted, tiny_flux_model, tmp_path, kind):
    wanted = gradients(assisted, MemoryConfig(), tmp_path)
    found = gradients(assisted, MemoryConfig(group_offload=kind), tmp_path)
    without = gradients(tiny_flux_model, MemoryConfig(), tmp_path)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert any((one - other).abs().max() > 0.1 * other.abs().max() for one, other in zip(without, wanted, strict=True))


def test_it_is_part_of_what_is_trained(assisted, tiny_flux_model):
    assert FAMILY.problems(assisted) == []
    assert FAMILY.identity(assisted, "transformer") != FAMILY.identity(tiny_flux_model, "transformer")
    assert FAMILY.identity(assisted, "text_encoder") == FAMILY.identity(tiny_flux_model, "text_encoder")
    assert QuantizationConfig() == assisted.quantization


def test_what_can_not_assist_is_refused_before_loading(tiny_flux_model, tmp_path):
    file = lora_file(tiny_flux_model, tmp_path / "other.safetensors", "lokr")
    model = replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, assistant_file=str(file)))
    assert "assistant: other.safetensors is not a plain LoRA (lokr)" in str(FAMILY.problems(model)[0])
