"""What a request's plan reports before anything is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.train.prepare import plan_run


def with_captions(workshop, folder: Path, **captions: str):
    """The workshop's dataset with other captions, by the picture's name."""
    root = Path(shutil.copytree(workshop.dataset.roots[0], folder))
    for name, text in captions.items():
        (root / f"{name.strip('_')}.txt").write_text(text, encoding="utf-8")
    return replace(workshop.dataset, roots=(str(root),))


def test_captions_that_the_text_encoder_cannot_read_are_counted(workshop, tmp_path):
    dataset = with_captions(workshop, tmp_path / "pictures", _0="赤い猫\na cat", _1="青い猫")
    host = workshop.host()
    report = plan_run(replace(workshop.request(), dataset=dataset), host).index.report
    assert report["unknown_captions"] == {"count": 2, "example": "sks, 赤い猫", "unknown": ["赤い猫"]}
    assert any("captions with characters that T5's vocabulary lacks: 2." in text for text in host.told())


def test_prompts_are_counted_as_well(workshop):
    host = workshop.host()
    request = workshop.request(ValidationConfig(prompts="a cat\n赤い猫", cfg=1.0))
    report = plan_run(request, host).index.report
    assert (
        any("prompts with characters that T5's vocabulary lacks: 1." in text for text in host.told())
        and "unknown_captions" not in report
    )
