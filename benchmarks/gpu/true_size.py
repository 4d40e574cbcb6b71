"""Files in ComfyUI's layouts with random weights: as large as the released ones, or of any other size.

Header first, then numbers cut from one pool of random ones: as fast as the disk. Weights have a deviation of 0.02,
norms are 1 and biases 0, so that activations stay finite through all blocks. Hollow files have a header and holes: for
what reads only headers.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.files.keys import original_parameter
from chroma_trainer.trainer_core.config.flux import FluxOptions
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.codec import build_vae, original_vae_parameter
from chroma_trainer.trainer_core.models.flux.transformer import FluxTransformer
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.loading.weights import STORED
from chroma_trainer.trainer_core.models.text.t5 import build_t5
from chroma_trainer.trainer_core.storage.safetensors_header import header_bytes, header_of
from models import TOKENIZER
from torch import nn

STD = 0.02
POOL = 1 << 25  # numbers
Shapes = dict[str, tuple[int, ...]]

# What differs from the released models. medium: a few of their blocks, at their width.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "true": {},
    "medium": {"num_layers": 2, "num_single_layers": 2},
    "tiny": {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
             "joint_attention_dim": 64, "axes_dims_rope": (4, 14, 14)},
}  # fmt: skip
OF_FAMILY: dict[str, dict[str, dict[str, Any]]] = {
    "chroma": {
        "medium": {"approximator_hidden_dim": 512},
        "tiny": {"approximator_hidden_dim": 64, "approximator_layers": 2},
    },
    "flux": {"tiny": {"pooled_projection_dim": 32}},
}
CLASSES: dict[str, Any] = {"chroma": ChromaTransformer, "flux": FluxTransformer}
ENCODERS: dict[str, dict[str, Any]] = {
    "true": {},
    "tiny": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 1500},
}
CODECS: dict[str, dict[str, Any]] = {"true": {}, "tiny": {"block_out_channels": [32] * 4, "layers_per_block": 1}}


def transformer_shapes(family: str, size: str) -> Shapes:
    """Projections that ComfyUI's files keep in one are joined along their rows."""
    with torch.device("meta"):
        transformer: nn.Module = CLASSES[family](**{**TRANSFORMERS[size], **OF_FAMILY[family].get(size, {})})
    shapes: Shapes = {}
    for name, parameter in transformer.named_parameters():
        key, _ = original_parameter(name)
        rows = shapes.get(key, (0,))[0] + parameter.shape[0]
        shapes[key] = (rows, *parameter.shape[1:])
    return shapes


def encoder_shapes(size: str) -> Shapes:
    """With the table of embeddings under both of its names, as in ComfyUI's file."""
    encoder = build_t5({**load_shipped_config("t5_xxl"), **ENCODERS[size]})
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    return {**shapes, "encoder.embed_tokens.weight": shapes["shared.weight"]}


def codec_shapes(size: str) -> Shapes:
    """Its attention's projections are convolutions of one pixel there."""
    config = {**load_shipped_config("flux_vae"), **CODECS[size]}
    config["down_block_types"], config["up_block_types"] = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    shapes: Shapes = {}
    for name, parameter in build_vae(config).named_parameters():
        ones = (1, 1) if ".attentions." in name and parameter.ndim == 2 else ()
        shapes[original_vae_parameter(name, len(config["block_out_channels"]))] = (*parameter.shape, *ones)
    return shapes


def write_model(folder: Path, size: str) -> ModelConfig:
    """Chroma in bf16, T5 in fp16 and the VAE in fp32, each where ComfyUI has such; what lies there whole is kept."""
    model = ModelConfig(
        family="chroma", flavour="hd", repo="",
        transformer_file=str(folder / "diffusion_models" / f"chroma-{size}.safetensors"),
        text_encoder_file=str(folder / "text_encoders" / f"t5-{size}.safetensors"),
        vae_file=str(folder / "vae" / f"vae-{size}.safetensors"),
    )  # fmt: skip
    write_file(Path(model.transformer_file), transformer_shapes("chroma", size), "BF16")
    write_file(Path(model.text_encoder_file), encoder_shapes(size), "F16")
    write_file(Path(model.vae_file), codec_shapes(size), "F32")
    shutil.copytree(TOKENIZER, folder / "text_encoders" / "tokenizer", dirs_exist_ok=True)
    return model


def hollow_model(folder: Path, family: str, size: str, level: str, products: str, dtype: str) -> ModelConfig:
    """A model whose transformer can be built on the meta device, and nothing more."""
    path = folder / "hollow" / f"{family}-{size}.safetensors"
    write_file(path, transformer_shapes(family, size), "BF16", is_hollow=True)
    return ModelConfig(
        family=family, flavour="dev" if family == "flux" else "hd", repo="", transformer_file=str(path), dtype=dtype,
        quantization=QuantizationConfig(level, products=products), flux=FluxOptions() if family == "flux" else None,
    )  # fmt: skip


def num_bytes(size: str) -> int:
    """Of the three files."""
    parts = ((transformer_shapes("chroma", size), 2), (encoder_shapes(size), 2), (codec_shapes(size), 4))
    return sum(width * math.prod(shape) for shapes, width in parts for shape in shapes.values())


def write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, is_hollow: bool = False) -> None:
    """A safetensors file, unless it lies there whole. dtype: safetensors' name."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + STORED[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    start = header_bytes(header)
    if _is_there(path, header, len(start) + end):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    with staging.open("wb") as stream:
        stream.write(start)
        if is_hollow:
            stream.truncate(len(start) + end)
        else:
            _write_numbers(stream, shapes, STORED[dtype])
    os.replace(staging, path)


def _is_there(path: Path, header: dict[str, Any], size: int) -> bool:
    try:
        return path.stat().st_size == size and header_of(path)[0] == header
    except (OSError, ValueError):
        return False


def _write_numbers(stream: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    pool = _bytes_of(torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(STD).to(dtype))
    place = 0
    for name, shape in shapes.items():
        left = dtype.itemsize * math.prod(shape)
        if len(shape) == 1:
            stream.write(_bytes_of(torch.full(shape, float(not name.endswith("bias")), dtype=dtype)))
            continue
        while left:
            count = min(left, len(pool) - place)
            stream.write(pool[place : place + count])
            place, left = (place + count) % len(pool), left - count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
