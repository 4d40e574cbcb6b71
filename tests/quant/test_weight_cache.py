"""The quantised base on disk: the same bits, no full weights on the second start, damage named, size bounded."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import Notice, Paths, PhaseProgress, SinkHost
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant import weight_cache
from chroma_trainer.trainer_core.quant.loading import load_base
from chroma_trainer.trainer_core.registry import load, names

CPU = torch.device("cpu")
LEVELS = [level for level in names("quantization") if level != "none"]


class Once(ChromaFamily):
    """Counts how often full weights are read."""

    def __init__(self) -> None:
        self.num_loads = 0

    def load_transformer(self, model, convert=None):
        self.num_loads += 1
        return super().load_transformer(model, convert)


@pytest.fixture
def host(tmp_path: Path):
    events: list = []
    host = SinkHost(
        paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache"), sinks=(events.append,), device="cpu"
    )
    object.__setattr__(host, "events", events)
    return host


def model_at(tiny_model, level: str = "int8-quanto", **values):
    return replace(tiny_model, quantization=QuantizationConfig(level, quantize_via="cpu", **values))


def velocity(transformer):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 8, 6, generator=generator)
    text = [torch.randn(length, 32, generator=generator) for length in (4, 7)]
    return ChromaFamily().predict(transformer, x, torch.tensor([0.3, 0.8]), text)


def folders(host) -> list[Path]:
    return sorted((host.paths.cache / "quantized").iterdir())


def told(host) -> list[str]:
    return [event.text for event in host.events if isinstance(event, Notice)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_second_start_gives_equal_bits_and_reads_no_full_weights(tiny_model, host, level, dtype):
    if load("quantization", level)().missing():
        pytest.skip(load("quantization", level)().missing())
    family, model = Once(), replace(model_at(tiny_model, level), dtype=dtype)
    fresh = load_base(family, model, host, CPU)
    again = load_base(family, model, host, CPU)
    assert family.num_loads == 1 and told(host) == []
    state = again.state_dict()
    assert list(state) == list(fresh.state_dict())
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), state[name].contiguous().view(torch.uint8)), name
    assert torch.equal(velocity(fresh), velocity(again))
    assert not again.training and not [p for p in again.parameters() if p.requires_grad]
    in_place = load("quantization", level)().quantize_(family.load_transformer(model), family.full_precision)
    assert torch.equal(velocity(in_place), velocity(again))


def test_only_safetensors_and_json_lie_there(tiny_model, host):
    load_base(ChromaFamily(), model_at(tiny_model), host, CPU)
    (folder,) = folders(host)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert host.events and max(e.done for e in host.events if isinstance(e, PhaseProgress)) == 34


@pytest.mark.parametrize(
    "change",
    [{"level": "int4-quanto"}, {"dtype": "bf16"}, {"weights": True}, {"version": "0"}],
    ids=["level", "dtype", "weights", "version"],
)
def test_what_decides_the_bits_is_in_the_key(tiny_model, host, tmp_path, monkeypatch, change):
    family, model = Once(), model_at(tiny_model, cached_bases=9)
    load_base(family, model, host, CPU)
    if "level" in change:
        model = model_at(tiny_model, change["level"], cached_bases=9)
    if "dtype" in change:
        model = replace(model, dtype="bf16")
    if "weights" in change:
        monkeypatch.setattr(Once, "identity", lambda self, model, part: "other")
    if "version" in change:
        monkeypatch.setattr(weight_cache, "FORMAT", "0")
    load_base(family, model, host, CPU)
    assert family.num_loads == 2 and len(folders(host)) == 2


@pytest.mark.parametrize("fault", ["flipped", "short", "gone", "index", "index-json", "index-names"])
def test_damage_is_named_and_made_again(tiny_model, host, fault):
    family, model = Once(), model_at(tiny_model)
    expected = velocity(load_base(family, model, host, CPU))
    (folder,) = folders(host)
    (shard,) = folder.glob("*.safetensors")
    index, raw = folder / "index.json", bytearray(shard.read_bytes())
    if fault == "flipped":
        raw[-100] ^= 1
        shard.write_bytes(raw)
    elif fault == "short":
        shard.write_bytes(raw[:-8])
    elif fault == "gone":
        shard.unlink()
    elif fault == "index":
        index.write_bytes(index.read_bytes()[:-20])
    elif fault == "index-json":
        index.write_text("[]", encoding="utf-8")
    else:
        index.write_text(index.read_text(encoding="utf-8").replace("to_q", "to_x", 1), encoding="utf-8")
    assert torch.equal(velocity(load_base(family, model, host, CPU)), expected)
    assert family.num_loads == 2
    (text,) = told(host)
    assert str(folder) in text and "damaged" in text
    load_base(family, model, host, CPU)
    assert family.num_loads == 2 and len(told(host)) == 1


def test_those_used_last_stay(tiny_model, host):
    family = Once()
    for i, level in enumerate(("int8-quanto", "int4-quanto")):
        load_base(family, model_at(tiny_model, level), host, CPU)
        for folder in folders(host):
            if not (folder / "seen").exists():
                (folder / "seen").write_text(level, encoding="utf-8")
                os.utime(folder / "index.json", (i + 1, i + 1))
    load_base(family, model_at(tiny_model, "int8-quanto"), host, CPU)  # used: now the newest
    load_base(family, model_at(tiny_model, "int2-quanto"), host, CPU)
    kept = [(folder / "seen").read_text(encoding="utf-8") for folder in folders(host) if (folder / "seen").exists()]
    assert kept == ["int8-quanto"] and len(folders(host)) == 2


def test_none_is_kept_where_none_is_wanted(tiny_model, host):
    family = Once()
    load_base(family, model_at(tiny_model), host, CPU)
    load_base(family, model_at(tiny_model, cached_bases=0), host, CPU)
    assert family.num_loads == 2 and folders(host) == []


def test_a_plain_base_is_not_cached(tiny_model, host):
    load_base(ChromaFamily(), model_at(tiny_model, "none"), host, CPU)
    assert not (host.paths.cache / "quantized").exists()


def test_a_full_disk_costs_the_cache_not_the_run(tiny_model, host, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("chroma_trainer.trainer_core.storage.tensor_store.write_atomic", full)
    base = load_base(ChromaFamily(), model_at(tiny_model), host, CPU)
    assert velocity(base).isfinite().all()
    (text,) = told(host)
    assert "No space left" in text and "continues" in text
    assert not (host.paths.cache / "quantized").exists() or folders(host) == []


def test_a_cancel_leaves_nothing_that_looks_whole(tiny_model, host):
    family, model, calls = Once(), model_at(tiny_model), []
    object.__setattr__(host, "is_cancelled", lambda: len(calls) > 10 or calls.append(1))
    with pytest.raises(Cancelled):
        load_base(family, model, host, CPU)
    object.__setattr__(host, "is_cancelled", lambda: False)
    load_base(family, model, host, CPU)
    load_base(family, model, host, CPU)
    assert family.num_loads == 2 and told(host) == []


def test_shards_of_many_sizes_make_the_same_base(tiny_model, host, monkeypatch):
    monkeypatch.setattr(weight_cache, "SHARD_BYTES", 10_000)
    family, model = Once(), model_at(tiny_model)
    fresh = load_base(family, model, host, CPU)
    (folder,) = folders(host)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert torch.equal(velocity(load_base(family, model, host, CPU)), velocity(fresh)) and family.num_loads == 1
