"""A LoRA of one base is drawn with another one, as Flash draws the LoRAs of HD."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from chroma_trainer.nodes.validate_sampler import SPEC
from chroma_trainer.trainer_core.config.request import TrainedLora
from chroma_trainer.trainer_core.train.run import run

from tests.conftest import write_tiny_chroma


@pytest.mark.slow
def test_the_images_are_the_other_models(workshop, tmp_path):
    trained = run(workshop.request(steps=2, checkpoint_every=0, eval_images=0), workshop.host()).lora
    write_tiny_chroma(tmp_path / "flash", seed=8)
    flash = replace(workshop.model, repo=str(tmp_path / "flash"), flavour="flash")
    lora = TrainedLora(trained.path, trained.name, trained.sha256, workshop.model)
    settings = {"prompts": "cat", "resolutions": "32x32", "steps": 2, "cfg": 1.0, "lora_strength": "1.0"}

    def pictures(**models) -> tuple[np.ndarray, np.ndarray]:
        _, _, (base, with_lora), _ = SPEC.run(SPEC.inputs(**settings, **models), workshop.host())
        return base.numpy(), with_lora.numpy()

    own, other = pictures(lora=lora), pictures(lora=lora, model=flash)
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(own, other, strict=True))  # another base
    assert np.abs(other[0] - other[1]).max() > 0  # and the LoRA changes it
    assert torch.is_grad_enabled()
