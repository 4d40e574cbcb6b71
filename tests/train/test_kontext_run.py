"""Flux kontext: pairs of pictures, trained, judged, drawn and planned; and what is no pair is named before a model loads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.degradation import steps_of
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.data.cache.latents import place_image, to_tensor
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.degradation import degrade
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import PreviewReady
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.planner.workload import CaptionFacts, CodecCost, EncoderCost, facts_of
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.batch import stack_references
from PIL import Image, ImageOps

from tests.narrowing import present
from tests.workshop import EVALUATED


@pytest.fixture(scope="module")
def pairs(workshop, tmp_path_factory) -> DatasetConfig:
    """The workshop's pictures, each made out of its negative, which is larger and a JPEG."""
    targets, starts = Path(workshop.dataset.roots[0]), tmp_path_factory.mktemp("starts")
    for path in targets.glob("*.png"):
        with Image.open(path) as image:
            ImageOps.invert(image).resize((80, 64)).save(starts / f"{path.stem}.jpg", quality=95)
    parts = tuple(replace(part, references=str(starts)) for part in workshop.dataset.parts)
    return DatasetConfig(parts, workshop.dataset.roots, (str(starts),))


@pytest.fixture(scope="module")
def request_of(workshop, tiny_flux_model, pairs):
    def make(validation=None, dataset=pairs, flavour="kontext", **values):
        request = workshop.request(validation, replace(tiny_flux_model, flavour=flavour), **values)
        return replace(request, dataset=dataset)

    return make


def test_a_run_draws_from_a_picture_and_repeats(workshop, request_of, pairs):
    start = str(Path(pairs.reference_roots[0]) / "0.jpg")
    drawn = ValidationConfig(prompts="a cat", resolutions="32x48", steps=2, cfg=1.0, reference=start)
    host = workshop.host()
    result = run(request_of(drawn, checkpoint_every=0, **EVALUATED), host)
    again = run(request_of(drawn, checkpoint_every=0, **EVALUATED), workshop.host())
    assert result.lora.sha256 == again.lora.sha256 and host.all(PreviewReady)
    record = request_of(drawn).as_json()
    assert record["validation"]["reference"] == "0.jpg" and "reference_roots" not in record["dataset"]
    assert str(pairs.reference_roots[0]) not in str(record)


@pytest.mark.parametrize("way", ["references", "degrade"])
def test_the_reference_of_a_mirrored_picture_is_mirrored(workshop, request_of, pairs, way):
    """Files of their own, and copies that are made worse before they are mirrored."""
    part = pairs.parts[0] if way == "references" else replace(workshop.dataset.parts[0], degrade="blur 2 + noise 0.05")
    roots = pairs.reference_roots if way == "references" else ()
    host = workshop.host()
    plan = plan_run(request_of(dataset=DatasetConfig((replace(part, flip=0.5),), pairs.roots, roots)), host)
    built = build_run(plan, host, PhaseTimer())
    references, latents = present(plan.references), present(built.references)
    codec = FluxFamily().load_codec(plan.request.model, torch.device("cpu"))
    for sample in built.samples:
        start = references.of(sample)
        image = place_image(decode(references.index.read(start)), start)
        pixels = to_tensor(ImageOps.mirror(references.change(image, start)))[None]
        with torch.no_grad():
            expected = codec.encode(pixels)[0].float()
        torch.testing.assert_close(latents.get(replace(sample, is_mirrored=True)), expected)


def test_each_picture_has_its_own_start_at_its_own_shape(workshop, request_of):
    host = workshop.host()
    built = build_run(plan_run(request_of(), host), host, PhaseTimer())
    references = present(built.references)
    codec = FluxFamily().load_codec(request_of().model, torch.device("cpu"))
    for sample in built.samples:
        start = references.get(sample)
        assert start.shape == built.latents.get(sample).shape
        alone = stack_references(built, [sample])["reference"]
        assert torch.equal(alone[0], start)
    seen = {references.get(sample).sum().item() for sample in built.samples}
    assert len(seen) == len(built.samples) and codec.channels == 16


def test_other_starts_are_another_run(workshop, request_of, pairs, tmp_path):
    folder = tmp_path / "others"
    shutil.copytree(pairs.reference_roots[0], folder)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "0.jpg")
    other = replace(pairs, reference_roots=(str(folder),))
    one, two = (plan_run(request_of(dataset=d), workshop.host()).folder for d in (pairs, other))
    assert one.name != two.name


def test_the_plan_counts_their_tokens(request_of):
    shape = Shape(128, 128, 1, 25)
    with_start, without = (MetaModel(FluxFamily(), request_of(flavour=name)).cost(shape) for name in ("kontext", "dev"))
    more = with_start.blocks[-1].forward_flops / without.blocks[-1].forward_flops
    assert 1.6 < more < 2.1  # 64 + 64 + 24 tokens instead of 64 + 24


@pytest.fixture(scope="module")
def mended(workshop) -> DatasetConfig:
    """The workshop's pictures, each made out of itself, with words for the task."""
    words = {
        "captions": "instance prompt",
        "instance_prompt": "sharpen the image || enhance it",
        "degrade": "shrink 2-4 + jpeg 10-30",
    }
    return DatasetConfig(
        tuple(replace(part, **words) for part in workshop.dataset.parts), workshop.dataset.roots, ("",)
    )


@pytest.mark.slow
def test_a_run_from_pictures_made_worse(workshop, request_of, mended):
    host = workshop.host()
    whole = run(request_of(dataset=mended, holdout=0.25), host)
    assert (host.run_folder / "pairs.png").is_file() and whole.report["files"]["pair_sheet"] == str(
        host.run_folder / "pairs.png"
    )
    cut = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_of(dataset=mended, holdout=0.25), cut)
    resumed = run(request_of(dataset=mended, holdout=0.25), workshop.host(cut.paths.output))
    assert resumed.report["resumed_from"] and resumed.lora.sha256 == whole.lora.sha256
    other = replace(mended, parts=(replace(mended.parts[0], degrade="shrink 2-4 + jpeg 10-40"),))
    cut = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_of(dataset=mended, checkpoint_every=1), cut)
    with pytest.raises(UserError, match=r"degrade was \"shrink 2-4 \+ jpeg 10-30\", is \"shrink 2-4 \+ jpeg 10-40\""):
        plan_run(request_of(dataset=other, on_change="ask"), workshop.host(cut.paths.output))


def test_the_start_is_the_target_made_worse(workshop, request_of, mended):
    host = workshop.host()
    plan = plan_run(request_of(dataset=mended), host)
    built = build_run(plan, host, PhaseTimer())
    references = present(built.references)
    codec = FluxFamily().load_codec(request_of().model, torch.device("cpu"))
    sample = built.samples[0]
    picture = place_image(decode(plan.index.read(sample)), sample)
    start = degrade(picture, steps_of("shrink 2-4 + jpeg 10-30"), present(plan.references).of(sample).sha256)
    assert torch.equal(references.get(sample), codec.encode(to_tensor(start)[None])[0].float())
    assert not torch.equal(references.get(sample), built.latents.get(sample))
    assert set(sample.captions) == {"sks, sharpen the image", "sks, enhance it"}


def test_what_is_no_pair_is_named(workshop, request_of, pairs, tmp_path):
    folder = tmp_path / "starts"
    shutil.copytree(pairs.reference_roots[0], folder)
    (folder / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes(b"no picture")
    cases = {
        (
            str(folder),
        ): "references: every image needs a reference image with the same name; missing or broken: 1.png (no file with that name), 2.jpg (",
        (): "references: is empty, and kontext generates images from reference images; set their folder",
    }
    for roots, words in cases.items():
        with pytest.raises(UserError) as caught:
            plan_run(request_of(dataset=replace(pairs, reference_roots=roots)), workshop.host())
        assert words in str(caught.value) and len(caught.value.problems) == 1


def test_others_take_none(workshop, request_of, mended):
    with pytest.raises(UserError, match="references: is set, but flux dev takes no reference images"):
        plan_run(request_of(flavour="dev"), workshop.host())
    with pytest.raises(UserError, match="degrade: is set, but flux dev takes no reference images") as caught:
        plan_run(request_of(flavour="dev", dataset=mended), workshop.host())
    assert len(caught.value.problems) == 1
    drawn = ValidationConfig(prompts="a cat", reference="/x.png")
    with pytest.raises(UserError, match="reference: is set, but chroma tiny takes no reference images"):
        plan_run(workshop.request(drawn), workshop.host())


def test_records_without_references_are_as_they_were(workshop):
    record = workshop.request(ValidationConfig(prompts="a cat")).as_json()
    assert "degrade" not in record["dataset"]["parts"][0]
    assert "references" not in record["dataset"]["parts"][0] and "reference" not in record["validation"]


def test_the_plan_counts_latents_of_both(workshop, request_of, mended):
    """Starts that are made take the disk that starts of a folder take; dev's pictures have none."""
    found = {}
    for flavour, dataset in (("kontext", mended), ("dev", workshop.dataset)):
        request = request_of(flavour=flavour, dataset=dataset)
        index = build_index(dataset, workshop.host(), 5)
        encoder, codec = EncoderCost(0, 0, 0, 0, 32, False), CodecCost(0, 1.0)
        facts = facts_of(request, FluxFamily(), index, 32, encoder, codec, CaptionFacts(20, 4))
        found[flavour] = facts.latent_bytes
    assert found["kontext"] == 2 * found["dev"] > 0
