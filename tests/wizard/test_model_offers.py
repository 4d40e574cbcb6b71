"""Which models are offered: files are told apart by their headers, whatever their names are."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.paths import local_paths
from chroma_trainer.trainer_core.wizard import new_command
from chroma_trainer.trainer_core.wizard.card import Card
from chroma_trainer.trainer_core.wizard.choices import FAMILIES
from chroma_trainer.trainer_core.wizard.model_offers import Offer, find_files, offer_named, offers
from chroma_trainer.trainer_core.workflow.read import read_workflow


@pytest.fixture
def models(tmp_path: Path, tiny_chroma: Path, tiny_flux: Path) -> Path:
    """ComfyUI's models folder with single files under names that say nothing."""
    folder = tmp_path / "ComfyUI" / "models"
    transformer = "diffusion_pytorch_model.safetensors"
    for source, target in (
        (tiny_chroma / "transformer" / transformer, "diffusion_models/one.safetensors"),
        (tiny_flux / "transformer" / transformer, "diffusion_models/sub/two.safetensors"),
        (tiny_chroma / "vae" / transformer, "vae/a.safetensors"),
        (tiny_chroma / "text_encoder" / "model.safetensors", "text_encoders/b.safetensors"),
        (tiny_flux / "text_encoder" / "model.safetensors", "text_encoders/c.safetensors"),
        (tiny_chroma / "vae" / transformer, "text_encoders/misplaced.safetensors"),
    ):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / target)
    shutil.copy(tiny_chroma / "vae" / "config.json", folder / "vae" / "config.json")
    (folder / "diffusion_models" / "damaged.safetensors").write_bytes(b"\xff" * 40)
    return folder


def offered(models: Path) -> list[Offer]:
    paths = local_paths([models], models / "out")
    return offers(paths, find_files(paths))


def test_files_are_told_by_their_headers(models: Path):
    chroma, flux, nano = offered(models)
    assert (chroma.key, chroma.family, chroma.flavour) == ("one.safetensors", "chroma", "hd")
    assert chroma.files == {
        "diffusion_model": "one.safetensors", "text_encoder": "b.safetensors", "vae": "a.safetensors",
    }  # fmt: skip
    assert (flux.key, flux.family) == ("sub/two.safetensors", "flux") and flux.files["clip"] == "c.safetensors"
    assert flux.flavour == "dev" and flux.files["t5"] == "b.safetensors"
    assert "download" not in chroma.text + flux.text and nano.is_tiny


def test_a_radiance_is_offered_without_a_vae(models: Path, tiny_radiance: Path):
    shutil.copy(tiny_radiance, models / "diffusion_models" / "pixels.safetensors")
    offer = next(offer for offer in offered(models) if offer.key == "pixels.safetensors")
    assert offer.files == {"diffusion_model": "pixels.safetensors", "text_encoder": "b.safetensors"}
    assert (offer.family, offer.flavour, offer.text) == ("chroma", "hd", "Chroma Radiance, with b.safetensors")


def test_missing_parts_are_named_with_their_size(models: Path):
    (models / "text_encoders" / "b.safetensors").unlink()
    chroma, flux, _ = offered(models)
    assert "; T5 from lodestones/Chroma1-HD: a download of about 10 GB" in chroma.text
    assert "text_encoder" not in chroma.files and "t5" not in flux.files


def test_released_models_stand_for_families_without_files(models: Path):
    (models / "diffusion_models" / "one.safetensors").unlink()
    assert [offer.key for offer in offered(models)] == ["sub/two.safetensors", "hd", "nano"]
    shutil.rmtree(models / "diffusion_models")
    hd, krea, nano = offered(models)
    assert "a download of about 27 GB" in hd.text and "accepted its license" in krea.text and nano.key == "nano"


def test_kontext_is_not_offered(models: Path):
    (models / "diffusion_models" / "sub" / "two.safetensors").rename(
        models / "diffusion_models" / "flux-Kontext.safetensors"
    )
    paths = local_paths([models], models / "out")
    ((name, fault),) = find_files(paths).unusable
    assert name == "flux-Kontext.safetensors" and "pairs of images" in fault
    assert [offer.key for offer in offered(models)] == ["one.safetensors", "krea", "nano"]


def test_names_of_files_flavours_and_families(models: Path):
    shown = offered(models)
    for text, key in (
        ("two.safetensors", "sub/two.safetensors"), ("SUB\\two.safetensors", "sub/two.safetensors"), ("flux", "sub/two.safetensors"),
        ("base", "base"), ("schnell", "schnell"), ("nano", "nano"),
    ):  # fmt: skip
        assert offer_named(text, shown, FAMILIES).key == key
    with pytest.raises(UserError, match=r"did you mean 'one\.safetensors'"):
        offer_named("onne.safetensors", shown, FAMILIES)
    with pytest.raises(UserError, match=r"is not one of one\.safetensors, hd, base, flash"):
        offer_named("schnell", shown[:1], ("chroma",))


@pytest.mark.slow
def test_a_workflow_of_files_is_checked_and_trained(
    models: Path, tiny_chroma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_chroma / "tokenizer", models / "text_encoders" / "tokenizer")
    monkeypatch.chdir(models.parent)  # ComfyUI's own folder: its models are found
    monkeypatch.setattr(new_command, "detect_card", Card)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["new", "--yes", "--images", "neon-emoji", "--vram", "0"]) == 0
    printed = capsys.readouterr().out
    assert "model: one.safetensors" in printed and f"run workflow.json --models {models}" in printed
    node = next(n for n in read_workflow(Path("workflow.json"), schemas()).nodes.values() if n.type == "LoadChroma")
    assert node.inputs["diffusion_model"] == "one.safetensors" and node.inputs["text_encoder"] == "b.safetensors"
    values = ["LoRATrainer.steps=2", "LoRATrainer.warmup_steps=0", "LoRATrainer.eval_images=0", "ValidateSampler.steps=1",
              "DatasetBackend.resolution=32", "ValidateSampler.resolutions=32x32", "ValidateSampler.sampling=as set",
              "LoadChroma.dtype=fp32"]  # fmt: skip
    settings = [word for value in values for word in ("--set", value)]
    assert main(["run", "workflow.json", "--models", str(models), *settings, "--device", "cpu"]) == 0
    assert Path("output/loras/neon-emoji.safetensors").is_file()
