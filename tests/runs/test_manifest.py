"""A run that goes on with other settings, pictures, captions or weights says exactly what changed, and mixes nothing unasked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.train.run import run
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def own(workshop, tmp_path):
    """A request on pictures of the test's own."""
    folder = tmp_path / "pictures"
    shutil.copytree(workshop.root / "pictures", folder)
    part = replace(workshop.dataset.parts[0], folder=str(folder))

    def request(**values):
        return replace(workshop.request(**values), dataset=DatasetConfig(parts=(part,), roots=(str(folder),)))

    return folder, request


def cancelled(workshop, request):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    return host.cancelling_at(0)


def edited_picture(folder: Path) -> None:
    Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "1.png")


def edited_caption(folder: Path) -> None:
    (folder / "2.txt").write_text("another", "utf-8")


def removed(folder: Path) -> None:
    (folder / "0.png").unlink()


def added(folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / "new.png")
    shutil.copy(folder / "0.txt", folder / "new.txt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edited_picture, "image 0/1.png has changed"),
        (edited_caption, "caption of 0/2.png was edited"),
        (removed, "image 0/0.png is gone"),
        (added, "image 0/new.png is new"),
    ],
)
def test_a_changed_dataset_is_named_and_asked_about(workshop, own, change, told):
    folder, request = own
    host = cancelled(workshop, request())
    change(folder)
    with pytest.raises(UserError) as caught:
        run(request(), host)
    assert str(caught.value).startswith(
        f"on_change: the run {host.run_folder.name} was stopped at step 3 of 6, and since then: {told}."
    )
    assert "set on_change to anew; to resume from its newest checkpoint with the new settings, set it to adopt" in str(
        caught.value
    )
    (only,) = (host.paths.output / "chroma_trainer").iterdir()  # nothing was begun
    assert only.name == host.run_folder.name


def test_changed_settings_are_named_and_asked_about(workshop):
    host = cancelled(workshop, workshop.request())
    with pytest.raises(UserError) as caught:
        run(workshop.request(learning_rate=0.5, sigma_density="uniform", validate_every=1, checkpoint_every=3), host)
    told = 'training.learning_rate was 0.01, is 0.5; training.sigma_density was "chroma", is "uniform". To start'
    assert told in str(caught.value)


def test_changed_weights_are_named(workshop, tmp_path):
    host = cancelled(workshop, workshop.request())
    shutil.copytree(workshop.model.repo, tmp_path / "other")
    (file,) = (tmp_path / "other" / "transformer").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights of the transformer have changed"):
        run(workshop.request(model=replace(workshop.model, repo=str(tmp_path / "other"))), host)


@pytest.mark.slow
def test_anew_begins_anew_beside_the_old_run(workshop):
    host = cancelled(workshop, workshop.request())
    result = run(workshop.request(learning_rate=0.02, on_change="anew"), host)
    assert result.report["resumed_from"] == 0
    assert len(list((host.paths.output / "chroma_trainer").iterdir())) == 2
    alone = run(workshop.request(learning_rate=0.02), workshop.host())
    assert alone.lora.sha256 != result.lora.sha256 or alone.losses == result.losses
    assert alone.losses == result.losses


@pytest.mark.slow
def test_adopt_goes_on_from_the_old_checkpoint_and_says_so(workshop, plain_run):
    host = cancelled(workshop, workshop.request())
    result = run(workshop.request(learning_rate=0.02, on_change="adopt"), host)
    assert result.report["resumed_from"] == 3 and len(result.losses) == 6
    assert any(
        "training.learning_rate was 0.01, is 0.02; the run resumes from its step-000003, as on_change says" in t
        for t in host.told()
    )
    whole = plain_run[1]
    assert result.losses[:3] == whole.losses[:3] and result.losses[4:] != whole.losses[4:]


def test_what_can_not_be_adopted_is_refused_with_the_reason(workshop):
    host = cancelled(workshop, workshop.request())
    with pytest.raises(UserError, match=r"on_change: .*weights have another shape or name"):
        run(workshop.request(rank=2, on_change="adopt"), host)


def test_a_finished_run_asks_nothing(workshop):
    host = workshop.host()
    run(workshop.request(steps=2), host)
    assert run(workshop.request(steps=2, learning_rate=0.02), host).report["resumed_from"] == 0


def test_other_versions_are_told(workshop, monkeypatch):
    host = cancelled(workshop, workshop.request())
    from chroma_trainer.trainer_core.train.results import metadata

    monkeypatch.setattr(metadata, "VERSION", "9.9")
    run(workshop.request(), host)
    assert any(
        "started with other versions (chroma-trainer 0.1.0 -> 9.9): it continues" in text for text in host.told()
    )
