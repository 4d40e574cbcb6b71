"""LoRA files of several tools, with known factors, for a model of width 64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.keys import layers_of
from safetensors.torch import save_file

WIDTH, RANK = 64, 4
# Original name -> outputs and inputs in multiples of the width.
LAYERS = {
    "double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.0.img_attn.proj": (1, 1), "double_blocks.1.img_mlp.0": (4, 1),
    "double_blocks.1.img_mlp.2": (1, 4), "single_blocks.0.linear1": (7, 1), "single_blocks.1.linear2": (1, 5),
}  # fmt: skip


def factors(
    name: str, rank: int = RANK, layers: Mapping[str, tuple[int, int]] = LAYERS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of an original layer: the same each time."""
    rows, columns = layers[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    down = torch.randn(rank, columns * WIDTH, generator=generator)
    return down, torch.randn(rows * WIDTH, rank, generator=generator) * 0.1


def kohya_tensors(alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in LAYERS:
        down, up = factors(name)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def native_tensors(prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
    tensors = {}
    for name in LAYERS:
        down, up = factors(name)
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return tensors


def diffusers_tensors(prefix: str = "transformer.", middle: str = "") -> dict[str, torch.Tensor]:
    """The same update with diffusers' names: each part of a fused layer has A itself and its rows of B."""
    tensors = {}
    for name in LAYERS:
        down, up = factors(name)
        for layer, place in layers_of(name):
            key = f"{prefix}{layer}.lora_"
            tensors |= {f"{key}A{middle}.weight": down.clone(), f"{key}B{middle}.weight": up[place.rows(WIDTH)].clone()}
    return tensors


def delta(path: Path) -> dict[str, torch.Tensor]:
    """The change of every diffusers layer that a file makes where it is loaded, as ComfyUI reads it: alpha of the tensors alone."""
    from chroma_trainer.trainer_core.lora_tools.reader import open_lora

    with open_lora(path) as lora:
        assert not lora.header_alpha
        return {name: lora.layer(name).delta(torch.zeros(lora.layer(name).shape)) for name in lora.places}


def expected(scale: float = 1.0) -> dict[str, torch.Tensor]:
    deltas = {}
    for name in LAYERS:
        down, up = (factor.double() for factor in factors(name))
        for layer, place in layers_of(name):
            deltas[layer] = scale * up[place.rows(WIDTH)] @ down
    return deltas


def assert_equal(
    result: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert result.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (result[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-12, name


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    def write(
        tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, name: str = "a.safetensors"
    ) -> Path:
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / name, dict(metadata or {})
        )
        return tmp_path / name

    return write
