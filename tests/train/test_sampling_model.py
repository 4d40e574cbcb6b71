"""Validation images are sampled with another model than the trained one, as Flash samples for a LoRA of HD."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chroma_trainer.nodes.validate_sampler import SPEC
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.serialize import to_record
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.planner.memory_plan import GB, Machine, bytes_to_reserve
from chroma_trainer.trainer_core.setup.preflight import problems_of
from chroma_trainer.trainer_core.storage.stored_names import key_text
from chroma_trainer.trainer_core.train import run as run_module
from chroma_trainer.trainer_core.train.planning import plan_request
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.validation.sample_images import draw_grids
from diffusers import ChromaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import write_tiny_chroma

SETTINGS = {"prompts": "cat", "resolutions": "32x32", "steps": 2, "cfg": 1.0, "lora_strength": "1.0"}


@pytest.fixture(scope="module")
def flash(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flash") / "flash"
    write_tiny_chroma(folder, seed=8)
    return replace(workshop.model, repo=str(folder), flavour="flash")


def images_of(host) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in (host.run_folder / "validation").glob("*.png")}


@pytest.fixture(scope="module")
def sampled(workshop, flash):
    """A run whose images Flash samples, its host and its request."""
    request = workshop.request(
        ValidationConfig(**SETTINGS, sampling_model=flash), validate_every=2, steps=4, checkpoint_every=0
    )
    host = workshop.host()
    return request, host, run(request, host)


def test_the_training_is_the_same(workshop, sampled):
    request, host, result = sampled
    own_host = workshop.host()
    own = run(replace(request, validation=replace(request.validation, sampling_model=None)), own_host)
    assert own.losses == result.losses
    tensors, others = load_file(own.lora.path), load_file(result.lora.path)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
    own_images, images = images_of(own_host), images_of(host)
    assert own_images.keys() == images.keys() and len(images) == 3  # before, at step 2, and at the end
    assert all(own_images[name] != images[name] for name in images)


def test_the_images_are_those_that_the_file_makes_with_the_other_model(workshop, sampled, flash):
    request, host, result = sampled
    _, _, (base, with_lora), _ = SPEC.run(SPEC.inputs(**SETTINGS, lora=result.lora, model=flash), workshop.host())
    _, _, again, _ = SPEC.run(SPEC.inputs(**SETTINGS, lora=result.lora, sampling_model=flash), workshop.host())
    assert torch.equal(base, again[0]) and torch.equal(with_lora, again[1]) and not torch.equal(base, with_lora)
    pixels = [(image[0].numpy() * 255).round().astype(np.uint8) for image in (base, with_lora)]
    columns = [("base", {(32, 32): [pixels[0]]}), ("LoRA 1", {(32, 32): [pixels[1]]})]
    (grid,) = draw_grids(columns, request.validation, "step 4").values()
    assert grid.tobytes() == images_of(host)["step-000004-32x32.png"]


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_images(workshop, sampled):
    request, whole, result = sampled
    host = workshop.host().cancelling_at(1)
    with pytest.raises(Cancelled):
        run(request, host)
    resumed = run(request, host.cancelling_at(0))
    assert resumed.lora.sha256 == result.lora.sha256 and images_of(host) == images_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{"model_offload": True}, {"group_offload": "block", "blocks_per_group": 1}])
def test_the_bytes_do_not_depend_on_where_the_models_are(workshop, sampled, monkeypatch, memory):
    request, whole, result = sampled
    plan_memory = run_module.memory_with

    def alone(*arguments):
        plan, estimate = plan_memory(*arguments)
        assert estimate
        return plan, replace(estimate, is_sampled_alone="group_offload" not in memory)

    monkeypatch.setattr(run_module, "memory_with", alone)
    host = workshop.host()
    again = run(replace(request, memory=MemoryConfig(**memory)), host)
    assert again.losses == result.losses and images_of(host) == images_of(whole)


@pytest.mark.slow
def test_the_plan_counts_both_models(workshop, flash):
    def plan(gigabytes: float, **values):
        settings = ValidationConfig(**SETTINGS, **values)
        machine = Machine("card", int(gigabytes * GB), 64 * GB)
        return plan_request(workshop.request(settings), workshop.host(), machine)[0]

    def validating(estimate) -> tuple[int, int]:
        (phase,) = (phase for phase in estimate.phases if phase.name == "validate")
        return phase.device, phase.ram

    own, beside = plan(10), plan(10, sampling_model=flash)
    weights = sum(part.numel() * 4 for part in ChromaFamily().empty_transformer(flash).parameters())
    assert not beside.is_sampled_alone and "images by chroma flash" in beside.settings
    assert 0.95 * weights < validating(beside)[0] - validating(own)[0] < 1.3 * weights
    assert [phase.device for phase in own.phases[:4]] == [phase.device for phase in beside.phases[:4]]
    small = plan((bytes_to_reserve(validating(beside)[0]) - 1) / GB, sampling_model=flash)
    assert small.is_sampled_alone and validating(small)[0] < validating(beside)[0] - 0.9 * weights
    assert validating(small)[1] > validating(beside)[1] + 0.9 * weights


def test_what_can_not_sample_is_refused_by_name(workshop, flash, tiny_flux_model, tmp_path):
    def faults(model, **values) -> list[str]:
        request = replace(workshop.request(ValidationConfig(**SETTINGS, sampling_model=model)), **values)
        return [p.message for p in problems_of(request, workshop.host()) if p.field == "sampling_model"]

    assert faults(flash) == []
    (family,) = faults(tiny_flux_model)
    assert "is Flux dev, and Chroma tiny is trained" in family
    (full,) = faults(flash, adapter=AdapterConfig(kind="full"))
    assert "kind full trains the base model's own weights" in full
    (package,) = faults(replace(flash, quantization=QuantizationConfig(level="int8-torchao")))
    assert "torchao is not installed" in package


def test_other_layers_are_refused_before_anything_is_loaded(workshop, flash, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(flash.repo, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    shutil.rmtree(folder / "transformer")
    config = {name: value for name, value in config.items() if not name.startswith("_")} | {"num_single_layers": 1}
    small: Any = ChromaTransformer2DModel.from_config(config)
    small.save_pretrained(folder / "transformer")
    request = workshop.request(ValidationConfig(**SETTINGS, sampling_model=replace(flash, repo=str(folder))))
    text = "Chroma flash has other layers than Chroma tiny.*5 of 34 trained layers differ, such as single_transformer_"
    with pytest.raises(UserError, match=text):
        plan_run(request, workshop.host())
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="sampling_model: its "):
        plan_run(request, workshop.host())


def test_a_run_is_recorded_as_before_without_it(sampled):
    request, _, _ = sampled
    assert "sampling_model" not in to_record(ValidationConfig())
    assert "sampling_model" not in key_text(ValidationConfig())
    assert to_record(request.validation)["sampling_model"]["repo"] == "flash"  # no path of this machine
