"""Models in ComfyUI's newer quantized files and in nf4: checked, planned, kept as they are, and trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.lora_tools.extract import open_config
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant.loading import load_base, text_converter
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.quant.quantizer import KeepPrecision
from chroma_trainer.trainer_core.storage.packed.decode_packed import E2M1, hadamard
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.workshop import EVALUATED

from .test_gguf import original_weights

FAMILY, CPU = ChromaFamily(), torch.device("cpu")


def text(**values: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def tile(scales: Tensor) -> Tensor:
    """As cuBLAS stores scales: (128, 4) at a time."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    whole = torch.zeros(rows, columns, dtype=scales.dtype)
    whole[: scales.shape[0], : scales.shape[1]] = scales
    blocks = whole.reshape(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(rows, columns)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def int8_rotated(name: str, weight: Tensor) -> dict[str, Tensor]:
    rotated = (weight.unflatten(1, (-1, 64)) @ hadamard(64)).flatten(1)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    described = text(format="int8_tensorwise", convrot=True, convrot_groupsize=64)
    return {
        f"{name}.weight": (rotated / scale).round().to(torch.int8), f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": described,
    }  # fmt: skip


def mxfp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.unflatten(1, (-1, 32))
    exponents = (blocks.abs().amax(2) / 448).log2().ceil()
    codes = (blocks / 2 ** exponents[..., None]).flatten(1).to(torch.float8_e4m3fn)
    scale = tile((exponents + 127).to(torch.uint8))
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": text(format="mxfp8")}


def nvfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.unflatten(1, (-1, 16))
    whole = weight.abs().max() / (6 * 448)
    scales = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    codes = nearest(blocks / (whole * scales.float())[..., None], torch.tensor(E2M1)).flatten(1)
    return {
        f"{name}.weight": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8),
        f"{name}.weight_scale": tile(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": whole, f"{name}.comfy_quant": text(format="nvfp4"),
    }  # fmt: skip


def nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    table = torch.tensor(
        [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
    )
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = nearest(blocks / absmax[:, None], table).flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        f"{name}.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], f"{name}.weight.absmax": absmax,
        f"{name}.weight.quant_map": table, f"{name}.weight.quant_state.bitsandbytes__nf4": text(**state),
    }  # fmt: skip


# Form -> how a weight is written, most bits of a weight in memory with its scales, and the largest error of a velocity.
FORMS = {
    "int8-rot64": (int8_rotated, 8.5, 0.02),
    "mxfp8": (mxfp8, 8.25, 0.06),
    "nvfp4": (nvfp4, 5.0, 0.25),
    "4bit-table": (nf4, 4.5, 0.25),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(form, tiny_model, tiny_chroma, tmp_path_factory) -> ModelConfig:
    """The tiny Chroma in a file as ComfyUI has them: the original names, a prefix, and every Linear of the blocks in a form."""
    tensors: dict[str, Tensor] = {}
    for key, array in original_weights(tiny_chroma).items():
        weight, name = torch.from_numpy(array), f"model.diffusion_model.{key}"
        is_linear = key.endswith(".weight") and weight.ndim == 2 and "blocks." in key
        tensors |= FORMS[form][0](name.removesuffix(".weight"), weight) if is_linear else {name: weight}
    file = tmp_path_factory.mktemp("quantized") / f"{form}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return replace(tiny_model, transformer_file=str(file))


def base_of(model: ModelConfig, tmp_path: Path) -> Any:
    return load_base(FAMILY, model, SinkHost(paths=Paths(output=tmp_path, cache=tmp_path / "cache")), CPU)


def test_weights_stay_as_they_are_and_products_are_exact(model, form, tiny_model, tmp_path):
    assert FAMILY.problems(model) == []
    packed, plain = base_of(model, tmp_path), FAMILY.load_transformer(model)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 34 and {getattr(layer.format, "type", "") for layer in layers.values()} == {form}
    stored = [tensor for layer in layers.values() for tensor in layer.stored.values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in stored)
    for name, layer in layers.items():  # fused rows are split with their scales
        torch.testing.assert_close(layer.dequantize(), plain.get_submodule(name).weight, rtol=1e-5, atol=1e-7)
    latents, sigma = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    prompt = [torch.randn(5, 32, generator=torch.Generator().manual_seed(1))]
    exact, ours, original = (
        FAMILY.predict(base, latents, sigma, prompt) for base in (plain, packed, FAMILY.load_transformer(tiny_model))
    )
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert 0 < (exact - original).norm() / original.norm() < FORMS[form][2]


def test_the_plan_knows_their_size(model, form, tmp_path):
    empty = FAMILY.empty_transformer(model)
    KeepPrecision().quantize_(empty, FAMILY.full_precision)
    planned, loaded = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in base.named_parameters()}
        for base in (empty, base_of(model, tmp_path))
    )
    assert planned == loaded
    layers = [module for module in empty.modules() if isinstance(module, QuantizedLinear)]
    parts = [tensor for layer in layers for name, tensor in layer.stored.items() if name != "table"]
    bits = 8 * sum(part.numel() * part.itemsize for part in parts)
    bits /= sum(layer.in_features * layer.out_features for layer in layers)
    assert FORMS[form][1] - 0.5 <= bits <= FORMS[form][1]


def test_another_level_quantizes_what_is_decoded(model, form, tmp_path):
    base, plain = (
        base_of(replace(model, quantization=QuantizationConfig("fp8-native")), tmp_path),
        base_of(model, tmp_path),
    )
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 34
    for name, layer in layers:
        exact = plain.get_submodule(name).dequantize()
        assert (layer.dequantize() - exact).norm() < 0.05 * exact.norm(), name


def test_a_diffusers_folder_keeps_them_too(model, form, tiny_chroma, tmp_path):
    """As diffusers saves a model that bitsandbytes quantized; a description in the metadata, as older files of ComfyUI."""
    (file,) = (tiny_chroma / "transformer").glob("*.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    tensors = load_file(file)
    tensors |= FORMS[form][0](name, tensors[f"{name}.weight"])
    described = tensors.pop(f"{name}.comfy_quant", None)
    layers = {name: json.loads(described.numpy().tobytes())} if described is not None else {}
    shutil.copytree(tiny_chroma, tmp_path / "folder")
    target = tmp_path / "folder" / "transformer" / file.name
    save_file(tensors, target, {"_quantization_metadata": json.dumps({"layers": layers})})
    whole = replace(model, transformer_file="", repo=str(tmp_path / "folder"))
    for changed in (
        whole,
        replace(model, transformer_file=str(target.parent)),
        replace(model, transformer_file=str(target)),
    ):
        assert FAMILY.problems(changed) == []
        layers = [layer for layer in base_of(changed, tmp_path).modules() if isinstance(layer, QuantizedLinear)]
        assert [getattr(layer.format, "type", "") for layer in layers] == [form]


@pytest.mark.parametrize("write", [mxfp8, nvfp4])
def test_the_text_encoder(tiny_model, tiny_chroma, tmp_path, write):
    """It stays quantized as well, and its tokenizer is the folder's."""
    tensors = load_file(tiny_chroma / "text_encoder" / "model.safetensors")
    linear = [
        key
        for key in tensors
        if key.endswith(("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight"))
    ]
    for key in linear:
        tensors |= write(key.removesuffix(".weight"), tensors[key])
    shutil.copytree(tiny_chroma, tmp_path / "folder")
    file = tmp_path / "folder" / "text_encoder" / "t5.safetensors"
    save_file(tensors, file)
    model = replace(tiny_model, text_encoder_file=str(file))
    assert FAMILY.problems(model) == []
    convert = text_converter(model.quantization, CPU, model.text_encoder_file)
    ours, theirs = FAMILY.load_text_encoder(model, CPU, convert), FAMILY.load_text_encoder(tiny_model, CPU)
    assert sum(isinstance(part, QuantizedLinear) for part in ours.model.modules()) == len(linear) == 14
    empty = FAMILY.empty_text_encoder(model, convert)
    assert sum(isinstance(part, QuantizedLinear) for part in empty.modules()) == 14
    (one,), (two,) = ours.encode(["a red cat"]), theirs.encode(["a red cat"])
    assert one.shape == two.shape and 0 < (one - two).norm() / two.norm() < 0.2


def test_other_tools_read_them(model, form):
    weights = open_config(model)
    name = "single_transformer_blocks.1.attn.to_k"
    plain = FAMILY.load_transformer(model).get_submodule(name)
    torch.testing.assert_close(weights.read(name), plain.weight.data, rtol=1e-5, atol=1e-7)


def test_a_truncated_or_changed_file_is_named(model, form, tmp_path):
    tensors = load_file(model.transformer_file)
    key = next(key for key in tensors if key.endswith(("weight_scale", "absmax")))
    changed = tmp_path / "changed.safetensors"
    save_file(tensors | {key: tensors[key].flatten()[:-1].clone()}, changed)
    (problem,) = FAMILY.problems(replace(model, transformer_file=str(changed)))
    assert "is quantized as " in problem.message and f"{tensors[key].numel() - 1} values" in problem.message
    with pytest.raises(UserError, match="is quantized as "):
        FAMILY.load_transformer(replace(model, transformer_file=str(changed)))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(model.transformer_file).read_bytes()[:-100])
    (problem,) = FAMILY.problems(replace(model, transformer_file=str(cut)))
    assert "is not a complete safetensors file" in problem.message


@pytest.mark.slow
def test_a_run_on_it_learns(workshop, model, form):
    result = run(workshop.request(model=model, steps=3, checkpoint_every=0, **EVALUATED), workshop.host())
    losses = result.report["eval_loss"]
    assert losses["after"] < losses["before"]
