"""Full-rank runs: the model itself is trained inside of the backward pass, and saved as a whole model."""

from __future__ import annotations

import inspect
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.full_rank.model_file import base_weights, original_form
from chroma_trainer.trainer_core.full_rank.step_in_backward import StepInBackward
from chroma_trainer.trainer_core.host import CheckpointSaved, LoraSaved, StepReport
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.train.hooks import background_save
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop as loop_module
from safetensors import safe_open
from safetensors.torch import load_file

VALUES = {"rank": 16, "alpha": 16.0, "learning_rate": 1e-3, "max_grad_norm": 0.0, "eval_images": 0}


def request_of(
    workshop, dtype="bf16", optimizer="adafactor", adapter=None, clip_by="this step", validation=None, **values
):
    model = replace(values.pop("model", workshop.model), dtype=dtype)
    request = workshop.request(validation, model, **{**VALUES, **values})
    config = OptimizerConfig(optimizer=optimizer, clip_by=clip_by)
    return replace(request, adapter=AdapterConfig(kind="full", **(adapter or {})), optimizer=config)


def model_of(host):
    (path,) = (host.paths.output / "diffusion_models").iterdir()
    return path


@pytest.fixture(scope="module")
def uninterrupted(workshop):
    host = workshop.host()
    return host, run(request_of(workshop), host)


def load_transformer(model, path=""):
    family = load("family", model.family)()
    return family.load_transformer(replace(model, transformer_file=str(path) or model.transformer_file, dtype="bf16"))


@pytest.mark.slow
def test_it_learns(workshop):
    request = request_of(workshop, steps=40, checkpoint_every=0, learning_rate=2e-3, eval_images=4)
    losses = run(request, workshop.host()).report["eval_loss"]
    assert losses["after"] < 0.9 * losses["before"], losses


def test_the_file_is_the_whole_model_with_the_trained_weights(workshop, uninterrupted):
    host, result = uninterrupted
    path = model_of(host)
    assert result.lora.is_model and result.lora.path == str(path) and result.lora.name == "tiny.safetensors"
    assert result.lora.sha256 == sha256_of(path) and not (host.paths.output / "loras").exists()
    (saved,) = host.all(LoraSaved)
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    base = base_weights(workshop.model, load("family", "chroma")())
    assert shapes == original_form(base) and saved.num_keys == len(shapes)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert metadata["ss_steps"] == "6" and "ss_network_dim" not in metadata
    assert json.loads(metadata["chroma_trainer"])["request"]["adapter"]["kind"] == "full"
    before, after = load_transformer(workshop.model).state_dict(), load_transformer(workshop.model, path).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    blocks = {name for name in after if "transformer_blocks" in name and "norm" not in name}
    # The text half of the last double block's feed-forward part has an effect on the last image token alone.
    assert moved == blocks


def test_it_is_the_base_of_the_next_run_and_keeps_its_names(workshop, uninterrupted):
    first = model_of(uninterrupted[0])
    host = workshop.host()
    run(request_of(workshop, model=replace(workshop.model, transformer_file=str(first)), steps=2), host)
    assert {name: t.shape for name, t in load_file(first).items()} == {
        name: t.shape for name, t in load_file(model_of(host)).items()
    }


def test_diffusers_loads_it(workshop, uninterrupted, monkeypatch):
    from diffusers import ChromaTransformer2DModel
    from diffusers.loaders import single_file_model, single_file_utils

    # Their converter knows the released width alone: its code, with the tiny model's.
    convert = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers
    scope = dict(vars(single_file_utils))
    exec(inspect.getsource(convert).replace("3072", "64"), scope)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["ChromaTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", scope[convert.__name__])
    path = model_of(uninterrupted[0])
    theirs = ChromaTransformer2DModel.from_single_file(
        str(path), config=workshop.model.repo, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    ours = load_transformer(workshop.model, path).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items() if name in ours)
    assert ours.keys() <= theirs.state_dict().keys()


def test_recomputed_blocks_give_the_same_bytes(workshop, uninterrupted):
    again = run(request_of(workshop, gradient_checkpointing=True), workshop.host())
    assert again.losses == uninterrupted[1].losses
    first, second = (load_file(result.lora.path) for result in (uninterrupted[1], again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("fp32", "adamw"),
        ("fp32", "adafactor"),
        ("bf16", "adamw_bf16"),
    ],
)
def test_steps_after_the_backward_pass_give_the_same_bytes(workshop, monkeypatch, dtype, optimizer):
    request = request_of(workshop, dtype, optimizer, steps=3, gradient_checkpointing=True)
    inside = run(request, workshop.host())

    def after(state, stepper, compute_loss, fetch):
        loss = compute_loss(state, state.step, fetch)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        return float(loss.detach()), 0.0

    monkeypatch.setattr(loop_module, "full_rank_step", after)
    assert run(request, workshop.host()).lora.sha256 == inside.lora.sha256


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_cancel_and_resume_equals_an_uninterrupted_run(workshop, uninterrupted, step):
    host = workshop.host().cancelling_at(step)
    with pytest.raises(Cancelled):
        run(request_of(workshop), host)
    assert model_of(host).is_file() and f"step-{step:06}" in host.checkpoints
    files = {path.name for path in (host.run_folder / "checkpoints" / f"step-{step:06}").iterdir()}
    assert files == {"adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    result = run(request_of(workshop), host.cancelling_at(0))
    assert result.report["resumed_from"] == step and result.lora.sha256 == uninterrupted[1].lora.sha256


def test_a_step_that_ends_half_way_is_never_saved(workshop, uninterrupted, monkeypatch):
    """As in a process that is killed: some layers have moved, and others have not."""
    move, moves = StepInBackward.step_, []

    def fail(self, parameter, step, scale=1.0):
        moves.append(step)
        if moves.count(3) == 20:
            raise ValueError("half way")
        return move(self, parameter, step, scale)

    host = workshop.host()
    monkeypatch.setattr(StepInBackward, "step_", fail)
    with pytest.raises(ValueError, match="half way"):
        run(request_of(workshop), host)
    monkeypatch.undo()
    assert host.checkpoints == ["step-000002"]
    result = run(request_of(workshop), host)
    assert result.report["resumed_from"] == 2 and result.lora.sha256 == uninterrupted[1].lora.sha256


def test_a_gradient_that_is_not_finite_leaves_the_last_checkpoint(workshop, monkeypatch):
    backward = loop_module.micro_loss

    def broken(state, micro, fetch=None):
        loss = backward(state, micro, fetch)
        return loss if micro < 3 else loss + (loss * 0).sqrt()  # a finite loss, whose gradient is not

    host = workshop.host()
    monkeypatch.setattr(loop_module, "micro_loss", broken)
    with pytest.raises(UserError, match=r"step 4 gave loss .* which is not finite.*the last checkpoint is intact"):
        run(request_of(workshop), host)
    assert host.checkpoints == ["step-000002"] and load_file(model_of(host))
    assert all(tensor.isfinite().all() for tensor in load_file(model_of(host)).values())


@pytest.mark.slow
@pytest.mark.parametrize("family", names("family"))
def test_every_parameter_can_be_trained(workshop, request, family):
    model = request.getfixturevalue(f"tiny_{family}_model")
    host = workshop.host()
    values = {"targets": "*", "steps": 2, "learning_rate": 0.01, "checkpoint_every": 0}
    stored = run(request_of(workshop, model=model, **values), host)
    again = run(request_of(workshop, model=model, gradient_checkpointing=True, **values), workshop.host())
    assert again.losses == stored.losses
    first, second = (load_file(result.lora.path) for result in (stored, again))
    assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not [text for text in host.told() if "no memory estimate" in text]
    before, after = load_transformer(model).state_dict(), load_transformer(model, model_of(host)).state_dict()
    assert not [name for name, tensor in after.items() if torch.equal(tensor, before[name])]


@pytest.mark.slow
def test_weight_decay_shrinks_matrices_and_leaves_biases_and_scales(workshop):
    """Steps of a rate so high that the decay is all that is left of a weight: 1 - rate x decay = 0."""
    values = {"targets": "all+ffs, norms", "steps": 1, "checkpoint_every": 0, "learning_rate": 0.01}
    decayed, plain = (
        load_transformer(workshop.model, run(request_of(workshop, weight_decay=decay, **values), host).lora.path)
        for decay, host in ((50.0, workshop.host()), (0.0, workshop.host()))
    )
    for (name, one), two in zip(decayed.state_dict().items(), plain.state_dict().values(), strict=True):
        is_matrix = one.ndim == 2 and "blocks" in name
        assert torch.equal(one, two) != is_matrix, name
        if is_matrix:
            assert one.norm() < 0.6 * two.norm(), name


@pytest.mark.slow
def test_clipping_by_the_step_before_resumes_exactly(workshop):
    values = {"max_grad_norm": 0.05, "clip_by": "step before", "optimizer": "adamw", "learning_rate": 1e-3}
    whole = run(request_of(workshop, **values), workshop.host())
    free = run(request_of(workshop, **{**values, "max_grad_norm": 0.0}), workshop.host())
    assert whole.losses[:2] == free.losses[:2] and whole.lora.sha256 != free.lora.sha256
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_of(workshop, **values), host)
    assert run(request_of(workshop, **values), host.cancelling_at(0)).lora.sha256 == whole.lora.sha256


@pytest.mark.slow
def test_the_best_checkpoint_is_saved_from_its_file(workshop):
    host = workshop.host()
    result = run(request_of(workshop, holdout=0.25, learning_rate=0.02, checkpoint_every=1, eval_images=4), host)
    best = result.report["best"]
    names = sorted(path.name for path in (host.paths.output / "diffusion_models").iterdir())
    assert names == ["tiny-best.safetensors", "tiny.safetensors"] and sha256_of(best["lora"]) == best["sha256"]
    checkpoint = load_file(host.run_folder / "checkpoints" / f"step-{best['step']:06}" / "adapter.safetensors")
    weights = load_transformer(workshop.model, best["lora"]).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.items())


@pytest.mark.slow
def test_validation_images_are_those_of_the_trained_weights(workshop):
    settings = ValidationConfig(prompts="a cat", steps=2, resolutions="32x32", cfg=1.0)
    host = workshop.host()
    run(request_of(workshop, validation=settings, steps=2, learning_rate=0.05), host)
    names = sorted(path.name for path in (host.run_folder / "validation").glob("*.png"))
    assert names == ["step-000000-32x32.png", "step-000002-32x32.png"]


@pytest.mark.slow
def test_averaged_weights_are_in_ram_and_resume_exactly(workshop):
    values = {"adapter": {"ema_decay": 0.9}, "learning_rate": 0.01}
    whole_host = workshop.host()
    whole = run(request_of(workshop, **values), whole_host)
    last = load_file(whole_host.run_folder / "checkpoints" / "step-000006" / "adapter.safetensors")
    averages = load_file(whole_host.run_folder / "checkpoints" / "step-000006" / "ema.safetensors")
    saved = load_transformer(workshop.model, whole.lora.path).state_dict()
    assert all(torch.equal(averages[name].bfloat16(), saved[name]) for name in last)
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in last.items())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_of(workshop, **values), host)
    assert run(request_of(workshop, **values), host.cancelling_at(0)).lora.sha256 == whole.lora.sha256


@pytest.mark.slow
def test_offloaded_modulations_of_flux_give_the_same_bytes(workshop, offloading, tiny_flux_model):
    values = {"model": tiny_flux_model, "targets": "*", "steps": 2, "checkpoint_every": 0}
    whole = run(request_of(workshop, gradient_checkpointing=True, **values), workshop.host())
    assert same_weights(offloading(workshop.host(), **values), whole)


@pytest.fixture(scope="module")
def offloading(workshop):
    """Return a run with all weights in RAM: blocks recomputed, weights and states on the device during a step alone."""

    def offloaded(host, kind="block", **values):
        request = request_of(workshop, gradient_checkpointing=True, **values)
        memory = MemoryConfig(group_offload=kind, activation_offload=kind == "leaf")
        return run(replace(request, memory=memory), host)

    return offloaded


def same_weights(first, second) -> bool:
    one, two = load_file(first.lora.path), load_file(second.lora.path)
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["block", pytest.param("leaf", marks=pytest.mark.slow)])
def test_offloaded_weights_give_the_same_bytes(workshop, uninterrupted, offloading, kind):
    result = offloading(workshop.host(), kind)
    assert result.losses == uninterrupted[1].losses and same_weights(result, uninterrupted[1])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "optimi-lion", "came"])
def test_offloaded_states_give_the_same_bytes_also_after_a_resume(workshop, offloading, optimizer):
    values = {"optimizer": optimizer, "adapter": {"ema_decay": 0.9}, "targets": "all+ffs, norms, embedders"}
    whole = run(request_of(workshop, gradient_checkpointing=True, **values), workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        offloading(host, **values)
    assert same_weights(offloading(host.cancelling_at(0), **values), whole)


@pytest.fixture
def slow_disk(monkeypatch):
    """Let the thread that writes a checkpoint wait until it is released, while the training continues."""
    released, write = threading.Event(), background_save.write_checkpoint

    def wait(folder, contents):
        if threading.current_thread() is not threading.main_thread():
            released.wait(60)
        return write(folder, contents)

    monkeypatch.setattr(background_save, "write_checkpoint", wait)
    return released


@pytest.mark.slow
def test_a_checkpoint_is_written_while_the_training_continues(workshop, uninterrupted, slow_disk):
    """A run that is killed before it is written resumes from the one before, and ends in the same bytes."""
    killed, on_disk = workshop.host(), {}

    def see(event):
        if isinstance(event, CheckpointSaved):
            slow_disk.clear()
        elif isinstance(event, StepReport) and event.step in (3, 5):
            on_disk[event.step] = sorted(path.name for path in host.run_folder.glob("checkpoints/step-*"))
            if event.step == 5:
                shutil.copytree(host.paths.output, killed.paths.output)
            slow_disk.set()

    host = workshop.host(sink=see)
    result = run(request_of(workshop), host)
    assert result.lora.sha256 == uninterrupted[1].lora.sha256
    assert on_disk == {3: [], 5: ["step-000002"]}  # those of steps 2 and 4 are being written
    assert [event.step for event in host.all(CheckpointSaved)] == [2, 4, 6]
    assert host.checkpoints == ["step-000004", "step-000006"]
    slow_disk.set()
    resumed = run(request_of(workshop), killed)
    assert resumed.report["resumed_from"] == 2 and resumed.lora.sha256 == result.lora.sha256


@pytest.mark.slow
def test_a_checkpoint_that_can_not_be_written_ends_the_run_at_the_next_step(workshop, uninterrupted, monkeypatch):
    write = background_save.write_checkpoint

    def fail(folder, contents):
        if contents.step == 4:
            raise UserError.at(str(folder), "the checkpoint of step 4 can't be written: no space is left")
        return write(folder, contents)

    monkeypatch.setattr(background_save, "write_checkpoint", fail)
    host = workshop.host()
    with pytest.raises(UserError, match="of step 4 can't be written"):
        run(request_of(workshop), host)
    assert host.checkpoints[0] == "step-000002" and "step-000004" not in host.checkpoints
    monkeypatch.undo()
    assert run(request_of(workshop), host).lora.sha256 == uninterrupted[1].lora.sha256


@pytest.mark.slow
def test_without_ram_for_a_copy_the_training_waits_for_the_disk(workshop, uninterrupted, monkeypatch):
    monkeypatch.setattr(background_save, "free_bytes", lambda device: 1000)
    host = workshop.host()
    assert run(request_of(workshop), host).lora.sha256 == uninterrupted[1].lora.sha256
    (text,) = [text for text in host.told() if "the training waits while a checkpoint is written" in text]
    assert "GB of RAM, and 0.0 GB are free" in text
