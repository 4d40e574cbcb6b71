"""Every quantiser of the registry holds the contract: small error, kept layers untouched, a LoRA learns on top."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

FAMILY = ChromaFamily()
CPU = torch.device("cpu")
# Relative error of the output and of the LoRA's gradient on the tiny random model, with room for other machines: its rows of
# 64 weights are one group, so 2 and 4 bits are further off than on a model of true width (docs/quantization.md).
INT8, FP8 = (0.01, 0.02), (0.04, 0.08)
ERRORS = {
    "none": (0.0, 0.0), "int8-quanto": INT8, "int4-quanto": (0.1, 0.2), "int2-quanto": (0.6, 0.9), "fp8-quanto": FP8,
    "nf4-bnb": (0.15, 0.3), "int8-bnb": INT8, "int8-torchao": INT8, "fp8-torchao": FP8, "fp8-native": FP8,
}  # fmt: skip
# Bytes of the blocks' weights, as a share of fp32's. 64-wide rows carry more scales than wide ones.
SHARES = {"none": 1.0, "int8": 0.27, "fp8": 0.27, "int4": 0.165, "int2": 0.1, "nf4": 0.15}


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
        assert torch.equal(*(model.get_parameter(f"{name}.weight") for model in (after, before)))


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
    assert relative(FAMILY.predict(quantized(tiny_model, level), *inputs), exact) <= ERRORS[level][0]


def test_the_error_of_the_loras_gradient_is_small(tiny_model, level, inputs):
    def gradient(transformer):
        generator = torch.Generator().manual_seed(1)
        layers = inject_(transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 4, generator=generator)
        for layer in layers.values():
            up = layer.get_parameter("lora_B")
            up.data.copy_(torch.randn(up.shape, generator=generator) * 0.05)
        loss = FAMILY.predict(transformer, *inputs).square().mean()
        grads = torch.autograd.grad(loss, [p for _, p in trainable_parameters(layers)])
        return torch.cat([grad.flatten() for grad in grads])

    exact, ours = gradient(FAMILY.load_transformer(tiny_model)), gradient(quantized(tiny_model, level))
    assert relative(ours, exact) <= ERRORS[level][1]


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
    assert not [name for name, p in transformer.named_parameters() if p.requires_grad and ".lora_" not in name]
    exported = export_lora(layers, transformer, tmp_path / "lora.safetensors", {})
    assert exported.applied == exported.num_keys == 2 * len(layers)
    trained = FAMILY.predict(transformer, *inputs)
    fresh = quantized(tiny_model, level)
    apply_lora_(fresh, tmp_path / "lora.safetensors")
    torch.testing.assert_close(FAMILY.predict(fresh, *inputs), trained)


def test_checkpointing_gives_the_same_gradient(tiny_model, level, inputs):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        transformer = quantized(tiny_model, level)
        names = resolve_targets(transformer, FAMILY, "all+ffs")
        layers = inject_(transformer, names, 4, 4, generator=torch.Generator().manual_seed(1))
        for layer in layers.values():
            layer.get_parameter("lora_B").data.fill_(0.01)
        if checkpointing:
            checkpoint_blocks_(FAMILY.blocks(transformer))
        loss = FAMILY.predict(transformer, *inputs).square().mean()
        return list(torch.autograd.grad(loss, [p for _, p in trainable_parameters(layers)]))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight(level, dtype):
    """Rounded once more to the model's precision, a new tensor, on stored tensors that safetensors can hold."""
    quantizer = load("quantization", level)()
    torch.manual_seed(0)
    weight = torch.randn(96, 192, dtype=dtype) * 0.02
    stored = quantizer.encode(weight)
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_sparse for tensor in stored.values())
    decoded = quantizer.decode(stored, (96, 192), dtype)
    assert decoded.dtype == dtype and decoded.shape == weight.shape and not decoded.requires_grad
    assert relative(decoded.float(), weight.float()) <= ERRORS[level][0] * 3 + 1e-9
    assert torch.equal(decoded, quantizer.decode(quantizer.encode(weight), (96, 192), dtype))
    assert quantizer.decode(stored, (96, 192), torch.float32).dtype == torch.float32


def test_bytes_of_the_blocks(tiny_model, level):
    def num_bytes(transformer) -> int:
        linears = [m for b in FAMILY.blocks(transformer) for m in b.modules() if isinstance(m, nn.Linear)]
        weights = [p for m in linears for name, p in m.named_parameters() if name != "bias"]
        return sum(p.numel() * p.element_size() for p in weights)

    share = num_bytes(quantized(tiny_model, level)) / num_bytes(FAMILY.load_transformer(tiny_model))
    assert share <= SHARES[level.split("-")[0]] + (0.12 if level == "nf4-bnb" else 0)  # 1 KiB of codes a layer


def test_it_moves_as_any_module(tiny_model, level, inputs):
    transformer = quantized(tiny_model, level)
    before, state = FAMILY.predict(transformer, *inputs), transformer.state_dict()
    transformer.to("meta").load_state_dict(state, strict=True, assign=True)
    transformer.restore_buffers_()
    assert torch.equal(FAMILY.predict(transformer, *inputs), before)


def test_the_device_is_asked(level):
    quantizer = load("quantization", level)()
    assert quantizer.unfit(CPU) == ""
    if not quantizer.is_plain:
        quantizer.decode = lambda stored, shape, dtype: torch.zeros(shape)
        assert "wrong results on cpu" in quantizer.unfit(CPU)


def test_a_layer_encoded_elsewhere_comes_home(level):
    layer = load("quantization", level)().layer(nn.Linear(128, 32), device=CPU)
    assert {p.device for p in layer.parameters()} == {CPU}


@pytest.mark.parametrize("shape", [(96, 384), (17, 100)])
def test_shapes_are_known_without_numbers(level, shape):
    """The memory plan quantises a model on the meta device."""
    if level == "nf4-bnb" and shape[1] % 64:
        shape = (18, 100)  # an even number of weights

    def layer(device: str) -> nn.Linear:
        plain = nn.Linear(shape[1], shape[0], device=device, dtype=torch.bfloat16)
        return load("quantization", level)().layer(plain)

    def kinds(layer: nn.Module) -> dict:
        return {name: (p.shape, p.dtype) for name, p in layer.named_parameters()}

    empty = layer("meta")
    assert kinds(empty) == kinds(layer("cpu")) and all(p.is_meta for p in empty.parameters())
    x = torch.empty(2, shape[1], device="meta", dtype=torch.bfloat16, requires_grad=True)
    empty(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
