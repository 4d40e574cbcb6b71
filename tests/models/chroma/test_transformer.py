"""Our modules against diffusers' own: the same layers in the same order, the same numbers in fp32, nearer to the truth in bf16."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.flux_lineage import MAX_ROPE_GRIDS
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from diffusers import ChromaTransformer2DModel
from torch import nn

from tests.narrowing import of_type, present

FAMILY = ChromaFamily()
CPU = torch.device("cpu")


def inputs(sigma: float = 0.7):
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(5, 32, generator=generator)]
    return torch.randn(1, 16, 8, 6, generator=generator), torch.tensor([sigma]), text


def diffusers_velocity(transformer, x, sigma, text):
    dtype = transformer.x_embedder.weight.dtype
    velocity = transformer(
        hidden_states=pack(x).to(dtype),
        encoder_hidden_states=torch.stack(text).to(dtype),
        timestep=sigma,
        img_ids=image_ids(8, 6),
        txt_ids=torch.zeros(len(text[0]), 3),
        return_dict=False,
    )[0]
    return unpack(velocity.float(), 8, 6)


@pytest.fixture
def reference(tiny_chroma):
    return ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").eval().requires_grad_(False)


def test_the_same_layers_in_the_same_order(tiny_model, reference):
    """A LoRA is drawn in the order of layers, so it decides its bytes."""
    ours = loaded(tiny_model)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert linear_layers(ours) == linear_layers(reference)
    assert torch.equal(*(model.get_buffer("time_text_embed.mod_proj") for model in (ours, reference)))
    places = torch.cat([torch.zeros(3, 3), image_ids(8, 6)])
    for mine, theirs in zip(ours.pos_embed(places), reference.pos_embed(places), strict=True):
        assert torch.equal(mine, theirs)


def loaded(model: ModelConfig) -> ChromaTransformer:
    return of_type(FAMILY.load_transformer(model), ChromaTransformer)


def linear_layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_same_in_fp32(tiny_model, reference, sigma):
    """But for the last bits: shift and scale are one fused operation here."""
    ours = FAMILY.predict(FAMILY.load_transformer(tiny_model), *inputs(sigma))
    torch.testing.assert_close(ours, diffusers_velocity(reference, *inputs(sigma)), rtol=1e-5, atol=1e-6)


def test_the_same_gradient_in_fp32(tiny_model, reference):
    x, sigma, text = inputs()
    gradients = []
    for predict in (
        lambda x: FAMILY.predict(FAMILY.load_transformer(tiny_model), x, sigma, text),
        lambda x: diffusers_velocity(reference, x, sigma, text),
    ):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(predict(leaf).square().sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_same_with_a_mask(tiny_model, reference):
    """Ours masks keys alone, theirs the rows of pads as well, which nobody reads."""
    x, sigma, text = inputs()
    mask = torch.ones(1, 5 + 12, dtype=torch.bool)
    mask[:, 3:5] = False
    both = [
        model(
            hidden_states=pack(x), encoder_hidden_states=torch.stack(text), timestep=sigma, img_ids=image_ids(8, 6),
            txt_ids=torch.zeros(5, 3), attention_mask=mask, return_dict=False,
        )[0]
        for model in (FAMILY.load_transformer(tiny_model), reference)
    ]  # fmt: skip
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_bf16_is_nearer_to_fp32_than_diffusers(tiny_model, reference):
    """Averaged over sigmas that bf16 can't hold."""
    narrow = FAMILY.load_transformer(replace(tiny_model, dtype="bf16"))
    their_narrow = of_type(ChromaTransformer2DModel.from_config(reference.config), ChromaTransformer2DModel).bfloat16()
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
    transformer = loaded(tiny_model)
    inject_(transformer, ["x_embedder"], 2, 2, generator=torch.Generator().manual_seed(0))
    assert not transformer.modulation(torch.tensor([0.5]), torch.float32).requires_grad
    transformer.distilled_guidance_layer.requires_grad_(True)  # full training of a small model is possible
    assert transformer.modulation(torch.tensor([0.5]), torch.float32).requires_grad


def test_positions_are_kept_by_shape_and_bounded(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    _, sigma, text = inputs()
    for i in range(MAX_ROPE_GRIDS + 3):
        FAMILY.predict(transformer, torch.zeros(1, 16, 2, 2 * (i + 1)), sigma, text)
    assert len(vars(transformer)["_rope_by_shape"]) == MAX_ROPE_GRIDS


def test_a_preview_in_inference_mode_does_not_spoil_training(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    layers = inject_(transformer, ["x_embedder"], 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        FAMILY.predict(transformer, *inputs())
    FAMILY.predict(transformer, *inputs()).square().mean().backward()
    assert present(layers["x_embedder"].get_parameter("lora_B").grad).abs().max() > 0


def test_its_weights_load_in_diffusers(tiny_model, reference):
    again = of_type(ChromaTransformer2DModel.from_config(reference.config), ChromaTransformer2DModel)
    again.load_state_dict(FAMILY.load_transformer(tiny_model).state_dict())
    assert torch.equal(diffusers_velocity(again, *inputs()), diffusers_velocity(reference, *inputs()))


def test_no_library_of_models_is_imported_with_the_modules():
    """Its import takes longer than all else before the first step."""
    code = (
        "import sys, chroma_trainer.trainer_core.train.run as run; from chroma_trainer.trainer_core import models; "
        "from chroma_trainer.trainer_core.models.chroma import transformer; from chroma_trainer.trainer_core.models import codec; from chroma_trainer.trainer_core.models.text import clip, t5, tokenizer; "
        "print([name for name in ('diffusers', 'transformers', 'peft', 'accelerate', 'optimum') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
