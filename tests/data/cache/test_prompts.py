"""Prompts are encoded once, and what was encoded is kept."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.data.cache import prompts as cache_module
from chroma_trainer.trainer_core.data.cache.prompts import Prompts, cache_prompts
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import Paths, PhaseProgress, PhaseStarted, SinkHost
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.storage.tensor_store import Store

PROMPTS = ["", "a cat", "ein Kätzchen", "赤い猫", "a cat\twith a tab", "a" * 300]


class Encoder:
    """As many rows as the prompt has characters and one, filled with its length."""

    def __init__(self, fail_after: int = 10**9):
        self.batches: list[list[str]] = []
        self.fail_after = fail_after

    def encode(self, prompts):
        if len(self.batches) >= self.fail_after:
            raise RuntimeError("out of memory")
        self.batches.append(list(prompts))
        return [torch.full((len(prompt) + 1, 4), float(len(prompt))) for prompt in prompts]


def not_called():
    raise AssertionError("the encoder must not be loaded")


@pytest.fixture
def events() -> list:
    return []


@pytest.fixture
def host(tmp_path, events) -> SinkHost:
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path), sinks=(events.append,))


def test_each_prompt_has_its_own_length(host, tmp_path):
    cache = cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    assert [cache.get(prompt).shape for prompt in PROMPTS] == [(len(prompt) + 1, 4) for prompt in PROMPTS]
    assert all((cache.get(prompt) == len(prompt)).all() for prompt in PROMPTS)


def test_the_second_time_nothing_is_loaded(host, events, tmp_path):
    cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    events.clear()
    cache = cache_prompts(PROMPTS[::-1], "id", not_called, Store(tmp_path / "text"), host)
    assert cache.get("a cat").shape == (6, 4) and events == []


def test_only_new_prompts_are_encoded(host, tmp_path):
    cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    encoder = Encoder()
    cache_prompts([*PROMPTS, "new", "new"], "id", lambda: encoder, Store(tmp_path / "text"), host)
    assert encoder.batches == [["new"]]


def test_another_encoder_has_keys_of_its_own(host, tmp_path):
    cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    with pytest.raises(AssertionError):
        cache_prompts(PROMPTS, "other", not_called, Store(tmp_path / "text"), host)


def test_equal_lengths_are_encoded_together(host, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH", 2)
    encoder = Encoder()
    cache_prompts(["aaaa", "b", "cccc", "d"], "id", lambda: encoder, Store(tmp_path / "text"), host)
    assert [sorted(batch) for batch in encoder.batches] == [["b", "d"], ["aaaa", "cccc"]]


def test_after_a_fault_what_was_done_is_kept(host, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH", 2)
    with pytest.raises(RuntimeError):
        cache_prompts(PROMPTS, "id", lambda: Encoder(fail_after=2), Store(tmp_path / "text"), host)
    encoder = Encoder()
    cache_prompts(PROMPTS, "id", lambda: encoder, Store(tmp_path / "text"), host)
    assert sum(map(len, encoder.batches)) == 2


def test_a_cancel_keeps_what_was_done(host, events, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH", 2)

    def done() -> bool:
        return any(isinstance(event, PhaseProgress) for event in events)

    with pytest.raises(Cancelled):
        cache_prompts(
            PROMPTS, "id", Encoder, Store(tmp_path / "text"),
            SinkHost(paths=host.paths, sinks=(events.append,), is_cancelled=done),
        )  # fmt: skip
    encoder = Encoder()
    cache_prompts(PROMPTS, "id", lambda: encoder, Store(tmp_path / "text"), host)
    assert sum(map(len, encoder.batches)) == 4


def test_progress_is_told(host, events, tmp_path):
    cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    assert events == [PhaseStarted("text", 6, "prompts"), PhaseProgress("text", 6, 6)]


def test_a_flipped_byte_is_noticed_and_encoded_again(host, tmp_path):
    cache_prompts(PROMPTS, "id", Encoder, Store(tmp_path / "text"), host)
    (path,) = (tmp_path / "text").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    told, encoder = [], Encoder()
    cache = cache_prompts(PROMPTS, "id", lambda: encoder, Store(tmp_path / "text", told.append), host)
    assert len(told) == 1 and sum(map(len, encoder.batches)) == 6
    assert (cache.get("a cat") == 5).all()


def test_the_tiny_models_embeddings_come_back_bit_for_bit(tiny_model, host, tmp_path):
    family = load("family", "chroma")()
    identity = family.identity(tiny_model, "text_encoder")
    prompts = ["", "a cat", "the red dog"]
    encoder = family.load_text_encoder(tiny_model, torch.device("cpu"))
    cache_prompts(prompts, identity, lambda: encoder, Store(tmp_path / "text"), host)
    cache = cache_prompts(prompts, identity, not_called, Store(tmp_path / "text"), host)
    with torch.no_grad():
        assert all(torch.equal(cache.get(prompt), encoder.encode([prompt])[0]) for prompt in prompts)


def test_prompts_are_read_through_and_equal_ones_encoded_once(host, tmp_path):
    prompts = Prompts([("a", "bb"), ("ccc",), ("a", "dddd")], ["", "bb"])
    assert list(prompts) == [prompts[i] for i in range(len(prompts))] == ["a", "bb", "ccc", "a", "dddd", "", "bb"]
    encoder = Encoder()
    cache_prompts(prompts, "id", lambda: encoder, Store(tmp_path / "text"), host)
    assert encoder.batches == [["", "a", "bb", "ccc", "dddd"]]
