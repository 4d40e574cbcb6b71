"""Our forward against diffusers' own: the same in fp32, nearer to the truth in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.families.chroma import MAX_ROPE_GRIDS, ChromaFamily
from chroma_trainer.trainer_core.families.packing import image_ids, pack, text_ids, unpack
from chroma_trainer.trainer_core.lora.inject import inject_
from diffusers import ChromaTransformer2DModel

FAMILY = ChromaFamily()
CPU = torch.device("cpu")


def inputs(sigma: float = 0.7):
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(5, 32, generator=generator)]
    return torch.randn(1, 16, 8, 6, generator=generator), torch.tensor([sigma]), text


def diffusers_velocity(transformer, x, sigma, text):
    velocity = transformer(
        hidden_states=pack(x).to(transformer.dtype),
        encoder_hidden_states=torch.stack(text).to(transformer.dtype),
        timestep=sigma,
        img_ids=image_ids(8, 6),
        txt_ids=text_ids(len(text[0])),
        return_dict=False,
    )[0]
    return unpack(velocity.float(), 8, 6)


@pytest.fixture
def reference(tiny_chroma):
    return ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").eval().requires_grad_(False)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_same_in_fp32(tiny_model, reference, sigma):
    ours = FAMILY.predict(FAMILY.load_transformer(tiny_model), *inputs(sigma))
    assert torch.equal(ours, diffusers_velocity(reference, *inputs(sigma)))


def test_bf16_is_nearer_to_fp32_than_diffusers(tiny_model, reference):
    """Averaged over sigmas that bf16 can't hold."""
    narrow = FAMILY.load_transformer(replace(tiny_model, dtype="bf16"))
    their_narrow = ChromaTransformer2DModel.from_config(reference.config).bfloat16()
    their_narrow.load_state_dict(narrow.state_dict())
    ours = theirs = 0.0
    for sigma in torch.linspace(0.9, 0.999, 10).tolist():
        exact = diffusers_velocity(reference, *inputs(sigma))
        ours += (FAMILY.predict(narrow, *inputs(sigma)) - exact).norm().item()
        theirs += (diffusers_velocity(their_narrow, *inputs(sigma)) - exact).norm().item()
    assert ours < theirs


def test_ids_or_ready_positions(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    x, sigma, text = inputs()
    assert torch.equal(FAMILY.predict(transformer, x, sigma, text), diffusers_velocity(transformer, x, sigma, text))


def test_the_approximator_leaves_no_graph_in_lora_training(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    inject_(transformer, ["x_embedder"], 2, 2, generator=torch.Generator().manual_seed(0))
    assert not transformer.modulation(torch.tensor([0.5]), torch.float32).requires_grad
    transformer.distilled_guidance_layer.requires_grad_(True)  # full training of a small model is possible
    assert transformer.modulation(torch.tensor([0.5]), torch.float32).requires_grad


def test_positions_are_kept_by_shape_and_bounded(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    _, sigma, text = inputs()
    for i in range(MAX_ROPE_GRIDS + 3):
        FAMILY.predict(transformer, torch.zeros(1, 16, 2, 2 * (i + 1)), sigma, text)
    assert len(transformer._rope_by_shape) == MAX_ROPE_GRIDS


def test_a_preview_in_inference_mode_does_not_spoil_training(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    layers = inject_(transformer, ["x_embedder"], 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        FAMILY.predict(transformer, *inputs())
    FAMILY.predict(transformer, *inputs()).square().mean().backward()
    assert layers["x_embedder"].lora_B.grad.abs().max() > 0


def test_saved_by_diffusers_it_loads_in_diffusers(tiny_model, tmp_path):
    FAMILY.load_transformer(tiny_model).save_pretrained(tmp_path)
    again = ChromaTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(
        diffusers_velocity(again, *inputs()), FAMILY.predict(FAMILY.load_transformer(tiny_model), *inputs())
    )
