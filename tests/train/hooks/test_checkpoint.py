"""A checkpoint appears complete or not at all, and brings back every bit."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import adapter_state, inject_, trainable_parameters
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.distributed.ranks import ALONE
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import CheckpointSaved, Notice, Paths, SinkHost
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.hooks import checkpoint
from chroma_trainer.trainer_core.train.hooks.checkpoint import newest_intact, prune, restore_, save_checkpoint
from chroma_trainer.trainer_core.train.hooks.checkpointer import checkpoint_hook, save_and_prune
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from torch import nn


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def new_run(keep_last: int = 2, keep_every: int = 0, every: int = 2) -> Any:
    """What a checkpoint needs of a Run, as a stand-in: a small LoRA and its optimiser."""
    torch.manual_seed(0)
    model = Blocks().requires_grad_(False)
    layers = inject_(model, ["one", "two"], 2, 2.0, "default", torch.Generator().manual_seed(1))
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    optimizer = load("optimizer", "adamw").build(parameters, OptimizerConfig(), 0.01, 0.01, 0)
    return SimpleNamespace(
        is_consistent=True,
        transformer=model, layers=layers, optimizer=optimizer, step=0, num_steps=100, losses=[], learning_rates=[],
        eval_losses={}, evaluations={}, leaks={}, leak_meter=None, judge=None, stop_reason="", held=(), ema=None,
        ranks=ALONE, is_full=False, background_save=None, sharding=None, steps_before=0, loss_scale=None,
        config=TrainingConfig(keep_checkpoints=keep_last, keep_every=keep_every, checkpoint_every=every),
    )  # fmt: skip


def train(run: Any, num_steps: int) -> Any:
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


def same(a: Any, b: Any) -> bool:
    one, two = adapter_state(a.layers), adapter_state(b.layers)
    return all(torch.equal(one[name], two[name]) for name in one) and a.losses == b.losses and a.step == b.step


@pytest.fixture
def events() -> list:
    return []


@pytest.fixture
def host(tmp_path, events) -> SinkHost:
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path), sinks=(events.append,))


def test_each_part_is_freed_when_it_is_written(tmp_path, host, monkeypatch):
    """The copies of weights and optimizer were held while the LoRA was exported: 5.5 times the weights, now 2.6."""
    copies: list[weakref.ref] = []
    save, export = checkpoint.save_file, checkpoint.export_lora

    def save_file(tensors, path):
        copies.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors.values())
        save(tensors, path)

    def export_lora(*args):
        assert len(copies) == 4 + 3 * 4 and not any(copy() for copy in copies)
        return export(*args)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(checkpoint, "export_lora", export_lora)
    save_checkpoint(tmp_path / "checkpoints", train(new_run(), 1), host)
    assert copies


@pytest.mark.parametrize("step", [1, 5])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, host, step):
    path = save_checkpoint(tmp_path, train(new_run(), step), host)
    resumed = new_run()
    restore_(resumed, path)
    assert resumed.step == step
    shutil.rmtree(path)  # nothing of the run may lie in the file's memory map
    assert same(train(resumed, 7), train(new_run(), step + 7))


def test_the_newest_k_are_kept_in_the_order_of_steps(tmp_path, host):
    run = new_run(keep_last=2)
    for step in (999_999, 1_000_000, 1_000_001):
        run.step = step
        save_and_prune(tmp_path, run, host)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    newest = newest_intact(tmp_path, host, 2_000_000)
    assert newest and newest.name == "step-1000001"


def test_what_was_just_written_is_kept_whatever_lies_beside_it(tmp_path, host):
    for step in (9, 8, 3):  # a longer run was there before
        run = new_run(keep_last=1)
        run.step = step
        save_and_prune(tmp_path, run, host)
        path = tmp_path / f"step-{step:06}"
        assert [entry for entry in tmp_path.iterdir()] == [path]


def test_steps_beyond_the_runs_end_are_passed_over(tmp_path, host):
    for step in (2, 4, 6):
        run = new_run()
        run.step = step
        save_checkpoint(tmp_path, run, host)
    newest = newest_intact(tmp_path, host, 5)
    assert newest and newest.name == "step-000004" and (tmp_path / "step-000006").is_dir()


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [flipped, lambda raw: raw[: len(raw) // 2], lambda raw: b"", None], ids=["flip", "cut", "empty", "gone"]
)
def test_every_file_of_a_checkpoint_is_guarded(tmp_path, host, events, name, harm):
    run = train(new_run(), 1)
    good = save_checkpoint(tmp_path, run, host)
    bad = save_checkpoint(tmp_path, train(run, 1), host)
    if harm:
        (bad / name).write_bytes(harm((bad / name).read_bytes()))
    else:
        (bad / name).unlink()
    assert newest_intact(tmp_path, host, 100) == good
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.level == "warning" and "renamed to damaged-step-000002; trying the one before" in notice.text
    assert (tmp_path / "damaged-step-000002").is_dir() and newest_intact(tmp_path, host, 100) == good


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '"x"', '{"adapter.safetensors": 1}'])
def test_a_manifest_of_another_form_guards_nothing(tmp_path, host, manifest):
    path = save_checkpoint(tmp_path, train(new_run(), 1), host)
    (path / "manifest.json").write_text(manifest, encoding="utf-8")
    assert newest_intact(tmp_path, host, 100) is None


def test_without_any_there_is_none(tmp_path, host):
    assert newest_intact(tmp_path / "nowhere", host, 100) is None
    (tmp_path / ".tmp-step-000003").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert newest_intact(tmp_path, host, 100) is None


def test_an_intact_one_is_not_written_again_and_a_damaged_one_is(tmp_path, host, events):
    run = train(new_run(), 1)
    path = save_checkpoint(tmp_path, run, host)
    before = (path / "state.json").stat().st_mtime_ns
    save_checkpoint(tmp_path, run, host)
    assert (path / "state.json").stat().st_mtime_ns == before and len(events) == 1
    (path / "state.json").write_bytes(b"{}")
    save_checkpoint(tmp_path, run, host)
    assert (
        newest_intact(tmp_path, host, 100) == path and json.loads((path / "state.json").read_text("utf-8"))["step"] == 1
    )


def test_what_a_killed_process_left_half_written_does_not_matter(tmp_path, host):
    staging = tmp_path / ".tmp-step-000001"
    staging.mkdir()
    (staging / "adapter.safetensors").write_bytes(b"half")
    path = save_checkpoint(tmp_path, train(new_run(), 1), host)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and newest_intact(tmp_path, host, 9) == path


def test_a_folder_that_can_not_be_written_to(tmp_path, host, monkeypatch):
    run = train(new_run(), 1)
    earlier = save_checkpoint(tmp_path, run, host)

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError) as caught:
        save_checkpoint(tmp_path, train(run, 1), host)
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of step 2 can't be written: Permission denied; close other programs that have it "
        "open; earlier checkpoints are intact"
    )
    assert list(tmp_path.iterdir()) == [earlier] and newest_intact(tmp_path, host, 100) == earlier


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4]), (3, [3]), (0, []), (6, [])])
def test_the_hook_saves_every_so_many_steps_but_not_the_last(tmp_path, host, events, every, steps):
    run = new_run(keep_last=9, every=every)
    run.num_steps = 6
    hook = checkpoint_hook(tmp_path, host, PhaseTimer())
    for _ in range(6):
        hook(train(run, 1))
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == steps


def test_every_nth_and_the_best_stay(tmp_path, host):
    run = new_run(keep_last=1, keep_every=4)
    run.eval_losses = {3: (0.1, 0.0), 5: (0.2, 0.0)}
    for step in range(1, 8):
        run.step = step
        prune(tmp_path, save_checkpoint(tmp_path, run, host), 1, 4, best=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004", "step-000007"]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, host):
    run = train(new_run(), 1)
    earlier = save_checkpoint(tmp_path, run, host)
    train(run, 1)
    with torch.no_grad():
        run.layers["two"].lora_A[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"1 of 4 weights are not finite after step 2, such as two\.lora_A"):
        save_checkpoint(tmp_path, run, host)
    assert list(tmp_path.iterdir()) == [earlier]


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(tmp_path, host, monkeypatch):
    run = train(new_run(), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"step 1 can't be written: it needs 4 MB and 0 MB are free; free disk space"):
        save_checkpoint(tmp_path, run, host)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_form_is_refused_with_what_differs(tmp_path, host):
    path = save_checkpoint(tmp_path, train(new_run(), 1), host)
    other = new_run()
    model = Blocks().requires_grad_(False)
    other.layers = inject_(model, ["one"], 3, 2.0, "default", torch.Generator().manual_seed(1))
    with pytest.raises(
        UserError, match=r"on_change: .*4 of its 4 weights have another shape or name, such as one\.lora_A"
    ):
        restore_(other, path)


def test_skipped_steps_and_eval_losses_come_back(tmp_path, host):
    run = train(new_run(), 2)
    run.losses[0] = float("nan")
    run.eval_losses = {2: (0.25, 0.125)}
    path = save_checkpoint(tmp_path, run, host)
    resumed = new_run()
    restore_(resumed, path)
    assert str(resumed.losses) == str(run.losses) and resumed.eval_losses == run.eval_losses
