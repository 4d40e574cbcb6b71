"""Flavours and LoRA files that contradict the model, found by file headers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.setup.model_check import contradictions
from chroma_trainer.trainer_core.setup.preflight import problems_of
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("guidance", "flavour", "message"),
    [
        (True, "dev", ""), (True, "krea", ""), (False, "schnell", ""), (False, "libreflux", ""),
        (True, "schnell", "has a guidance embedding, as dev and its finetunes; use krea, dev, kontext or fluxbooru"),
        (False, "dev", "has no guidance embedding, as schnell and its finetunes; use schnell or libreflux"),
    ],
)  # fmt: skip
def test_a_flavour_that_the_file_is_not_of(workshop, tiny_flux_model, tmp_path, guidance, flavour, message):
    keys = {"double_blocks.0.img_mod.lin.weight": torch.zeros(1)}
    if guidance:
        keys["model.diffusion_model.guidance_in.in_layer.weight"] = torch.zeros(1)
    save_file(keys, tmp_path / "flux.safetensors")
    model = replace(tiny_flux_model, flavour=flavour, transformer_file=str(tmp_path / "flux.safetensors"))
    problems = contradictions(workshop.request(model=model))
    assert [(p.field, p.message) for p in problems] == (
        [("flavour", f"is {flavour}, but flux.safetensors {message}")] if message else []
    )


def test_a_folder_says_what_it_is_in_its_config(workshop, tiny_flux_model):
    request = workshop.request(model=replace(tiny_flux_model, flavour="schnell"))
    assert [problem.field for problem in problems_of(request, workshop.host())] == ["flavour"]
    assert contradictions(workshop.request(model=tiny_flux_model)) == []


@pytest.mark.parametrize(
    ("metadata", "key", "is_refused"),
    [
        ({"modelspec.architecture": "chroma/lora"}, "transformer.a.lora_A.weight", True),
        ({"ss_base_model_version": "Chroma"}, "transformer.a.lora_A.weight", True),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "transformer.a.lora_A.weight", False),
        ({}, "transformer.a.lora_A.weight", False),
        ({}, "diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight", True),
    ],
)
@pytest.mark.parametrize("field", ["init_lora", "assistant"])
def test_a_lora_of_chroma_for_flux(workshop, tiny_flux_model, tmp_path, metadata, key, is_refused, field):
    file = tmp_path / "mine.safetensors"
    save_file({key: torch.zeros(1)}, file, metadata)
    request = workshop.request(model=tiny_flux_model)
    if field == "init_lora":
        request = replace(request, adapter=replace(request.adapter, init_lora=str(file)))
    else:
        options = replace(tiny_flux_model.flux, assistant_file=str(file))
        request = replace(request, model=replace(tiny_flux_model, flux=options))
    message = "mine.safetensors is a LoRA of Chroma, and the model is Flux dev; choose a LoRA of Flux"
    assert [(p.field, p.message) for p in contradictions(request)] == ([(field, message)] if is_refused else [])


def test_a_lora_of_flux_for_chroma(workshop, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file({"transformer.a.lora_A.weight": torch.zeros(1)}, file, {"modelspec.architecture": "flux-1-dev/lora"})
    request = workshop.request()
    (problem,) = contradictions(replace(request, adapter=replace(request.adapter, init_lora=str(file))))
    assert problem.message.startswith("mine.safetensors is a LoRA of Flux, and the model is Chroma")


@pytest.mark.parametrize("named", ["chroma", "radiance"])
@pytest.mark.parametrize("model", ["chroma", "radiance"])
def test_radiance_and_chroma_are_told_apart(workshop, tiny_radiance_model, tmp_path, named, model):
    file = tmp_path / "mine.safetensors"
    architecture = {"chroma": "chroma/lora", "radiance": "chroma-radiance/lora"}[named]
    save_file({"transformer.a.lora_A.weight": torch.zeros(1)}, file, {"modelspec.architecture": architecture})
    request = workshop.request(model=tiny_radiance_model if model == "radiance" else None)
    problems = contradictions(replace(request, adapter=replace(request.adapter, init_lora=str(file))))
    own = {"chroma": "Chroma tiny", "radiance": "Radiance"}[model]
    text = f"mine.safetensors is a LoRA of {named.title()}, and the model is {own}; choose a LoRA of {model.title()}"
    assert [problem.message for problem in problems] == ([] if named == model else [text])
