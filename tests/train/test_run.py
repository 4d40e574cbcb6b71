"""Whole runs of the engine: they learn, they repeat to the last bit, and nothing that ends them loses what was learnt."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.layer import AdapterLayer
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import (
    CheckpointSaved,
    LeakMeasured,
    LoraSaved,
    Notice,
    PhaseStarted,
    PreviewReady,
    RunReported,
    StepReport,
)
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.train import build as build_module
from chroma_trainer.trainer_core.train import run as run_module
from chroma_trainer.trainer_core.train.hooks import validation as validation_module
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop as loop_module
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from safetensors.torch import load_file

from tests.workshop import EVALUATED


@pytest.fixture(scope="module")
def uninterrupted(plain_run):
    """The run that the others must equal: its host and its result."""
    return plain_run


def test_it_learns(workshop):
    host = workshop.host()
    result = run(
        workshop.request(steps=40, rank=16, alpha=16.0, learning_rate=0.02, checkpoint_every=0, **EVALUATED), host
    )
    before, after = result.report["eval_loss"]["before"], result.report["eval_loss"]["after"]
    assert after < 0.95 * before, (before, after)


def test_the_report_and_the_files(uninterrupted):
    host, result = uninterrupted
    report = result.report
    assert report["steps"] == 6 and report["resumed_from"] == 0 and len(report["loss"]) == 6 == len(result.losses)
    assert report["lora"] == str(host.lora) and report["sha256"] == sha256_of(host.lora) == result.lora.sha256
    assert list(report["seconds"]) == ["start", "text", "latents", "load", "eval", "train", "validate", "save"]
    assert report["seconds_per_step"] > 0 and report["peak_ram_bytes"] > 1 << 20
    assert json.loads((host.run_folder / "report.json").read_text("utf-8")) == json.loads(json.dumps(report))
    names = {path.name for path in host.run_folder.iterdir()}
    assert {"request.json", "report.json", "loss.png", "crops.png", "density.png", "checkpoints"} <= names
    assert [event.step for event in host.all(StepReport)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in host.all(CheckpointSaved)] == [2, 4, 6] and host.checkpoints == [
        "step-000004",
        "step-000006",
    ]
    (saved,) = host.all(LoraSaved)
    assert saved.applied == saved.num_keys == len(load_file(host.lora)) and host.all(RunReported)[0].report == report
    assert "4 images; batch 2 -> 3 batches per epoch; 6 steps = 2.0 epochs" in host.told()


def test_equal_requests_write_equal_bytes(workshop, uninterrupted):
    again = run(workshop.request(), workshop.host())
    assert again.lora.sha256 == uninterrupted[1].lora.sha256 and again.losses == uninterrupted[1].losses


def test_another_seed_writes_others(workshop, uninterrupted):
    assert run(workshop.request(seed=6), workshop.host()).losses != uninterrupted[1].losses


@pytest.mark.parametrize(("step", "values"), [(1, {}), pytest.param(3, EVALUATED, marks=pytest.mark.slow)])
def test_cancel_and_resume_equals_an_uninterrupted_run(workshop, uninterrupted, step, values):
    request = workshop.request(**values)
    whole = run(request, workshop.host()) if values else uninterrupted[1]
    host = workshop.host().cancelling_at(step)
    with pytest.raises(Cancelled):
        run(request, host)
    # A checkpoint and a usable LoRA of the steps done are there.
    assert f"step-{step:06}" in host.checkpoints and describe(host.lora)["step"] == step
    assert f"stopped at step {step} of 6; run it again to resume from there" in host.told()
    result = run(request, host.cancelling_at(0))
    assert f"resumed from step {step} of 6" in host.told() and result.report["resumed_from"] == step
    assert result.losses == whole.losses and result.lora.sha256 == whole.lora.sha256
    assert result.report["eval_loss"] == whole.report["eval_loss"] and bool(host.all(LeakMeasured)) == bool(values)


@pytest.mark.slow
def test_every_option_with_randomness_resumes_exactly(workshop):
    values = {
        "batch_size": 1, "accumulation": 2, "caption_dropout": 0.5, "lr_schedule": "cosine", "init": "gaussian",
        "sigma_density": "logit-normal", "gradient_checkpointing": True,
    }  # fmt: skip
    whole = run(workshop.request(**values), workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(workshop.request(**values), host)
    result = run(workshop.request(**values), host.cancelling_at(0))
    assert result.losses == whole.losses and result.lora.sha256 == whole.lora.sha256


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(workshop, uninterrupted):
    host = workshop.host().cancelling_at(5)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    assert host.checkpoints == ["step-000004", "step-000005"]
    file = host.run_folder / "checkpoints" / "step-000005" / "optimizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    result = run(workshop.request(), host.cancelling_at(0))
    assert result.report["resumed_from"] == 4 and result.lora.sha256 == uninterrupted[1].lora.sha256
    assert (
        "checkpoint step-000005 is damaged (the SHA-256 of optimizer.safetensors does not match its manifest) and was "
        "renamed to damaged-step-000005; trying the one before"
    ) in host.told()


@pytest.mark.slow
def test_going_on_with_more_steps_and_back_to_fewer(workshop, uninterrupted):
    host = workshop.host()
    run(workshop.request(steps=4), host)
    longer = run(workshop.request(steps=6), host)
    assert longer.report["resumed_from"] == 4 and longer.losses == uninterrupted[1].losses
    shorter = run(workshop.request(steps=5), host)
    assert (
        shorter.report["resumed_from"] == 4 and shorter.losses == longer.losses[:5] and describe(host.lora)["step"] == 5
    )


def test_a_finished_run_is_not_trained_again(workshop):
    host = workshop.host()
    first = run(workshop.request(steps=2), host)
    again = run(workshop.request(steps=2), host)
    assert again.lora.sha256 == first.lora.sha256 and again.report["seconds_per_step"] is None
    assert len(host.all(StepReport)) == 2


@pytest.mark.slow
def test_without_resume_it_begins_anew(workshop, uninterrupted):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    result = run(workshop.request(resume=False), host.cancelling_at(0))
    assert result.report["resumed_from"] == 0 and result.losses == uninterrupted[1].losses


def test_another_request_of_the_name_has_a_folder_of_its_own(workshop):
    host = workshop.host()
    run(workshop.request(steps=2), host)
    run(workshop.request(steps=2, learning_rate=0.001), host)
    assert len(list((host.paths.output / "chroma_trainer").iterdir())) == 2


def test_a_loss_that_is_not_finite_names_the_files_and_keeps_the_weights(workshop, uninterrupted, monkeypatch):
    monkeypatch.setattr(loop_module, "velocity_loss", poisoned(loop_module.velocity_loss, at=4))
    host = workshop.host()
    with pytest.raises(UserError) as caught:
        run(workshop.request(), host)
    folder = workshop.root / "pictures"
    message = str(caught.value)
    assert message.startswith(
        "learning_rate: step 4 gave loss nan and gradient norm nan, which are not finite; the batch was "
    )
    assert message.endswith("The LoRA of step 3 is saved. Try a lower learning rate")
    assert any(str(folder / f"{i}.png") in message for i in range(4))
    assert all(tensor.isfinite().all() for tensor in load_file(host.lora).values()) and describe(host.lora)["step"] == 3
    monkeypatch.undo()
    assert run(workshop.request(), host).losses == uninterrupted[1].losses


def poisoned(loss, at: int):
    """The loss, but NaN at its call number `at` of those with gradients."""
    calls = 0

    def call(prediction, *others):
        nonlocal calls
        calls += prediction.requires_grad
        value = loss(prediction, *others)
        return value * float("nan") if calls == at and prediction.requires_grad else value

    return call


def test_accumulation_sees_the_same_batches_as_more_steps_would(workshop):
    host = workshop.host()
    result = run(workshop.request(accumulation=2, steps=3, caption_dropout=0.0), host)
    assert len(result.losses) == 3 and all(0 < loss < 100 for loss in result.losses)
    assert "4 images; batch 2 x accumulation 2 -> 3 batches per epoch; 3 steps = 2.0 epochs" in host.told()


def test_epochs_become_steps(workshop):
    host = workshop.host()
    assert len(run(workshop.request(steps=0, epochs=1, accumulation=2), host).losses) == 2  # 3 batches, 2 a step


def test_checkpointed_blocks_give_the_same_run(workshop, uninterrupted):
    result = run(workshop.request(gradient_checkpointing=True), workshop.host())
    assert torch.allclose(torch.tensor(result.losses), torch.tensor(uninterrupted[1].losses), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_int8_learns_nearly_as_well(workshop, uninterrupted, dtype):
    model = replace(workshop.model, quantization=QuantizationConfig("int8-quanto"), dtype=dtype)
    result = run(workshop.request(model=model), workshop.host())
    assert torch.allclose(torch.tensor(result.losses), torch.tensor(uninterrupted[1].losses), rtol=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(result.lora.path).values())


def test_what_the_file_says_of_itself(workshop, uninterrupted):
    host, _ = uninterrupted
    said = describe(host.lora)
    assert said["trigger"] == "sks" and said["step"] == 6 and said["dataset"]["images"] == 4
    assert said["request"]["training"]["learning_rate"] == 0.01 and said["request"]["model"]["repo"] == "tiny-chroma"
    assert {"chroma-trainer", "torch", "diffusers"} <= said["versions"].keys()
    assert said["metadata"]["ss_network_dim"] == "4" and said["metadata"]["modelspec.trigger_phrase"] == "sks"
    raw = host.lora.read_bytes()
    for path in (workshop.root, workshop.model.repo, host.paths.output):
        assert str(path).encode() not in raw, path
    assert b"202" not in json.dumps({k: v for k, v in said["metadata"].items() if k != "sshs_model_hash"}).encode()


def test_the_workflow_travels_in_the_file(workshop):
    prompt = {"1": {"class_type": "LoRATrainer", "inputs": {"name": "tiny"}}}
    host = workshop.host()
    run(workshop.request(steps=1), host, prompt)
    assert describe(host.lora)["workflow"] == prompt


def test_validation_draws_the_base_and_the_lora(workshop, uninterrupted):
    settings = ValidationConfig(prompts="a cat", steps=1, cfg=1.0, resolutions="32x32, 48x32", lora_strength="0, 1")
    host = workshop.host()
    result = run(workshop.request(settings, validate_every=2), host)
    assert [event.step for event in host.all(PreviewReady)] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert len(result.report["files"]["validation"]) == 2
    assert result.losses == uninterrupted[1].losses and result.report["seconds"]["validate"] > 0


@pytest.mark.parametrize(
    "when", ["before", *(pytest.param(when, marks=pytest.mark.slow) for when in ("between", "after"))]
)
def test_a_cancel_while_pictures_are_drawn_loses_nothing(workshop, when):
    settings = ValidationConfig(prompts="a cat", steps=1, cfg=1.0, resolutions="32x32")
    request = workshop.request(settings, validate_every=2, steps=3, checkpoint_every=0)
    num_steps = {"before": 0, "between": 2, "after": 3}[when]
    host = workshop.host()

    def over() -> bool:
        drawing = [event.phase for event in host.all(PhaseStarted)][-1:] == ["validate"]
        return drawing and len(host.all(StepReport)) == num_steps

    object.__setattr__(host, "is_cancelled", over)
    with pytest.raises(Cancelled):
        run(request, host)
    if num_steps:
        assert host.checkpoints == [f"step-{num_steps:06}"] and describe(host.lora)["step"] == num_steps
    object.__setattr__(host, "is_cancelled", lambda: False)
    assert len(run(request, host).losses) == 3


def test_at_strength_0_the_model_is_the_base_exactly(workshop):
    result = run(workshop.request(steps=1, **EVALUATED), host := workshop.host())
    again = run(workshop.request(steps=2, **EVALUATED), host)  # resumed: the LoRA has weights by then
    other = run(workshop.request(steps=1, rank=2, seed=9, **EVALUATED), workshop.host())
    assert len({each.report["eval_loss"]["before"] for each in (result, again, other)}) == 1
    assert again.report["resumed_from"] == 1


def test_an_interrupt_in_the_middle_of_a_step_leaves_the_last_whole_state(workshop, uninterrupted, monkeypatch):
    host = workshop.host()

    def interrupt(event):
        if isinstance(event, StepReport) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(workshop.request(), workshop.host(host.paths.output, interrupt))
    assert host.checkpoints == ["step-000002", "step-000003"]  # whole: the interrupt came after the step
    assert run(workshop.request(), host).lora.sha256 == uninterrupted[1].lora.sha256


def full_disk(kind: str):
    replace_file = os.replace

    def call(source, target):
        if kind in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace_file(source, target)

    return call


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_full_disk_at_a_checkpoint_keeps_the_earlier_one(workshop, uninterrupted, monkeypatch, step):
    host = workshop.host()
    monkeypatch.setattr(os, "replace", full_disk(f"step-{step:06}"))
    with pytest.raises(UserError) as caught:
        run(workshop.request(), host)
    assert str(caught.value).endswith(
        f"checkpoints: the checkpoint of step {step} can't be written: No space left on device; "
        "earlier checkpoints are intact"
    )
    assert host.checkpoints == ["step-000002", "step-000004"][: step // 2 - 1]
    monkeypatch.undo()
    assert run(workshop.request(), host).lora.sha256 == uninterrupted[1].lora.sha256


@pytest.mark.slow
def test_a_full_disk_at_the_lora_is_told_and_leaves_the_old_one(workshop, uninterrupted, monkeypatch):
    host = workshop.host()
    run(workshop.request(steps=2), host)
    before = sha256_of(host.lora)
    monkeypatch.setattr(os, "replace", full_disk("tiny.safetensors"))
    with pytest.raises(UserError) as caught:
        run(workshop.request(), host)
    assert str(caught.value) == (
        f"{host.paths.output / 'loras' / 'tiny.safetensors'}: No space left on device; earlier files are intact; "
        "free disk space or fix the path, and run again to resume"
    )
    assert sha256_of(host.lora) == before and host.checkpoints[-1] == "step-000006"
    monkeypatch.undo()
    assert run(workshop.request(), host).lora.sha256 == uninterrupted[1].lora.sha256


def test_all_that_is_wrong_is_said_before_anything_is_loaded(workshop, monkeypatch):
    monkeypatch.setattr(build_module, "build_run", None)
    monkeypatch.setattr(run_module, "build_run", None)
    model = replace(workshop.model, repo=str(workshop.root / "nowhere"))
    with pytest.raises(UserError) as caught:
        run(workshop.request(model=model, steps=5, warmup_steps=5), workshop.host())
    told = [str(problem) for problem in caught.value.problems]
    assert told[0] == "warmup_steps: 5 warm-up steps leave nothing of 5 steps; use at most 4" and len(told) > 1


@pytest.mark.slow
def test_damage_in_a_cache_is_told(workshop, tmp_path, uninterrupted):
    host = workshop.host()
    object.__setattr__(host, "paths", replace(host.paths, cache=tmp_path))
    run(workshop.request(), host)
    for path in [*(tmp_path / "text").iterdir(), *(tmp_path / "latents").iterdir()]:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    again = workshop.host()
    object.__setattr__(again, "paths", replace(again.paths, cache=tmp_path))
    assert run(workshop.request(), again).lora.sha256 == uninterrupted[1].lora.sha256
    assert sum("is damaged; it was renamed to" in text for text in again.told()) == 2


def test_a_density_with_a_hole_is_warned_of_and_shown_in_both_characters(workshop):
    warnings = {}
    for name in ("chroma", "quadratic_tail_legacy"):
        host = workshop.host()
        run(workshop.request(steps=1, sigma_density=name), host)
        warnings[name] = [event.text for event in host.all(Notice) if event.level == "warning"]
        (levels,) = (event for event in host.all(Notice) if event.text.startswith("noise levels (sigma) in training"))
        assert levels.ascii.isascii() and len(levels.ascii.splitlines()) == len(levels.text.splitlines())
    assert not any("sigma" in text for text in warnings["chroma"])
    (warning,) = (text for text in warnings["quadratic_tail_legacy"] if "sigma" in text)
    assert warning.startswith("quadratic_tail_legacy never trains sigma in [0.25, 0.75)")


@pytest.mark.slow
def test_a_cancel_between_a_checkpoint_and_its_pictures_loses_no_picture(workshop):
    settings = ValidationConfig(prompts="a cat", steps=1, cfg=1.0, resolutions="32x32")
    request = workshop.request(settings, validate_every=2, steps=4)
    whole = workshop.host()
    run(request, whole)
    host = workshop.host()
    object.__setattr__(host, "is_cancelled", lambda: bool(host.all(CheckpointSaved)))
    with pytest.raises(Cancelled):
        run(request, host)
    object.__setattr__(host, "is_cancelled", lambda: False)
    run(request, host)
    drawn = {path.name: path.read_bytes() for path in (host.run_folder / "validation").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (whole.run_folder / "validation").iterdir()}
    assert len([name for name in drawn if name.endswith(".png")]) == 3


@pytest.mark.parametrize(
    "change",
    ["nothing", *(pytest.param(change, marks=pytest.mark.slow) for change in ("a damaged file", "another seed"))],
)
def test_a_resumed_run_takes_the_base_models_images_from_its_folder(workshop, monkeypatch, change):
    settings = ValidationConfig(prompts="a cat\na dog", steps=1, cfg=1.0, resolutions="32x32, 48x32")
    strengths, draw = [], validation_module.draw_pictures

    def count(settings, family, transformer, *more, **values):
        layer = next(module for module in transformer.modules() if isinstance(module, AdapterLayer))
        strengths.append(layer.strength)
        return draw(settings, family, transformer, *more, **values)

    monkeypatch.setattr(validation_module, "draw_pictures", count)
    host = workshop.host().cancelling_at(1)
    with pytest.raises(Cancelled):
        run(workshop.request(settings, steps=2, checkpoint_every=1), host)
    folder = host.run_folder / "validation"
    grids = {path.name: path.read_bytes() for path in folder.glob("step-000000-*")}
    assert len(grids) == 2
    for path in folder.glob("step-000000-*"):
        path.write_bytes(b"damaged")
    if change == "a damaged file":
        data = bytearray((folder / "base.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "base.safetensors").write_bytes(data)
    object.__setattr__(host, "cancel_at", 0)
    again = replace(settings, seed=1) if change == "another seed" else settings
    run(workshop.request(again, steps=2, checkpoint_every=1), host)
    assert strengths == ([0.0, 1.0] if change == "nothing" else [0.0, 0.0, 1.0])
    now = {path.name: path.read_bytes() for path in folder.glob("step-000000-*")}
    assert (now == grids) == (change != "another seed")


def test_bad_steps_are_skipped_up_to_the_number_allowed(workshop, monkeypatch):
    monkeypatch.setattr(loop_module, "velocity_loss", poisoned(loop_module.velocity_loss, at=3))
    host = workshop.host()
    result = run(workshop.request(skip_bad_steps=1, checkpoint_every=1, keep_checkpoints=9), host)
    assert [str(loss) == "nan" for loss in result.losses] == [False, False, True, False, False, False]
    assert result.report["loss"][2] is None and result.report["skipped_steps"] == 1
    assert [event.step for event in host.all(StepReport)] == [1, 2, 4, 5, 6]
    assert any(
        "step 3 was skipped: its loss or gradient is not finite; the batch was" in text
        and "(1 of at most 1 skipped)" in text
        for text in host.told()
    )
    json.loads((host.run_folder / "report.json").read_text("utf-8"))
    files = [host.run_folder / "checkpoints" / f"step-00000{i}" / "adapter.safetensors" for i in (2, 3, 4)]
    two, three, four = map(load_file, files)
    assert all(torch.equal(two[name], three[name]) for name in two)  # the skipped step moved nothing
    assert not all(torch.equal(three[name], four[name]) for name in two)


def test_one_bad_step_too_many_ends_it(workshop, monkeypatch):
    loss = loop_module.velocity_loss
    monkeypatch.setattr(loop_module, "velocity_loss", poisoned(poisoned(loss, at=4), at=3))
    with pytest.raises(UserError, match=r"step 4 gave loss nan .*, after 1 skipped steps; the batch was"):
        run(workshop.request(skip_bad_steps=1), workshop.host())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "every", "told"),
    [
        ("gradient", 1, "step 4 gave loss .* and gradient norm nan, which are not finite"),
        ("weight", 1, r"1 of 68 weights are not finite after step 4, such as .*; this state is not saved"),
        ("weight", 3, "step 5 gave loss .*Weights are not finite; the last checkpoint is intact"),
    ],
)
def test_a_bad_gradient_or_weight_is_met_before_it_spreads(workshop, monkeypatch, place, every, told):
    """NaN in one gradient, with a finite loss; infinity in one weight, whatever put it there."""
    micro_loss = loop_module.micro_loss
    calls = 0

    def spoil(run_, micro, fetch):
        nonlocal calls
        calls += 1
        loss = micro_loss(run_, micro, fetch)
        if calls == 4 and place == "gradient":
            run_.parameters[1].register_hook(lambda gradient: gradient * float("nan"))
        if calls == 4 and place == "weight":
            step = run_.optimizer.step

            def step_and_spoil():
                step()
                run_.parameters[1].data.fill_(float("inf"))
                run_.optimizer.step = step

            run_.optimizer.step = step_and_spoil
        return loss

    monkeypatch.setattr(loop_module, "micro_loss", spoil)
    host = workshop.host()
    with pytest.raises(UserError, match=told):
        run(workshop.request(checkpoint_every=every, skip_bad_steps=5 * (place == "weight")), host)
    assert all(
        t.isfinite().all()
        for f in host.run_folder.glob("checkpoints/*/adapter.safetensors")
        for t in load_file(f).values()
    )
    monkeypatch.undo()
    whole = run(workshop.request(checkpoint_every=every), workshop.host())
    assert run(workshop.request(checkpoint_every=every), host).losses == whole.losses


def test_the_best_on_held_out_images_is_kept_and_saved(workshop):
    host = workshop.host()
    result = run(
        workshop.request(holdout=0.25, steps=8, checkpoint_every=1, keep_checkpoints=1, learning_rate=0.3), host
    )
    best = result.report["best"]
    told = {
        int(text.split()[1].rstrip(":")): float(text.split()[6])
        for text in host.told()
        if ": loss on held-out images" in text
    }
    assert (
        len(told) == 8
        and best["step"] == min(told, key=lambda step: told[step])
        and result.report["eval_loss"]["images"] == "held out"
    )
    assert f"step-{best['step']:06}" in host.checkpoints and "step-000008" in host.checkpoints
    saved = host.paths.output / "loras" / "tiny-best.safetensors"
    assert best["lora"] == str(saved) and sha256_of(saved) == best["sha256"]
    adapter = load_file(host.run_folder / "checkpoints" / f"step-{best['step']:06}" / "adapter.safetensors")
    tensors = load_file(saved)
    assert all(torch.equal(tensors[f"transformer.{name}.weight"], tensor) for name, tensor in adapter.items())
