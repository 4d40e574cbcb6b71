"""Runs whose pictures are weighed by masks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.nodes.dataset_backend import SPEC, Inputs, fingerprint
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import Paths, PhaseStarted, SinkHost
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.eval_loss import eval_loss
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop as loop_module
from chroma_trainer.trainer_core.train.step.batch import Batch
from PIL import Image

from tests.narrowing import present
from tests.workshop import EVALUATED


@pytest.fixture
def own(workshop, tmp_path):
    """The workshop's pictures twice, once with masks whose left half is white: their folder, and what makes requests."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in Path(workshop.dataset.roots[0]).glob("*.png"):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / path.name)

    def request(plain=True, root=folder, on_broken="skip", unmasked_weight=0.0, **values):
        (part,), (pictures,) = workshop.dataset.parts, workshop.dataset.roots
        masked = replace(part, masks=str(root), unmasked_weight=unmasked_weight, on_broken=on_broken)
        both = DatasetConfig((part, masked), (pictures, pictures), ("", ""), ("", str(root)))
        dataset = both if plain else DatasetConfig((masked,), (pictures,), ("",), (str(root),))
        return replace(workshop.request(**values), dataset=dataset)

    return folder, request


def built(workshop, request):
    host = workshop.host()
    return build_run(plan_run(request, host), host, PhaseTimer())


def test_no_gradient_from_under_black(workshop, own, monkeypatch):
    _, request = own
    made = built(workshop, request(plain=False, caption_dropout=0.0))
    make, seen = loop_module.make_batch, []

    def spoilt(run_, micro):
        batch = make(run_, micro)
        assert batch.weight is not None  # the masks'
        assert batch.weight.shape == (len(batch.x_sigma), 1, *batch.x_sigma.shape[2:])
        seen.append((batch.weight == 0).float().mean().item())
        return replace(batch, velocity=torch.where(batch.weight == 0, 1e3, batch.velocity))

    def learnt():
        made.optimizer.zero_grad()
        loss = loop_module.micro_loss(made, 0)
        loss.backward()
        return loss.item(), [present(parameter.grad) for parameter in made.parameters]

    loss, gradients = learnt()
    monkeypatch.setattr(loop_module, "make_batch", spoilt)
    again, same = learnt()
    assert again == loss > 0 and 0 < seen[0] < 1
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    assert any(gradient.any() for gradient in gradients)
    monkeypatch.setattr(loop_module, "make_batch", lambda run_, micro: replace(spoilt(run_, micro), weight=None))
    assert learnt()[0] > 100 * loss


def test_evaluation_weighs_alike(workshop, own):
    _, request = own
    host, made = workshop.host(), built(workshop, request(plain=False, **EVALUATED))
    plain = replace(made, masks=None)
    masked = eval_loss(made, host)
    assert masked != eval_loss(plain, host)
    present(made.masks).get = lambda sample: torch.ones(1, *made.latents.get(sample).shape[1:])
    assert eval_loss(made, host) == pytest.approx(eval_loss(plain, host), rel=1e-5)


@pytest.mark.slow
def test_masked_and_plain_parts_resume_to_the_same_bytes(workshop, own):
    _, request = own
    whole = run(request(), workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request(), host)
    resumed = run(request(), host.cancelling_at(0))
    assert resumed.report["resumed_from"] == 3 and resumed.report["dataset"]["masks"] == 4
    assert resumed.losses == whole.losses and resumed.lora.sha256 == whole.lora.sha256
    assert not any("no memory estimate" in text for text in host.told())
    other = run(request(unmasked_weight=0.5), workshop.host())
    assert other.losses != whole.losses


def test_an_edited_mask_is_another_run_and_is_named(workshop, own):
    folder, request = own
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request(), host)
    with Image.open(folder / "1.png") as mask:
        mask.point(lambda value: 255 - value).save(folder / "1.png")
    with pytest.raises(UserError, match=r"since then: mask of 1/1\.png has changed\. To start"):
        run(request(), host.cancelling_at(0))


def test_a_black_mask_is_told_before_anything_is_loaded(workshop, own, tmp_path):
    folder, request = own
    folder = Path(shutil.copytree(folder, tmp_path / "black"))
    Image.new("L", (32, 32), 0).save(folder / "2.png")
    host = workshop.host()
    with pytest.raises(
        UserError, match=r"2\.png: its mask 2\.png: it is entirely black, so nothing .* set on_broken to skip"
    ):
        run(request(root=folder, on_broken="stop", seed=6), host)
    assert {event.phase for event in host.all(PhaseStarted)} == {"start", "latents"}
    assert {event.unit for event in host.all(PhaseStarted)} == {"", "masks"}
    host = workshop.host()
    result = run(request(root=folder, steps=1), host)
    assert result.report["dataset"]["used"] == 7 and any("2.png: it is entirely black" in text for text in host.told())
    again = run(request(root=folder, steps=1), host)  # where all masks are cached
    assert again.lora.sha256 == result.lora.sha256 and again.report["resumed_from"] == 1


def test_records_without_masks_are_as_they_were(workshop, own):
    _, request = own
    plain, masked = workshop.request().as_json()["dataset"], request().as_json()["dataset"]
    assert not {"masks", "unmasked_weight"} & plain["parts"][0].keys() and plain.keys() == masked.keys() == {"parts"}
    assert masked["parts"][0] == plain["parts"][0]
    assert masked["parts"][1]["masks"] == "masks" and masked["parts"][1]["unmasked_weight"] == 0


def test_the_node_finds_the_folder_and_sees_its_changes(own, tmp_path):
    folder, _ = own
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    host = SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache", datasets=(tmp_path,)))
    (first,) = SPEC.run(Inputs(folder="pictures"), host)
    (both,) = SPEC.run(Inputs(folder="pictures", masks="masks", dataset=first), host)
    assert both.mask_roots == ("", str(folder)) and both.parts[1].masks == "masks"
    values = {"folder": "pictures", "masks": "masks"}
    before = fingerprint(values, host.paths)
    (folder / "0.png").unlink()
    assert fingerprint(values, host.paths) != before


def test_a_batch_takes_its_weights_along():
    numbers = torch.ones(1)
    batch = Batch(numbers, numbers, numbers, [numbers], {}, torch.full((1,), 0.5))
    moved = batch.to(torch.device("meta"))
    assert (
        present(moved.weight).device.type == "meta"
        and replace(batch, weight=None).to(torch.device("meta")).weight is None
    )
