"""The learning score samples as validation does, only in batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.validation.render import Counter, Renderer
from chroma_trainer.trainer_core.validation.style_score import draw_together

PROMPTS = ("a red cat", "a house at night")
SETTINGS = ValidationConfig(prompts="\n".join(PROMPTS), steps=3, cfg=1.0, resolutions="32x32", seed=5)


@pytest.mark.parametrize("fixture", ["tiny_chroma_model", "tiny_flux_model"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_batch_is_sampled_as_single_images_are(fixture, cfg, request, tmp_path):
    """Flux's guidance and assistant are those of sampling: its family sets them for `drawing` alone."""
    model, settings = request.getfixturevalue(fixture), replace(SETTINGS, cfg=cfg)
    if model.flux:
        model = replace(model, flux=replace(model.flux, guidance=1.0, drawn_guidance=30.0))
    host = SinkHost(Paths(tmp_path / "out", tmp_path / "cache"), device="cpu")
    with torch.no_grad():
        renderer = Renderer(model, None, [*PROMPTS, settings.negative_prompt], host)
        single = renderer.draw(settings, 0.0, lambda: None)[32, 32]
        together = draw_together(renderer, settings, PROMPTS, settings.seed, Counter(host, 2))
    for alone, in_batch in zip(single, together, strict=True):
        assert np.abs(alone.astype(int) - in_batch.astype(int)).max() <= 1  # rounding of batched operations
