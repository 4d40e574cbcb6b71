"""A model in GGUF files: found, checked, planned, loaded with its blocks as they are, and trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.adapters.files.keys import original_parameter
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant.loading import load_base, load_quantized, text_converter
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.quant.quantizer import GgufBlocks
from chroma_trainer.trainer_core.storage.gguf import blocks
from PIL import Image
from safetensors.torch import load_file

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[3]
writer = load_script("tests/storage/gguf/writer.py")
FAMILY, CPU = ChromaFamily(), torch.device("cpu")
WIDTH = 64


def original_weights(folder: Path) -> dict[str, numpy.ndarray]:
    """The transformer of a diffusers folder with the original, fused names."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    parts: dict[str, list] = {}
    for name, tensor in load_file(file).items():
        key, place = original_parameter(name)
        parts.setdefault(key, []).append((place.part or 0, tensor))
    return {key: torch.cat([t for _, t in sorted(rows, key=lambda row: row[0])]).numpy() for key, rows in parts.items()}


def kind_of(name: str, array: numpy.ndarray) -> str:
    return "Q8_0" if array.ndim == 2 and "blocks" in name and array.shape[-1] % 32 == 0 else "F32"


def write_model(path: Path, weights, architecture: str = "flux") -> Path:
    tensors = {}
    for name, array in weights.items():
        kind = kind_of(name, array)
        tensors[name] = (kind, array.shape, writer.quantize(kind, array))
    return writer.write_gguf(path, tensors, architecture)


T5 = (
    ("encoder.final_layer_norm", "enc.output_norm"), ("shared.", "token_embd."), ("encoder.block.", "enc.blk."),
    (".layer.0.SelfAttention.relative_attention_bias", ".attn_rel_b"), (".layer.0.SelfAttention.", ".attn_"),
    (".layer.0.layer_norm", ".attn_norm"), (".layer.1.DenseReluDense.wi_0", ".ffn_gate"),
    (".layer.1.DenseReluDense.wi_1", ".ffn_up"), (".layer.1.DenseReluDense.wo", ".ffn_down"), (".layer.1.layer_norm", ".ffn_norm"),
)  # fmt: skip


def write_t5(path: Path, folder: Path) -> Path:
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(file).items():
        if name == "encoder.embed_tokens.weight":
            continue
        for ours, theirs in T5:
            name = name.replace(ours, theirs)
        kind = "Q8_0" if tensor.ndim == 2 and tensor.shape[-1] % 32 == 0 and "rel_b" not in name else "F32"
        tensors[name] = (kind, tuple(tensor.shape), writer.quantize(kind, tensor.numpy()))
    return writer.write_gguf(path, tensors, "t5encoder")


@pytest.fixture(scope="module")
def files(tiny_chroma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write_model(folder / "tiny.gguf", original_weights(tiny_chroma)), write_t5(folder / "t5.gguf", tiny_chroma)


@pytest.fixture
def model(tiny_model, files):
    return replace(tiny_model, transformer_file=str(files[0]), text_encoder_file=str(files[1]))


def test_blocks_stay_as_they_are_and_products_are_exact(model, tiny_model, tmp_path):
    host = SinkHost(paths=Paths(output=tmp_path, cache=tmp_path / "cache"))
    packed: Any
    plain: Any
    packed, plain = (
        load_base(FAMILY, model, host, CPU),
        FAMILY.load_transformer(replace(tiny_model, transformer_file=model.transformer_file)),
    )
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 34 and all(isinstance(layer.format, GgufBlocks) for layer in layers.values())
    assert not any("distilled" in name or "embedder" in name or name == "proj_out" for name in layers)
    for name, layer in layers.items():
        assert torch.equal(
            layer.dequantize(), plain.get_submodule(name).weight
        )  # fused rows are split with their blocks
    bits = (
        8
        * sum(layer.stored["codes"].numel() for layer in layers.values())
        / sum(layer.in_features * layer.out_features for layer in layers.values())
    )
    assert bits == 8.5
    latents, text = torch.randn(1, 16, 8, 8), [torch.randn(5, 32)]
    sigma = torch.tensor([0.5])
    exact = FAMILY.predict(plain, latents, sigma, text)  # the bias is added in another order
    torch.testing.assert_close(FAMILY.predict(packed, latents, sigma, text), exact, rtol=0, atol=1e-5)
    original = FAMILY.predict(FAMILY.load_transformer(tiny_model), latents, sigma, text)
    error = (FAMILY.predict(packed, latents, sigma, text) - original).norm() / original.norm()
    assert 0 < error < 0.02  # Q8_0


@pytest.mark.parametrize(("level", "decoded"), [("none", 0), ("fp8-native", 34)])
def test_blocks_are_decoded_once_and_only_where_a_weight_is_needed(model, tmp_path, monkeypatch, level, decoded):
    calls: list[str] = []
    q8_0 = blocks.DECODERS["Q8_0"]
    monkeypatch.setitem(blocks.DECODERS, "Q8_0", lambda raw: calls.append("Q8_0") or q8_0(raw))
    host = SinkHost(paths=Paths(output=tmp_path, cache=tmp_path / "cache"))
    quantized = replace(model, quantization=QuantizationConfig(level=level))
    plain: Any = FAMILY.load_transformer(model)
    names = {name: module.weight for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    calls.clear()
    base = load_quantized(FAMILY, quantized, host, CPU)
    assert len(calls) == decoded
    assert not any(parameter.is_meta for parameter in base.parameters())
    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert layers.keys() == names.keys() and not any(hasattr(layer, "packed") for layer in layers.values())
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.weight, names[name])


def test_a_layer_in_full_precision_is_decoded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ChromaFamily, "full_precision", (*FAMILY.full_precision, "transformer_blocks.0.*"))
    host = SinkHost(paths=Paths(output=tmp_path, cache=tmp_path / "cache"))
    plain: Any = FAMILY.load_transformer(model)
    for level in ("none", "fp8-native"):
        base: Any = load_quantized(FAMILY, replace(model, quantization=QuantizationConfig(level=level)), host, CPU)
        layer = base.transformer_blocks[0].attn.to_q
        assert type(layer) is torch.nn.Linear and not hasattr(layer, "packed")
        assert torch.equal(layer.weight, plain.transformer_blocks[0].attn.to_q.weight)


def test_the_text_encoder(model, tiny_model):
    ours = FAMILY.load_text_encoder(model, CPU, text_converter(model.quantization, CPU, model.text_encoder_file))
    theirs = FAMILY.load_text_encoder(tiny_model, CPU)
    assert sum(isinstance(part, QuantizedLinear) for part in ours.model.modules()) == 14
    (one,), (two,) = ours.encode(["a red cat"]), theirs.encode(["a red cat"])
    assert one.shape == two.shape and 0 < (one - two).norm() / two.norm() < 0.03


def test_the_plan_knows_their_size(model, tiny_model):
    def size(transformer):
        from chroma_trainer.trainer_core.quant.quantizer import KeepPrecision

        KeepPrecision().quantize_(transformer, FAMILY.full_precision)
        return sum(p.numel() * p.element_size() for p in transformer.parameters())

    whole, packed = size(FAMILY.empty_transformer(tiny_model)), size(FAMILY.empty_transformer(model))
    linear = sum(m.stored["codes"].numel() for m in _packed(FAMILY.empty_transformer(model)))
    assert packed == whole - linear * 32 // 34 * 4 + linear and linear > 0
    encoder = FAMILY.empty_text_encoder(model, text_converter(model.quantization, CPU, model.text_encoder_file))
    assert sum(isinstance(part, QuantizedLinear) for part in encoder.modules()) == 14


def _packed(transformer):
    from chroma_trainer.trainer_core.quant.quantizer import KeepPrecision

    return [
        m
        for m in KeepPrecision().quantize_(transformer, FAMILY.full_precision).modules()
        if isinstance(m, QuantizedLinear)
    ]


@pytest.fixture(scope="module")
def home(tiny_chroma, files, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    for kind, file in zip(("diffusion_models", "text_encoders"), files, strict=True):
        (home / "models" / kind).mkdir()
        shutil.copy(file, home / "models" / kind / file.name)
    (home / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (200 * i, 30, 20)).save(home / "images" / f"{i}.png")
        (home / "images" / f"{i}.txt").write_text("a cat", encoding="utf-8")
    return home


def workflow(**files):
    values = {
        "name": "tiny", "rank": 2, "steps": 3, "learning_rate": 0.01, "warmup_steps": 0, "gradient_checkpointing": False,
        "checkpoint_every": 0, "eval_images": 0, "targets": "all+ffs",
    }  # fmt: skip
    names = {"diffusion_model": "tiny.gguf", "text_encoder": "t5.gguf", **files}
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32", **names}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "images", "resolution": 32}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], **values}},
    }


@pytest.mark.slow
def test_a_run_trains_on_it(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    Path("w.json").write_text(json.dumps(workflow()), encoding="utf-8")
    folders = ("--models", "models", "--output", "out", "--device", "cpu")
    assert main(["check", "w.json", "--models", "models"]) == 0
    assert main(["run", "w.json", *folders, "--report", "r.json"]) == 0
    lora = Path(json.loads(Path("r.json").read_text("utf-8"))["lora"])
    assert len(load_file(lora)) == 68
    first = lora.read_bytes()
    shutil.rmtree("out")
    assert main(["run", "w.json", *folders]) == 0 and lora.read_bytes() == first
    capsys.readouterr()
    assert main(["plan", "w.json", *folders, "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    Path("p.json").write_text(
        json.dumps(workflow(diffusion_model="from flavour", text_encoder="from flavour")), encoding="utf-8"
    )
    assert main(["plan", "p.json", *folders, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert packed != plain


BAD = {
    "truncated": (lambda raw: raw[:-100], "ends within"),
    "not gguf": (lambda raw: b"PK\x03\x04" + raw[4:], "is not a GGUF file"),
    "of version 1": (lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:], "is GGUF of version 1"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    ("field", "folder", "name"),
    [("diffusion_model", "diffusion_models", "tiny"), ("text_encoder", "text_encoders", "t5")],
)
def test_damaged_files_are_refused_by_check(home, monkeypatch, capsys, kind, field, folder, name):
    change, message = BAD[kind]
    monkeypatch.chdir(home)
    path = Path("models", folder, "bad.gguf")
    path.write_bytes(change(Path("models", folder, f"{name}.gguf").read_bytes()))
    Path("w.json").write_text(json.dumps(workflow(**{field: "bad.gguf"})), encoding="utf-8")
    assert main(["check", "w.json", "--models", "models"]) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.gguf" in error and "node " in error
    path.unlink()


def test_wrong_kinds_are_refused_by_check(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    models = Path("models", "diffusion_models")
    shutil.copy(Path("models", "text_encoders", "t5.gguf"), models / "t5.gguf")
    writer.write_gguf(models / "iq.gguf", {
        "distilled_guidance_layer.in_proj.weight": ("F32", (2, 2), bytes(16)), "double_blocks.0.img_attn.qkv.weight": ("IQ4_NL", (2, 32), bytes(36)),
    })  # fmt: skip
    for name, message in (
        ("t5.gguf", "is a T5 text encoder, not a Chroma transformer"),
        ("iq.gguf", "is quantized as IQ4_NL of GGUF"),
    ):
        Path("w.json").write_text(json.dumps(workflow(diffusion_model=name)), encoding="utf-8")
        assert main(["check", "w.json", "--models", "models"]) == 2
        assert message in capsys.readouterr().err
