"""Names of layers without torch: those that the models have."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.adapters.layer import AdapterLayer
from chroma_trainer.trainer_core.config.adapter import KIND_RULES
from chroma_trainer.trainer_core.models.lora_targets import CHROMA, FLUX
from chroma_trainer.trainer_core.registry import load, names
from torch import nn


def linears_of(family, model) -> set[str]:
    transformer = family.empty_transformer(model)
    return {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("name", names("family"))
def test_they_are_the_models_own(name, request):
    model = request.getfixturevalue(f"tiny_{name}_model")
    told = load("linears", name).names(model)
    found = linears_of(load("family", name)(), model)
    frozen = {layer for layer in found if layer.startswith(("distilled_guidance_layer", "nerf_"))}
    assert set(told) == found - frozen and len(set(told)) == len(told)


@pytest.mark.parametrize("name", names("family"))
def test_those_of_kind_full_are_all_that_have_parameters(name, request):
    model = request.getfixturevalue(f"tiny_{name}_model")
    layers = load("linears", name).names(model, is_full=True)
    parts = load("family", name)().empty_transformer(model).named_modules()
    own = {name for name, part in parts if next(part.parameters(recurse=False), None) is not None}
    absent = set(layers) - own
    assert own <= set(layers) and len(set(layers)) == len(layers)
    assert all(layer.startswith("nerf_final_layer") for layer in absent)  # a model has one of two heads


@pytest.mark.parametrize(("linears", "fixture"), [(CHROMA, "tiny_chroma"), (FLUX, "tiny_flux")])
def test_a_single_file_says_as_much(linears, fixture, request, tiny_model, tmp_path):
    from dataclasses import replace

    folder = request.getfixturevalue(fixture) / "transformer"
    file = tmp_path / "one.safetensors"
    file.write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    whole = linears.names(replace(tiny_model, repo=str(folder.parent)))
    assert linears.names(replace(tiny_model, transformer_file=str(file), repo="")) == whole


def test_a_repository_that_is_not_here_is_taken_for_the_released_model(tiny_model):
    from dataclasses import replace

    told = CHROMA.names(replace(tiny_model, repo="owner/name"))
    assert told is not None
    assert "transformer_blocks.18.attn.to_q" in told and "single_transformer_blocks.37.proj_out" in told
    assert CHROMA.names(replace(tiny_model, repo="/nowhere/at/all")) is None
    assert CHROMA.names(replace(tiny_model, transformer_file=__file__)) is None


def test_every_kind_has_a_rule_and_obeys_it():
    assert set(KIND_RULES) == set(names("adapter"))
    for name, rule in KIND_RULES.items():
        layer: type[AdapterLayer] = load("adapter", name)
        assert (layer.inits, layer.formats) == (rule.inits, rule.formats)
