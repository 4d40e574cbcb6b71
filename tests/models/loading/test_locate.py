"""Where the parts are looked for, and what is said when they are nowhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading import locate as sources
from chroma_trainer.trainer_core.models.loading.locate import find_part, weight_files
from chroma_trainer.trainer_core.models.text.tokenizer import find_t5_tokenizer

FAMILY = ChromaFamily()
HUB_ID = "someone/Chroma"


@pytest.fixture
def hub_cache(tiny_chroma, tmp_path, monkeypatch) -> Path:
    """A hub cache that holds the tiny model as someone/Chroma, without a network."""
    from huggingface_hub import constants

    root = tmp_path / "hub" / "models--someone--Chroma"
    shutil.copytree(tiny_chroma, root / "snapshots" / ("0" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root / "snapshots" / ("0" * 40)


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_a_local_folder(tiny_model, tiny_chroma):
    part = find_part(tiny_model, "transformer")
    assert part.files == (tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert part.config["num_layers"] == 2 and not part.is_single


def test_the_hubs_cache_offline(tiny_model, hub_cache):
    model = replace(tiny_model, repo=HUB_ID)
    assert FAMILY.problems(model) == []
    assert find_part(model, "vae").files[0].parent == hub_cache / "vae"
    assert find_t5_tokenizer(model) == hub_cache / "tokenizer" / "tokenizer.json"
    assert FAMILY.identity(model, "transformer") == FAMILY.identity(tiny_model, "transformer")


def test_a_hub_id_that_is_not_cached_and_no_network(tiny_model, hub_cache):
    model = replace(tiny_model, repo="someone/Else")
    found = [str(problem) for problem in FAMILY.problems(model)]
    assert found[0] == (
        "repo: someone/Else/transformer is not in the Hub's cache, and HF_HUB_OFFLINE prevents the download; "
        "unset it, or set a local diffusers folder or single files"
    )
    assert len(found) == 4
    text = message(lambda: find_part(model, "transformer"))
    assert text.startswith("repo: someone/Else/transformer is not on this machine and could not be downloaded: ")
    assert "HF_HUB_OFFLINE" in text


def test_single_files_win_over_the_repo(tiny_model, tiny_chroma, tmp_path):
    file = tmp_path / "mine.safetensors"
    shutil.copy(tiny_chroma / "vae" / "diffusion_pytorch_model.safetensors", file)
    part = find_part(replace(tiny_model, vae_file=str(file)), "vae")
    assert part.files == (file,) and part.is_single and part.config == {}


def test_identity_does_not_know_paths_but_contents(tiny_model, tiny_chroma, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tiny_chroma, folder)
    copied = replace(tiny_model, repo=str(folder))
    parts = ("transformer", "text_encoder", "codec")
    assert [FAMILY.identity(copied, part) for part in parts] == [FAMILY.identity(tiny_model, part) for part in parts]
    assert len({FAMILY.identity(copied, part) for part in parts}) == 3
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert FAMILY.identity(copied, "codec") != FAMILY.identity(tiny_model, "codec")
    assert FAMILY.identity(copied, "transformer") == FAMILY.identity(tiny_model, "transformer")


def test_text_identity_knows_the_tokenizer_and_the_precision(tiny_model, tiny_chroma, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tiny_chroma, folder)
    copied = replace(tiny_model, repo=str(folder))
    before = FAMILY.identity(copied, "text_encoder")
    assert FAMILY.identity(replace(copied, dtype="bf16"), "text_encoder") != before
    (folder / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert FAMILY.identity(copied, "text_encoder") != before


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        ({"repo": "/nowhere"}, "repo: /nowhere has no folder 'transformer'; it must be a diffusers folder"),
        ({"repo": ""}, "repo: is empty, and there is no single file for the transformer; set one of them"),
        (
            {"vae_file": "/no.safetensors"},
            "vae_file: /no.safetensors does not exist; choose a .safetensors file, a diffusers folder or a Hub id",
        ),
        ({"dtype": "fp8"}, "dtype: 'fp8' is not one of bf16, fp16, fp32"),
    ],
)
def test_problems(tiny_model, change, message_part):
    assert message_part in [str(problem) for problem in FAMILY.problems(replace(tiny_model, **change))]


def test_all_problems_come_at_once(tiny_model, tiny_chroma):
    wrong = str(tiny_chroma / "vae" / "diffusion_pytorch_model.safetensors")
    model = replace(tiny_model, repo="", transformer_file=wrong, text_encoder_file="/no.safetensors")
    found = [str(problem) for problem in FAMILY.problems(model)]
    assert len(found) == 4
    assert found[0].startswith("diffusion_pytorch_model.safetensors: is not a Chroma transformer: none of its keys is ")
    assert (
        found[1]
        == "text_encoder_file: /no.safetensors does not exist; choose a .safetensors file, a diffusers folder or a Hub id"
    )
    assert found[2].startswith("repo: is empty, and there is no single file for the vae")
    assert found[3].startswith("text_encoder_file: T5's tokenizer was not found; put tokenizer.json or spiece.model")


def test_a_folder_of_pickles(tiny_model, tiny_chroma, tmp_path):
    folder = tmp_path / "pickles"
    shutil.copytree(tiny_chroma, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    text = message(lambda: find_part(replace(tiny_model, repo=str(folder)), "vae"))
    assert text.endswith("vae has no .safetensors file; pickle files (.bin) are not supported")


def test_broken_json_is_named(tiny_model, tiny_chroma, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_chroma, folder)
    (folder / "vae" / "config.json").write_text("{", encoding="utf-8")
    text = message(lambda: find_part(replace(tiny_model, repo=str(folder)), "vae"))
    assert text.startswith("config.json: is not readable JSON")


def test_variants_of_weight_files(tmp_path):
    assert weight_files(tmp_path) == ()
    (tmp_path / "model.fp16.safetensors").touch()
    assert weight_files(tmp_path) == (tmp_path / "model.fp16.safetensors",)
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(
    ("repo", "local"),
    [("lodestones/Chroma1-HD", False), ("/models/chroma", True), ("chroma", True), ("a/b/c", True)],
)
def test_hub_ids_and_folders(repo, local):
    assert sources.is_local(repo) is local
