"""The store: complete shards or none, verified before they are read."""

from __future__ import annotations

import errno
import gc
import json
import os
import tracemalloc

import pytest
import torch
from chroma_trainer.trainer_core.storage import tensor_store as shards
from chroma_trainer.trainer_core.storage.digest_table import digests
from chroma_trainer.trainer_core.storage.tensor_store import Store


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.arange(6.0).reshape(2, 3) + len(name) for name in names}


def fill(store, keys, make, **values) -> None:
    """shards.fill, by names."""
    shards.fill(store, digests(keys), lambda absent: make([keys[i] for i in absent]), **values)


def not_called(absent):
    raise AssertionError(f"made again: {absent}")


def test_what_is_put_is_found_by_another_store(tmp_path):
    values = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(), "ü 猫": torch.ones(0, 3)}
    Store(tmp_path / "new" / "folder").put(values)
    store = Store(tmp_path / "new" / "folder")
    assert store.missing([*values, "z", "z"]) == ["z"]
    for key, value in values.items():
        assert torch.equal(store.get(key), value) and store.get(key).dtype == value.dtype


def test_a_slice_is_stored_as_it_is_seen(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    Store(tmp_path).put({"rows": whole[1:3].clone(), "turned": whole.t()})
    store = Store(tmp_path)
    assert torch.equal(store.get("rows"), whole[1:3]) and torch.equal(store.get("turned"), whole.t())


def test_equal_content_is_one_file_and_a_key_is_written_once(tmp_path):
    Store(tmp_path).put(tensors("b", "a"))
    Store(tmp_path).put(dict(reversed(tensors("b", "a").items())))
    store = Store(tmp_path)
    store.put(tensors("a", "c"))
    assert len(list(tmp_path.iterdir())) == 2
    store.put(tensors("a"))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", [0, 9, -1], ids=["length", "header", "data"])
def test_a_flipped_byte_is_noticed_and_the_content_made_again(tmp_path, place):
    Store(tmp_path).put(tensors("a", "b"))
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)
    told: list[str] = []
    store = Store(tmp_path, told.append)
    made: list[str] = []

    def make(absent):
        made.extend(absent)
        yield tensors(*absent)

    fill(store, ["a", "b"], make)
    assert made == ["a", "b"] and torch.equal(store.get("a"), tensors("a")["a"])
    if place == -1:  # a header that can't be read names no key, so that there is nothing to tell
        assert told == [
            f"cache file {path.name} is damaged; it was renamed to {path.stem}.damaged and its content will be recomputed"
        ]
    assert Store(tmp_path).missing(["a", "b"]) == []


@pytest.mark.parametrize("size", [0, 4, 20])
def test_a_shard_that_is_cut_short_holds_nothing(tmp_path, size):
    Store(tmp_path).put(tensors("a"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert Store(tmp_path).missing(["a"]) == ["a"]


def test_a_shard_whose_data_is_cut_short(tmp_path):
    Store(tmp_path).put(tensors("a"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert Store(tmp_path).missing(["a"]) == ["a"]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    Store(tmp_path).put(tensors("a"))
    (path,) = tmp_path.iterdir()
    half = tmp_path / ".tmp-123.safetensors"
    path.rename(half)
    assert Store(tmp_path).missing(["a"]) == ["a"] and half.exists()


def test_only_what_is_missing_is_made(tmp_path):
    store = Store(tmp_path)
    store.put(tensors("b"))
    seen: list[str] = []
    fill(store, ["a", "b", "a", "c"], lambda absent: seen.extend(absent) or [tensors(*absent)])
    assert seen == ["a", "c"]
    fill(store, ["a", "b", "c"], not_called)


def test_a_shard_is_written_when_it_is_full(tmp_path):
    store, counts = Store(tmp_path), []

    def make(absent):
        for key in absent:
            yield tensors(key)
            counts.append(len(list(tmp_path.iterdir())))

    fill(store, list("abcde"), make, shard_bytes=48)  # two tensors of 24 bytes
    assert counts == [0, 1, 1, 2, 2] and len(list(tmp_path.iterdir())) == 3


def test_after_a_fault_what_was_made_is_kept(tmp_path):
    def make(absent):
        yield tensors("a")
        yield tensors("b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(Store(tmp_path), ["a", "b", "c"], make)
    assert Store(tmp_path).missing(["a", "b", "c"]) == ["c"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(tensors("a"))

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(tensors("b"))
    assert len(list(tmp_path.iterdir())) == 1 and store.missing(["a", "b"]) == ["b"]


def test_a_shard_that_another_process_sets_aside_or_that_is_deleted_is_made_again(tmp_path):
    Store(tmp_path).put(tensors("a", "b"))
    told: list[str] = []
    one, other, emptied = (Store(tmp_path, told.append) for _ in range(3))
    (path,) = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert [store.missing(["a", "b"]) for store in (one, other)] == [["a", "b"]] * 2 and len(told) == 1
    for file in tmp_path.iterdir():
        file.unlink()
    assert emptied.missing(["b"]) == ["b"]
    for store in (one, other):
        store.put(tensors("a", "b"))
        assert torch.equal(store.get("a"), tensors("a")["a"]) and store.missing(["a", "b"]) == []


def test_headers_of_strange_files_are_passed_over(tmp_path):
    header = json.dumps([1, 2]).encode()
    (tmp_path / "list.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    store = Store(tmp_path)
    assert store.missing(["a"]) == ["a"]


def test_closing_lets_go_of_the_files(tmp_path):
    store = Store(tmp_path)
    store.put(tensors("a"))
    kept = store.get("a").clone()
    store.close()
    assert torch.equal(store.get("a"), kept)


@pytest.mark.slow
def test_a_million_keys_would_take_no_memory_and_every_tensor_is_found(tmp_path):
    """Tables of like length become one, so that there are few; what a key takes is in files."""

    def shard(i: int) -> dict[str, torch.Tensor]:
        return {f"key {i} {j}": torch.tensor([i, j]) for j in range(500)}

    writing = Store(tmp_path)
    for i in range(19):
        writing.put(shard(i))
    assert len(writing._tables) <= 5
    tracemalloc.start()
    reading = Store(tmp_path)
    wanted = digests(f"key {i} {j}" for i in range(20) for j in range(500))
    assert reading.absent(wanted).tolist() == list(range(9500, 10_000))
    del wanted
    gc.collect()
    bytes_kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes_kept < 10 * 9500  # a dict of strings: 200 a key
    for store in (writing, reading):
        assert all(torch.equal(store.get(f"key {i} {j}"), torch.tensor([i, j])) for i in (0, 7, 18) for j in (0, 499))


def test_a_damaged_shard_does_not_hide_its_twin_or_its_neighbours(tmp_path):
    Store(tmp_path).put(tensors("a", "b"))
    (damaged,) = tmp_path.iterdir()
    kept = tmp_path.parent / "aside"
    damaged.rename(kept)
    Store(tmp_path).put(tensors("b", "c"))
    kept.rename(damaged)
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    store = Store(tmp_path)
    assert store.missing(["a", "b", "c"]) == ["a"]
    assert torch.equal(store.get("b"), tensors("b")["b"])
