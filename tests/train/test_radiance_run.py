"""A run on Radiance: events, images, a LoRA of the blocks, and a plan that counts pixels."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.data.cache.latents import place_image, to_tensor
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.host import LoraSaved, PreviewReady, StepReport
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.planning import plan_request
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from safetensors import safe_open

from tests.conftest import radiance_model, write_tiny_radiance
from tests.workshop import EVALUATED

DRAWN = ValidationConfig(prompts="a cat", resolutions="32x48", steps=2, cfg=2.0, previews="fast")


@pytest.fixture(scope="module")
def x0_model(tmp_path_factory, tiny_chroma):
    file = tmp_path_factory.mktemp("radiance") / "x0.safetensors"
    write_tiny_radiance(file, conv_head=True, x0=True, sequential=True)
    return radiance_model(file, tiny_chroma)


def test_a_run_trains_draws_and_saves(workshop, x0_model):
    host = workshop.host()
    result = run(workshop.request(DRAWN, x0_model, routed_share=0.25, route_first=1, route_last=2, **EVALUATED), host)
    assert [event.step for event in host.all(StepReport)] == [1, 2, 3, 4, 5, 6]
    assert host.all(PreviewReady) and host.all(LoraSaved)
    with safe_open(result.lora.path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert metadata["modelspec.architecture"] == "chroma-radiance/lora"
    assert all(
        key.startswith(("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")) for key in keys
    )


@pytest.mark.slow
def test_the_plan_counts_pixels_on_disk(workshop, x0_model):
    """Three bytes a pixel, and nothing for a VAE."""
    request = workshop.request(DRAWN, x0_model)
    plan, _, _ = plan_request(request, workshop.host())
    buckets = [sample.placement.bucket for sample in build_index(request.dataset, workshop.host(), 0).samples]
    assert plan.disk["latents"] == sum(3 * width * height for width, height in buckets)
    chroma, _, _ = plan_request(workshop.request(DRAWN), workshop.host())
    assert plan.disk["latents"] == 3 * chroma.disk["latents"]


def test_the_cache_holds_the_images_exactly(workshop, x0_model):
    """In 8 bits, which become the same fp32 values as those of the image itself."""
    host = workshop.host()
    plan = plan_run(workshop.request(model=x0_model), host)
    state = build_run(plan, host, PhaseTimer())
    for sample in plan.index.samples:
        pixels = to_tensor(place_image(decode(plan.index.read(sample)), sample))
        assert torch.equal(state.latents.get(sample), pixels)
