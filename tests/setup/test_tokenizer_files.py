"""Single text encoder files without a tokenizer: said by check and plan, with the one thing to do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.nodes import lora_trainer
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma import family as chroma
from chroma_trainer.trainer_core.models.loading import locate
from chroma_trainer.trainer_core.setup import tokenizer_files
from chroma_trainer.trainer_core.setup.tokenizer_files import tokenizer_problems
from chroma_trainer.trainer_core.train.planning import plan_request

REPO = "lodestones/Chroma1-HD"


@pytest.fixture
def single(tiny_model, tiny_chroma, tmp_path):
    """Three single files and a repository on the Hub, as LoadChroma gives them outside of ComfyUI."""
    files = {}
    for part, folder in (("transformer", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae")):
        (tmp_path / folder).mkdir()
        (weights,) = (tiny_chroma / part).glob("*.safetensors")
        files[part] = str(shutil.copy(weights, tmp_path / folder / f"tiny_{part}.safetensors"))
        shutil.copy(tiny_chroma / part / "config.json", tmp_path / folder / "config.json")
    return replace(
        tiny_model, repo=REPO, transformer_file=files["transformer"], text_encoder_file=files["text_encoder"],
        vae_file=files["vae"],
    )  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    """Online by its settings, but nothing can be reached."""
    for module in (tokenizer_files, chroma):
        monkeypatch.setattr(module, "is_offline", lambda: False)
    monkeypatch.setattr(locate, "find_cached", lambda *_: None)

    def fails(repo: str, part: str) -> Path:
        raise UserError.at("repo", f"{repo}/{part} is unreachable")

    monkeypatch.setattr(tokenizer_files, "download", fails)


def test_check_and_plan_say_it_with_what_to_do(single, workshop, no_network):
    request = workshop.request(model=single)
    with pytest.raises(UserError) as caught:
        plan_request(request, workshop.host())
    (problem,) = caught.value.problems
    folder = Path(single.text_encoder_file).parent / "tokenizer"
    assert problem.field == "text_encoder_file" and str(problem).endswith(f"into {folder}")
    assert "beside tiny_text_encoder.safetensors" in problem.message and f"of {REPO}" in problem.message
    inputs = lora_trainer.Inputs(model=single, dataset=request.dataset, **vars(request.training))
    assert lora_trainer.preflight(inputs, workshop.host()) == [problem]


@pytest.mark.parametrize(
    "where", ["tokenizer", "", "tiny_text_encoder_tokenizer", "../comfy/text_encoders/t5_tokenizer"]
)
def test_done_as_told_all_is_well(single, tiny_chroma, no_network, where):
    assert len(tokenizer_problems(single)) == 1
    folder = Path(single.text_encoder_file).parent / where
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny_chroma / "tokenizer" / "tokenizer.json", folder)
    assert tokenizer_problems(single) == []


def test_it_is_fetched_where_the_repository_can_be_reached(single, tiny_chroma, no_network, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        tokenizer_files, "download", lambda repo, part: (fetched.append((repo, part)), tiny_chroma / part)[1]
    )
    assert tokenizer_problems(single) == [] and fetched == [(REPO, "tokenizer")]


def test_it_is_said_once_where_the_family_looks_too(single, workshop):
    """HF_HUB_OFFLINE is set in tests: the family looks for it itself."""
    with pytest.raises(UserError) as caught:
        plan_request(workshop.request(model=single), workshop.host())
    assert ["okenizer" in str(problem) for problem in caught.value.problems] == [True]
    assert "HF_HUB_OFFLINE" in tokenizer_problems(single)[0].message


def test_a_model_folder_has_its_own(tiny_model, single, tiny_chroma):
    assert tokenizer_problems(tiny_model) == []
    assert tokenizer_problems(replace(single, repo=str(tiny_chroma))) == []


def test_the_tokenizer_of_t5_is_none_of_clip(tiny_flux_model, tiny_chroma, tmp_path, no_network):
    """ComfyUI's text_encoders folder holds the files of both encoders."""
    clip = tmp_path / "clip_l.safetensors"
    clip.touch()
    shutil.copy(tiny_chroma / "tokenizer" / "tokenizer.json", tmp_path)
    assert tiny_flux_model.flux is not None
    model = replace(tiny_flux_model, repo=REPO, flux=replace(tiny_flux_model.flux, clip_file=str(clip)))
    (problem,) = tokenizer_problems(model)
    assert problem.field == "clip_file" and "CLIP's tokenizer is missing" in problem.message
