"""Every family of the registry holds models/family.py, on the tiny model of conftest.py (tiny_<family>_model)."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.models.family import Family
from chroma_trainer.trainer_core.quant.quantizer import is_kept
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

CPU = torch.device("cpu")
PROMPTS = ["", "a cat", "the red dog of the blue photo"]


@pytest.fixture(params=names("family"))
def family(request) -> Family:
    return load("family", request.param)()


@pytest.fixture
def model(request, family) -> ModelConfig:
    return request.getfixturevalue(f"tiny_{family.name}_model")


@pytest.fixture
def transformer(family, model):
    return family.load_transformer(model)


def inputs(family, model, batch: int):
    codec, encoder = family.load_codec(model, CPU), family.load_text_encoder(model, CPU)
    step = family.pixel_step
    x = torch.randn(batch, codec.channels, 4 * step // codec.factor, 2 * step // codec.factor)
    return x, torch.linspace(0.1, 0.9, batch), encoder.encode(PROMPTS)[:batch]


def test_names(family, model):
    assert family.name in names("family")
    labels = family.labels(model)
    assert labels["modelspec.architecture"].endswith("/lora") and labels["ss_base_model_version"]
    assert "all" in family.targets and family.pixel_step % 8 == 0


def test_a_good_model_has_no_problems(family, model):
    assert family.problems(model) == []


def test_identities_are_digests_and_differ(family, model):
    found = [family.identity(model, part) for part in ("transformer", "text_encoder", "codec")]
    assert len(set(found)) == 3 and all(len(digest) == 64 and int(digest, 16) for digest in found)
    assert found == [family.identity(model, part) for part in ("transformer", "text_encoder", "codec")]


def test_text(family, model):
    encoder = family.load_text_encoder(model, CPU)
    first, second = encoder.encode(PROMPTS), encoder.encode(PROMPTS[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for tokens in first:
        assert tokens.ndim == 2 and tokens.device == CPU and tokens.dtype == torch.float32 and not tokens.requires_grad
    assert encoder.encode([]) == []
    longest = max(len(encoder.token_ids(prompt)[0]) if hasattr(encoder, "token_ids") else 0 for prompt in PROMPTS)
    assert max(map(len, first)) == family.text_rows(model, longest)
    encoder = family.empty_text_encoder(model)
    assert all(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))


def test_settings_that_are_left_to_the_model(family, model):
    asked = ValidationConfig(prompts="a cat", steps=3, cfg=2.0, seed=5)
    assert family.resolve_sampling(model, asked) == asked
    drawn = family.resolve_sampling(model, replace(asked, sampling="by model"))
    assert family.warning(model, drawn) == ""
    assert drawn.steps > 3 and (drawn.prompts, drawn.seed) == ("a cat", 5)
    assert family.resolve_training(model, TrainingConfig(steps=7)).steps == 7


def test_drawing_ends_as_it_began(family, model, transformer):
    family.prepare_(transformer, model)
    given = inputs(family, model, 1)
    before = family.predict(transformer, *given)
    with pytest.raises(RuntimeError), family.drawing(transformer):
        family.predict(transformer, *given)
        raise RuntimeError
    assert torch.equal(family.predict(transformer, *given), before)


def test_codec(family, model):
    codec = family.load_codec(model, CPU)
    pixels = torch.rand(2, 3, 4 * family.pixel_step, 2 * family.pixel_step) * 2 - 1
    latents = codec.encode(pixels)
    assert latents.shape == (2, codec.channels, pixels.shape[2] // codec.factor, pixels.shape[3] // codec.factor)
    assert latents.dtype == torch.float32 and latents.device == CPU and not latents.requires_grad
    assert (codec.channels, codec.factor) == (family.latent_channels, family.latent_factor)
    decoded = codec.decode(latents)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1 and decoded.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_transformer_is_frozen_in_eval_mode_in_its_dtype(family, model, dtype):
    transformer = family.load_transformer(replace(model, dtype=dtype))
    assert not transformer.training
    assert not [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert not [name for name, t in (*transformer.named_parameters(), *transformer.named_buffers()) if t.is_meta]


def test_blocks_hold_nearly_everything(family, transformer):
    blocks = family.blocks(transformer)
    order = [module for module in transformer.modules() if module in blocks]
    assert blocks == order and len(blocks) >= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_predict(family, model, dtype):
    transformer = family.load_transformer(replace(model, dtype=dtype))
    x, sigma, text = inputs(family, model, 3)
    with torch.no_grad():
        velocity = family.predict(transformer, x, sigma, text)
        alone = torch.cat(
            [family.predict(transformer, x[i : i + 1], sigma[i : i + 1], text[i : i + 1]) for i in range(3)]
        )
    assert velocity.shape == x.shape and velocity.dtype == torch.float32 and velocity.isfinite().all()
    if dtype == "fp32":
        torch.testing.assert_close(velocity, alone, rtol=1e-5, atol=1e-5)
    assert (velocity - alone).norm() <= 0.02 * alone.norm()


def test_every_input_matters(family, model, transformer):
    x, sigma, text = inputs(family, model, 2)
    velocity = family.predict(transformer, x, sigma, text)
    others = ((x.flip(3), sigma, text), (x, sigma.flip(0), text), (x, sigma, text[::-1]))
    for other in others:
        assert (family.predict(transformer, *other) - velocity).abs().max() > 1e-4


def test_sigma_keeps_fp32(family, model):
    """Two sigmas that bf16 can't tell apart give different velocities in a bf16 model."""
    transformer = family.load_transformer(replace(model, dtype="bf16"))
    x, _, text = inputs(family, model, 1)
    close = [torch.tensor([0.9961]), torch.tensor([0.9971])]
    assert close[0].bfloat16() == close[1].bfloat16()
    first, second = (family.predict(transformer, x, sigma, text) for sigma in close)
    assert not torch.equal(first, second)


def test_a_picture_of_another_shape(family, model, transformer):
    x, sigma, text = inputs(family, model, 2)
    turned = x.transpose(2, 3).contiguous()
    assert family.predict(transformer, turned, sigma, text).shape == turned.shape


def test_targets_resolve_and_leave_the_frozen_alone(family, model):
    resolved = 0
    for preset, patterns in family.targets.items():
        transformer = family.load_transformer(model)
        if not all(any(fnmatchcase(name, p) for name, _ in transformer.named_modules()) for p in patterns):
            continue  # a preset for blocks that only the released model has
        chosen = resolve_targets(transformer, family, preset)
        resolved += 1
        assert chosen and not [name for name in chosen for p in family.frozen if fnmatchcase(name, p)]
    assert resolved >= 4


def test_gradients_reach_every_layer_of_a_lora(family, model, transformer):
    layers = inject_(
        transformer, resolve_targets(transformer, family, "*"), 2, 2, generator=torch.Generator().manual_seed(0)
    )
    for layer in layers.values():
        nn.init.normal_(layer.get_parameter("lora_B"))
    family.predict(transformer, *inputs(family, model, 2)).square().mean().backward()
    silent = [name for name, p in trainable_parameters(layers) if p.grad is None or p.grad.abs().max() == 0]
    # The last double block's text leaves no trace only where nothing reads it; here the single blocks do.
    assert silent == []


def test_kept_layers_are_named_by_patterns_that_match(family, transformer):
    modules = [name for name, _ in transformer.named_modules()]
    for pattern in (*family.full_precision, *family.frozen):
        assert any(fnmatchcase(name, pattern) for name in modules), pattern


@pytest.mark.parametrize(("level", "error"), [("int8-quanto", 0.01), ("int4-quanto", 0.15)])
def test_quantised_it_is_near_and_keeps_what_it_must(family, model, transformer, level, error):
    """tests/contracts/test_quantizers.py has every level on one family."""
    given = inputs(family, model, 2)
    exact = family.predict(transformer, *given)
    kept = {name for name in linears(transformer) if is_kept(name, family.full_precision)}
    quantised = load("quantization", level)().quantize_(transformer, family.full_precision)
    family.prepare_(quantised, model)
    assert {name for name, layer in linears(quantised).items() if type(layer) is nn.Linear} == kept
    assert not [name for name in kept if name.startswith(("transformer_blocks", "single_transformer_blocks"))]
    found = family.predict(quantised, *given)
    assert 0 < (found - exact).norm() <= error * exact.norm()
    quantised.restore_buffers_()


def linears(transformer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
