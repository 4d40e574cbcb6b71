"""Layers that are converted while they are read: the same numbers, and never two full layers at once."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading.weights import STORED, Kind, Weights
from safetensors.torch import save_file
from torch import nn

FAMILY = ChromaFamily()
ANY = Kind("thing", ("anchor.weight",))


def test_each_linear_once_with_its_weights_in_the_models_order(tiny_model):
    exact = FAMILY.load_transformer(tiny_model)
    seen: dict[str, torch.Tensor] = {}

    def look(name: str, layer: nn.Linear) -> nn.Module:
        assert name not in seen and not layer.weight.is_meta
        seen[name] = layer.weight.detach().clone()
        return layer

    converted = FAMILY.load_transformer(tiny_model, look)
    linears = {name: module for name, module in exact.named_modules() if isinstance(module, nn.Linear)}
    assert list(seen) == list(linears)
    for name, layer in linears.items():
        assert torch.equal(seen[name], layer.weight), name
    assert all(torch.equal(a, converted.state_dict()[name]) for name, a in exact.state_dict().items())
    assert not [name for name, p in converted.named_parameters() if p.requires_grad] and not converted.training


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_layer_is_freed_before_the_next_is_read(tiny_model, part):
    alive: list[weakref.ref] = []
    counts = []

    def convert(name: str, layer: nn.Linear) -> nn.Module:
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(layer.weight))
        return nn.Identity()

    if part == "transformer":
        FAMILY.load_transformer(tiny_model, convert)
    else:
        FAMILY.load_text_encoder(tiny_model, torch.device("cpu"), convert)
    assert len(counts) > 10 and max(counts) == 0


def test_an_empty_transformer_has_everything_but_weights(tiny_model):
    empty, full = FAMILY.empty_transformer(tiny_model), FAMILY.load_transformer(tiny_model)
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in full.state_dict().items()
    }
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_unmapped_rows_are_those_of_the_map(tmp_path: Path, dtype):
    whole = torch.arange(60).reshape(12, 5).to(STORED[dtype])
    save_file({"anchor.weight": torch.zeros(1), "x": whole, "scalar": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    mapped, read = (Weights([tmp_path / "a.safetensors"], ANY, mapped=mapped) for mapped in (True, False))
    for rows in (slice(None), slice(3, 7), slice(8, None), slice(-2, None)):
        ours, theirs = read.read("x", rows), mapped.read("x", rows)
        assert ours.dtype == theirs.dtype == STORED[dtype] and ours.shape == theirs.shape
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    assert read.read("scalar").item() == 3


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"anchor.weight": torch.zeros(1), "x": torch.zeros(100)}, file)
    weights = Weights([file], ANY, mapped=False)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="ends within"):
        weights.read("x")
