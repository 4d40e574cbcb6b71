"""A transformer alone, as a folder or on the Hub; everything else comes from the flavour's repository."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.nodes.load_chroma import SPEC as LOAD_CHROMA
from chroma_trainer.nodes.load_flux import SPEC as LOAD_FLUX
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading.locate import find_part, is_hub_id
from chroma_trainer.trainer_core.models.lora_targets import CHROMA

FAMILY = ChromaFamily()


@pytest.fixture
def hub(tiny_chroma, tmp_path, monkeypatch):
    """hub("owner/name", "folder") caches the tiny transformer there, as a download would."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cache(repo: str, folder: str) -> Path:
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        target = root / "snapshots" / ("0" * 40) / folder
        shutil.copytree(tiny_chroma / "transformer", target)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)
        return target

    return cache


def host_of(tmp_path) -> SinkHost:
    models = {kind: (tmp_path / kind,) for kind in ("diffusion_models", "diffusers")}
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path, models=models))


def check(tiny_model, source: str) -> None:
    """Compare a model that takes its transformer from the source with the whole model."""
    model = replace(tiny_model, transformer_file=source)
    assert FAMILY.problems(model) == []
    assert FAMILY.identity(model, "transformer") == FAMILY.identity(tiny_model, "transformer")
    assert CHROMA.num_blocks(model) == CHROMA.num_blocks(tiny_model)
    whole, alone = FAMILY.load_transformer(tiny_model), FAMILY.load_transformer(model)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), alone.parameters(), strict=True))
    empty = FAMILY.empty_transformer(model)
    assert [tuple(p.shape) for p in empty.parameters()] == [tuple(p.shape) for p in whole.parameters()]


@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_local_folder(tiny_model, tiny_chroma, tmp_path, folder):
    shutil.copytree(tiny_chroma / "transformer", tmp_path / "mine" / folder)
    check(tiny_model, str(tmp_path / "mine"))


@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_hub_id(tiny_model, hub, folder):
    hub("someone/Dev2Pro", folder)
    check(tiny_model, "someone/Dev2Pro")


def test_a_hub_id_that_is_not_there(tiny_model, hub):
    model = replace(tiny_model, transformer_file="someone/Nothing")
    (problem,) = FAMILY.problems(model)
    assert "someone/Nothing/transformer is not in the Hub's cache, and HF_HUB_OFFLINE" in problem.message
    with pytest.raises(UserError, match="could not be downloaded"):
        find_part(model, "transformer")


def test_a_folder_without_a_transformer(tiny_model, tmp_path):
    (problem,) = FAMILY.problems(replace(tiny_model, transformer_file=str(tmp_path)))
    assert problem.field == "transformer_file" and "has no transformer" in problem.message


def test_a_transformer_given_as_the_whole_model(tiny_model, tiny_chroma):
    (first, *_) = FAMILY.problems(replace(tiny_model, repo=str(tiny_chroma / "transformer")))
    assert first.message.endswith("this one holds a transformer alone: choose it as diffusion_model")


@pytest.mark.parametrize("kind", ["diffusion_models", "diffusers"])
def test_the_node_takes_folders_of_both_kinds(tiny_chroma, tmp_path, kind):
    shutil.copytree(tiny_chroma / "transformer", tmp_path / kind / "dev2pro")
    host = host_of(tmp_path)
    (model,) = LOAD_CHROMA.run(LOAD_CHROMA.inputs(flavour="hd", diffusion_model="dev2pro"), host)
    assert model.transformer_file == str(tmp_path / kind / "dev2pro") and model.repo == "lodestones/Chroma1-HD"
    assert host.paths.list_transformers() == ("dev2pro",)


def test_the_node_refuses_the_wrong_folder_by_what_it_is(tiny_flux, tmp_path):
    shutil.copytree(tiny_flux / "transformer", tmp_path / "diffusers" / "dev2pro")
    with pytest.raises(UserError) as caught:
        LOAD_CHROMA.run(LOAD_CHROMA.inputs(diffusion_model="dev2pro"), host_of(tmp_path))
    (problem,) = caught.value.problems
    assert problem.field == "diffusion_model" and "is a Flux.1 transformer, not a Chroma transformer" in problem.message


def test_the_node_takes_a_hub_id(tmp_path):
    (model,) = LOAD_FLUX.run(
        LOAD_FLUX.inputs(flavour="dev", diffusion_model="ashen0209/Flux-Dev2Pro"), host_of(tmp_path)
    )
    assert model.transformer_file == "ashen0209/Flux-Dev2Pro"
    with pytest.raises(UserError, match="is not in the diffusion_models folders"):
        LOAD_FLUX.run(LOAD_FLUX.inputs(diffusion_model="sub/gone.safetensors"), host_of(tmp_path))


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("ashen0209/Flux-Dev2Pro", True), ("a/b.c", True), ("a/b.safetensors", False), ("/a/b", False), ("a", False),
        ("a/b/c", False), ("C:/a", False), ("C:\\a\\b", False), ("", False), ("../b", False),
    ],
)  # fmt: skip
def test_ids(text, is_id):
    assert is_hub_id(text) == is_id
