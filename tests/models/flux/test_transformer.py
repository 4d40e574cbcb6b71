"""Flux's modules against diffusers' own, with guidance and without: the same layers, numbers and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.flux.text_encoder import join, part
from chroma_trainer.trainer_core.models.flux.transformer import FluxTransformer
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from diffusers import FluxTransformer2DModel
from torch import nn

from tests.conftest import flux_model, write_tiny_flux
from tests.narrowing import of_type, present

FAMILY = FluxFamily()


@pytest.fixture(scope="module")
def without_guidance(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "schnell"
    write_tiny_flux(folder, guidance_embeds=False)
    return flux_model(folder)


@pytest.fixture(params=["with guidance", "without"])
def model(request, tiny_flux_model, without_guidance):
    return tiny_flux_model if request.param == "with guidance" else without_guidance


@pytest.fixture
def reference(model):
    return FluxTransformer2DModel.from_pretrained(model.repo, subfolder="transformer").eval().requires_grad_(False)


def test_comfyui_divides_the_sigmas_of_a_flux_with_a_guidance_embedding_more_finely(model, reference):
    transformer = FAMILY.load_transformer(model)
    assert FAMILY.num_noise_levels(transformer) == (10_000 if reference.config["guidance_embeds"] else 1000)


def inputs(sigma: float = 0.7, lengths: tuple[int, ...] = (5,)):
    generator = torch.Generator().manual_seed(1)
    rows = [join(torch.randn(k, 32, generator=generator), torch.randn(16, generator=generator)) for k in lengths]
    x = torch.randn(len(lengths), 16, 8, 6, generator=generator)
    return x, torch.full((len(lengths),), sigma), rows


def diffusers_velocity(transformer, x, sigma, text, guidance=1.0):
    tokens, pooled = part(text, 16)
    dtype = transformer.x_embedder.weight.dtype
    velocity = transformer(
        hidden_states=pack(x).to(dtype),
        encoder_hidden_states=torch.stack(tokens).to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=sigma,
        guidance=torch.full_like(sigma, guidance) if transformer.config["guidance_embeds"] else None,
        img_ids=image_ids(8, 6),
        txt_ids=torch.zeros(len(tokens[0]), 3),
        return_dict=False,
    )[0]
    return unpack(velocity.float(), 8, 6)


def linear_layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def test_the_same_layers_in_the_same_order(model, reference):
    ours = FAMILY.load_transformer(model)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert linear_layers(ours) == linear_layers(reference)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_same_in_fp32(model, reference, sigma):
    given = inputs(sigma, lengths=(5, 5))
    ours = FAMILY.predict(FAMILY.load_transformer(model), *given)
    torch.testing.assert_close(ours, diffusers_velocity(reference, *given), rtol=1e-5, atol=1e-5)


def test_the_same_gradient_in_fp32(model, reference):
    x, sigma, text = inputs()
    gradients = []
    for predict in (
        lambda x: FAMILY.predict(FAMILY.load_transformer(model), x, sigma, text),
        lambda x: diffusers_velocity(reference, x, sigma, text),
    ):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(predict(leaf).square().sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_same_gradient_of_every_weight(model, reference):
    """Modulations and embedders among them."""
    ours, given = FAMILY.load_transformer(model).requires_grad_(True), inputs(0.4)
    FAMILY.predict(ours, *given).square().sum().backward()
    diffusers_velocity(reference.requires_grad_(True), *given).square().sum().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_guidance_is_what_the_flavour_says(tiny_flux_model):
    options = replace(tiny_flux_model.flux, guidance=3.5)
    ours = FAMILY.load_transformer(replace(tiny_flux_model, flux=options))
    reference = FluxTransformer2DModel.from_pretrained(tiny_flux_model.repo, subfolder="transformer").eval()
    with torch.no_grad():
        velocity = FAMILY.predict(ours, *inputs())
        torch.testing.assert_close(
            velocity, diffusers_velocity(reference, *inputs(), guidance=3.5), rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(velocity, diffusers_velocity(reference, *inputs(), guidance=1.0), atol=1e-4)


def test_texts_of_different_lengths_are_masked(tiny_flux_model):
    """Only of masked flavours texts have different lengths: each sample attends its own tokens."""
    transformer = FAMILY.load_transformer(tiny_flux_model)
    x, sigma, text = inputs(lengths=(3, 7))
    together = FAMILY.predict(transformer, x, sigma, text)
    for i in range(2):
        alone = FAMILY.predict(transformer, x[i : i + 1], sigma[:1], text[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_bf16_is_nearer_to_fp32_than_diffusers(tiny_flux_model):
    """Averaged over sigmas that bf16 can't hold."""
    reference = FluxTransformer2DModel.from_pretrained(tiny_flux_model.repo, subfolder="transformer").eval()
    reference.requires_grad_(False)
    narrow = FAMILY.load_transformer(replace(tiny_flux_model, dtype="bf16"))
    theirs = of_type(FluxTransformer2DModel.from_config(reference.config), FluxTransformer2DModel).bfloat16()
    theirs.load_state_dict(narrow.state_dict())
    ours_off = theirs_off = 0.0
    for sigma in torch.linspace(0.9, 0.999, 10).tolist():
        exact = diffusers_velocity(reference, *inputs(sigma))
        ours_off += (FAMILY.predict(narrow, *inputs(sigma)) - exact).norm().item()
        theirs_off += (diffusers_velocity(theirs, *inputs(sigma)) - exact).norm().item()
    assert ours_off < theirs_off


def test_an_adapted_embedder_is_no_hindrance(tiny_flux_model):
    transformer = FAMILY.load_transformer(tiny_flux_model)
    layers = inject_(transformer, ["x_embedder", "norm_out.linear"], 2, 2, generator=torch.Generator().manual_seed(0))
    FAMILY.predict(transformer, *inputs()).square().mean().backward()
    assert all(present(b.grad).abs().max() > 0 for b in (layer.get_parameter("lora_B") for layer in layers.values()))


def test_the_released_models_have_their_known_size():
    for guidance, numbers in ((True, 11_901_408_320), (False, 11_891_178_560)):
        with torch.device("meta"):
            dev = FluxTransformer.from_config({**load_shipped_config("flux_transformer"), "guidance_embeds": guidance})
        assert sum(parameter.numel() for parameter in dev.parameters()) == numbers
        inside = [m.weight.numel() for block in FAMILY.blocks(dev) for m in block.modules() if isinstance(m, nn.Linear)]
        assert sum(inside) == 11_834_228_736


def test_references_are_kontexts(tiny_flux_model):
    """As diffusers' FluxKontextPipeline hands them over: behind the picture's tokens, at 1 on the first axis; what is said of them is cut off."""
    reference = FluxTransformer2DModel.from_pretrained(tiny_flux_model.repo, subfolder="transformer").eval()
    ours = FAMILY.load_transformer(tiny_flux_model)
    x, sigma, text = inputs()
    start = torch.randn(1, 16, 4, 10, generator=torch.Generator().manual_seed(3))  # of another shape
    tokens, pooled = part(text, 16)
    ids = image_ids(4, 10)
    ids[:, 0] = 1
    with torch.no_grad():
        wanted = reference(
            hidden_states=torch.cat([pack(x), pack(start)], dim=1),
            encoder_hidden_states=torch.stack(tokens),
            pooled_projections=pooled,
            timestep=sigma,
            guidance=torch.ones(1),
            img_ids=torch.cat([image_ids(8, 6), ids]),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0][:, :12]
        found = FAMILY.predict(ours, x, sigma, text, reference=start)
        torch.testing.assert_close(found, unpack(wanted, 8, 6), rtol=1e-5, atol=1e-5)
        without = FAMILY.predict(ours, x, sigma, text)
    assert found.shape == x.shape and (found - without).abs().max() > 0.01
