"""A checkpoint appears complete or not at all, and brings back every bit."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from chroma_trainer.trainer_core.host import CheckpointSaved, Notice, Paths, SinkHost
from chroma_trainer.trainer_core.lora.inject import adapter_state, inject_, trainable_parameters
from chroma_trainer.trainer_core.problems import UserError
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.checkpoint import checkpoint_hook, newest_intact, restore_, save_checkpoint
from torch import nn


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def new_run() -> SimpleNamespace:
    """What a checkpoint needs of a Run: a small LoRA and its optimiser."""
    torch.manual_seed(0)
    model = Blocks().requires_grad_(False)
    layers = inject_(model, ["one", "two"], 2, 2.0, "default", torch.Generator().manual_seed(1))
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    optimizer = load("optimizer", "adamw")(parameters, 0.01, 0.01)
    return SimpleNamespace(
        transformer=model, layers=layers, optimizer=optimizer, step=0, num_steps=100, losses=[], learning_rates=[]
    )


def train(run: SimpleNamespace, num_steps: int) -> SimpleNamespace:
    for _ in range(num_steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(run.step))
        loss = run.transformer(x).square().mean()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.losses.append(loss.item())
        run.learning_rates.append(0.01)
    return run


def same(a: SimpleNamespace, b: SimpleNamespace) -> bool:
    one, two = adapter_state(a.layers), adapter_state(b.layers)
    return all(torch.equal(one[name], two[name]) for name in one) and a.losses == b.losses and a.step == b.step


@pytest.fixture
def events() -> list:
    return []


@pytest.fixture
def host(tmp_path, events) -> SinkHost:
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path), sinks=(events.append,))


@pytest.mark.parametrize("step", [1, 5])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, host, step):
    path = save_checkpoint(tmp_path, train(new_run(), step), 2, host)
    resumed = new_run()
    restore_(resumed, path)
    assert resumed.step == step
    shutil.rmtree(path)  # nothing of the run may lie in the file's memory map
    assert same(train(resumed, 7), train(new_run(), step + 7))


def test_the_newest_k_are_kept_in_the_order_of_steps(tmp_path, host):
    run = new_run()
    for step in (999_999, 1_000_000, 1_000_001):
        run.step = step
        save_checkpoint(tmp_path, run, 2, host)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    newest = newest_intact(tmp_path, host, 2_000_000)
    assert newest and newest.name == "step-1000001"


def test_what_was_just_written_is_kept_whatever_lies_beside_it(tmp_path, host):
    for step in (9, 8, 3):  # a longer run was there before
        run = new_run()
        run.step = step
        path = save_checkpoint(tmp_path, run, 1, host)
        assert [entry for entry in tmp_path.iterdir()] == [path]


def test_steps_beyond_the_runs_end_are_passed_over(tmp_path, host):
    for step in (2, 4, 6):
        run = new_run()
        run.step = step
        save_checkpoint(tmp_path, run, 5, host)
    newest = newest_intact(tmp_path, host, 5)
    assert newest and newest.name == "step-000004" and (tmp_path / "step-000006").is_dir()


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flipped, lambda raw: raw[: len(raw) // 2], lambda raw: b"", None], ids=["flip", "cut", "empty", "gone"])
def test_every_file_of_a_checkpoint_is_guarded(tmp_path, host, events, name, harm):
    run = train(new_run(), 1)
    good = save_checkpoint(tmp_path, run, 3, host)
    bad = save_checkpoint(tmp_path, train(run, 1), 3, host)
    if harm:
        (bad / name).write_bytes(harm((bad / name).read_bytes()))
    else:
        (bad / name).unlink()
    assert newest_intact(tmp_path, host, 100) == good
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.level == "warning" and "set aside as damaged-step-000002; trying the one before" in notice.text
    assert (tmp_path / "damaged-step-000002").is_dir() and newest_intact(tmp_path, host, 100) == good


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '"x"', '{"adapter.safetensors": 1}'])
def test_a_manifest_of_another_form_guards_nothing(tmp_path, host, manifest):
    path = save_checkpoint(tmp_path, train(new_run(), 1), 3, host)
    (path / "manifest.json").write_text(manifest, encoding="utf-8")
    assert newest_intact(tmp_path, host, 100) is None


def test_without_any_there_is_none(tmp_path, host):
    assert newest_intact(tmp_path / "nowhere", host, 100) is None
    (tmp_path / ".tmp-step-000003").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert newest_intact(tmp_path, host, 100) is None


def test_an_intact_one_is_not_written_again_and_a_damaged_one_is(tmp_path, host, events):
    run = train(new_run(), 1)
    path = save_checkpoint(tmp_path, run, 3, host)
    before = (path / "state.json").stat().st_mtime_ns
    save_checkpoint(tmp_path, run, 3, host)
    assert (path / "state.json").stat().st_mtime_ns == before and len(events) == 1
    (path / "state.json").write_bytes(b"{}")
    save_checkpoint(tmp_path, run, 3, host)
    assert newest_intact(tmp_path, host, 100) == path and json.loads((path / "state.json").read_text("utf-8"))["step"] == 1


def test_what_a_killed_process_left_half_written_does_not_matter(tmp_path, host):
    staging = tmp_path / ".tmp-step-000001"
    staging.mkdir()
    (staging / "adapter.safetensors").write_bytes(b"half")
    path = save_checkpoint(tmp_path, train(new_run(), 1), 3, host)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and newest_intact(tmp_path, host, 9) == path


def test_a_folder_that_can_not_be_written_to(tmp_path, host, monkeypatch):
    run = train(new_run(), 1)
    earlier = save_checkpoint(tmp_path, run, 3, host)

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError) as caught:
        save_checkpoint(tmp_path, train(run, 1), 3, host)
    assert str(caught.value) == f"{tmp_path}: the checkpoint of step 2 can't be written: Permission denied; earlier ones are intact"
    assert list(tmp_path.iterdir()) == [earlier] and newest_intact(tmp_path, host, 100) == earlier


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4]), (3, [3]), (0, []), (6, [])])
def test_the_hook_saves_every_so_many_steps_but_not_the_last(tmp_path, host, events, every, steps):
    run = new_run()
    run.num_steps = 6
    hook = checkpoint_hook(tmp_path, every, 9, host)
    for _ in range(6):
        hook(train(run, 1))
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == steps
