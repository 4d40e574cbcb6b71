"""Every quantiser of the registry holds the contract: small error, kept layers untouched, a LoRA learns on top."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from chroma_trainer.trainer_core.families.chroma import ChromaFamily
from chroma_trainer.trainer_core.lora.export import export_lora
from chroma_trainer.trainer_core.lora.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.lora.read import apply_lora_
from chroma_trainer.trainer_core.lora.targets import resolve_targets
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

FAMILY = ChromaFamily()
# Relative error of the output and of the LoRA's gradient on the tiny random model, with room for other machines.
OUTPUT_ERROR = {"none": 0.0, "int8-quanto": 0.02}
GRADIENT_ERROR = {"none": 0.0, "int8-quanto": 0.05}


@pytest.fixture(params=names("quantization"))
def level(request):
    missing = load("quantization", request.param)().missing()
    if missing:
        pytest.skip(missing)
    return request.param


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 8, 6, generator=generator)
    return x, torch.tensor([0.3, 0.8]), [torch.randn(length, 32, generator=generator) for length in (4, 7)]


def quantized(tiny_model, level):
    transformer = FAMILY.load_transformer(tiny_model)
    return load("quantization", level)().quantize_(transformer, FAMILY.full_precision)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_same_module_object_is_returned(tiny_model, level):
    transformer = FAMILY.load_transformer(tiny_model)
    assert load("quantization", level)().quantize_(transformer, FAMILY.full_precision) is transformer


def test_nothing_of_the_base_wants_a_gradient(tiny_model, level):
    assert not [name for name, p in quantized(tiny_model, level).named_parameters() if p.requires_grad]


def test_kept_layers_are_untouched_and_linears_stay_linears(tiny_model, level):
    before = FAMILY.load_transformer(tiny_model)
    after = quantized(tiny_model, level)
    linears = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {name for name, module in after.named_modules() if isinstance(module, nn.Linear)}
    kept = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in FAMILY.full_precision)]
    assert {"x_embedder", "context_embedder", "proj_out", "distilled_guidance_layer.in_proj"} <= set(kept)
    for name in kept:
        assert type(after.get_submodule(name)) is nn.Linear
        assert torch.equal(after.get_submodule(name).weight, before.get_submodule(name).weight)


def test_every_linear_of_the_blocks_is_quantised(tiny_model, level):
    if level == "none":
        pytest.skip("keeps everything")
    blocks = quantized(tiny_model, level)
    plain = [
        name
        for name, module in blocks.named_modules()
        if name.startswith(("transformer_blocks", "single_transformer_blocks")) and type(module) is nn.Linear
    ]
    assert plain == []


def test_the_error_of_the_output_is_small(tiny_model, level, inputs):
    exact = FAMILY.predict(FAMILY.load_transformer(tiny_model), *inputs)
    assert relative(FAMILY.predict(quantized(tiny_model, level), *inputs), exact) <= OUTPUT_ERROR[level]


def test_the_error_of_the_loras_gradient_is_small(tiny_model, level, inputs):
    def gradient(transformer):
        generator = torch.Generator().manual_seed(1)
        layers = inject_(transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 4, generator=generator)
        for layer in layers.values():
            layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
        loss = FAMILY.predict(transformer, *inputs).square().mean()
        grads = torch.autograd.grad(loss, [p for _, p in trainable_parameters(layers)])
        return torch.cat([grad.flatten() for grad in grads])

    exact, ours = gradient(FAMILY.load_transformer(tiny_model)), gradient(quantized(tiny_model, level))
    assert relative(ours, exact) <= GRADIENT_ERROR[level]


def test_a_lora_learns_on_top_and_its_file_fits(tiny_model, level, inputs, tmp_path):
    transformer = quantized(tiny_model, level)
    layers = inject_(
        transformer, resolve_targets(transformer, FAMILY, "all"), 4, 4, generator=torch.Generator().manual_seed(1)
    )
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(layers)], lr=1e-2)
    target = torch.zeros(2, 16, 8, 6)
    losses = []
    for _ in range(5):
        loss = (FAMILY.predict(transformer, *inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    exported = export_lora(layers, transformer, tmp_path / "lora.safetensors", {})
    assert exported.applied == exported.num_keys == 2 * len(layers)
    trained = FAMILY.predict(transformer, *inputs)
    fresh = quantized(tiny_model, level)
    apply_lora_(fresh, tmp_path / "lora.safetensors")
    torch.testing.assert_close(FAMILY.predict(fresh, *inputs), trained)
