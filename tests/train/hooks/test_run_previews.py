"""Previews in a run: preview.jpg in its folder, and the same validation images as without."""

from __future__ import annotations

import numpy as np
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import SamplingPreview
from chroma_trainer.trainer_core.runs.event_log import read_events
from chroma_trainer.trainer_core.train.run import run
from PIL import Image


def test_previews_change_no_pixel(workshop):
    images, digests = [], []
    for previews in ("off", "fast"):
        host = workshop.host()
        settings = ValidationConfig(prompts="a red cat", steps=2, cfg=1.0, resolutions="32x32", previews=previews)
        result = run(workshop.request(settings, steps=2, checkpoint_every=0, validate_every=0, eval_images=0), host)
        digests.append(result.lora.sha256)
        with Image.open(host.run_folder / "validation" / "step-000002-32x32.png") as image:
            images.append(np.asarray(image))
        events = host.all(SamplingPreview)
        assert bool(events) == (previews == "fast") == (host.run_folder / "preview.jpg").is_file()
        assert {event.path for event in events} <= {host.run_folder / "preview.jpg"}
        assert not any(event["kind"] == "SamplingPreview" for event in read_events(host.run_folder))
    assert np.array_equal(*images)
    assert digests[0] != ""
