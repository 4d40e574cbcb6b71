"""Mirrored images: latents of their own, masks and references that are mirrored with them, drawn by the seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.data.cache.latents import place_image, to_tensor
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.setup.placement import load_codec
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.step.batch import draw_samples, make_batch
from chroma_trainer.trainer_core.train.step.state import TrainState
from PIL import Image, ImageOps


def built(workshop, dataset: DatasetConfig, **training) -> tuple[TrainState, object]:
    host = workshop.host()
    plan = plan_run(replace(workshop.request(**training), dataset=dataset), host)
    return build_run(plan, host, PhaseTimer()), plan


@pytest.fixture(scope="module")
def state(workshop, tmp_path_factory):
    """The workshop's four images with masks whose left half is white, half of the draws mirrored."""
    masks = tmp_path_factory.mktemp("masks")
    for number in range(4):
        size = (96, 32) if number == 3 else (32, 32)
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(masks / f"{number}.png")
    part = replace(workshop.dataset.parts[0], flip=0.5, masks="masks")
    dataset = DatasetConfig((part,), workshop.dataset.roots, mask_roots=(str(masks),))
    return built(type(workshop)(masks.parent / "cold", workshop.model, dataset), dataset)  # no latent is cached yet


def test_the_latent_of_a_mirrored_image_is_that_of_its_mirrored_pixels(state):
    run, plan = state
    codec = load_codec(plan.family, plan.request, plan.device)
    for sample in run.samples:
        image = place_image(decode(plan.index.read(sample)), sample)
        pixels = to_tensor(ImageOps.mirror(image))[None]
        with torch.no_grad():
            expected = codec.encode(pixels.to(plan.device))[0].float().cpu()
        latent = run.latents.get(replace(sample, is_mirrored=True))
        torch.testing.assert_close(latent, expected)
        assert not torch.equal(latent, run.latents.get(sample))


def test_masks_are_mirrored_with_their_images(state):
    run, _ = state
    for sample in run.samples:
        plain, mirrored = (run.masks.get(replace(sample, is_mirrored=which)) for which in (False, True))
        assert plain[..., 0].min() == 1 and plain[..., -1].max() == 0
        assert torch.equal(mirrored, plain.flip(-1))


def test_half_of_the_samples_are_mirrored_by_the_seed_alone(state):
    run, _ = state
    drawn = [draw_samples(run.config, run.samples, run.plan, run.parts, micro) for micro in range(60)]
    flags = [sample.is_mirrored for batch in drawn for sample in batch]
    assert 0.35 < sum(flags) / len(flags) < 0.65
    again = [draw_samples(run.config, run.samples, run.plan, run.parts, micro) for micro in reversed(range(60))]
    assert again[::-1] == drawn
    micro = next(i for i, batch in enumerate(drawn) if any(sample.is_mirrored for sample in batch))
    batch = make_batch(run, micro)
    x0 = torch.stack([run.latents.get(sample) for sample in drawn[micro]])
    torch.testing.assert_close(batch.x_sigma - batch.sigma.view(-1, 1, 1, 1) * batch.velocity, x0)
    assert batch.weight is not None
    for weight, sample in zip(batch.weight, drawn[micro], strict=True):
        assert weight[..., -1 if sample.is_mirrored else 0].min() == 1


def test_without_flips_nothing_is_encoded_twice(workshop):
    host = workshop.host()
    store = host.paths.cache / "latents"
    built(workshop, workshop.dataset)
    before = sum(path.stat().st_size for path in store.iterdir())
    run, _ = built(workshop, DatasetConfig((replace(workshop.dataset.parts[0], flip=0.0),), workshop.dataset.roots))
    assert sum(path.stat().st_size for path in store.iterdir()) == before
    assert not any(s.is_mirrored for s in draw_samples(run.config, run.samples, run.plan, run.parts, 0))
