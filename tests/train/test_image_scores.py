"""CLIP scores of the validation images of a run: measured at each validation, stored, reported and continued."""

from __future__ import annotations

import json

import pytest
from chroma_trainer.nodes.comfyui.event_history import RunHistory
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import ImagesScored
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.train.planning import plan_for
from chroma_trainer.trainer_core.train.run import run


@pytest.fixture(scope="module")
def settings(tiny_clip):
    return ValidationConfig(
        prompts='{"cat": "a red cat", "dog": "the blue dog"}', resolutions="32x32", steps=1, cfg=1.0,
        lora_strength="0.5, 1.0", score="clip", score_model=str(tiny_clip),
    )  # fmt: skip


def test_a_run_scores_its_images(workshop, settings):
    """With a cancel between: the later start takes the base model's scores from the folder, and reports all steps."""
    request = workshop.request(settings, holdout=0.25, validate_every=2, steps=4)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    assert [(e.step, e.strength, e.is_shown) for e in host.all(ImagesScored)] == [
        (0, 0.0, True), (2, 0.5, False), (2, 1.0, True),
    ]  # fmt: skip
    host = workshop.host(host.paths.output)
    report = run(request, host).report
    events = host.all(ImagesScored)
    assert [(e.step, e.strength) for e in events] == [(0, 0.0), (4, 0.5), (4, 1.0)]
    base, _, last = events
    assert base.clip_change is None and base.prompts == ("cat", "dog") and len(base.by_prompt) == 2
    assert last.clip_change == pytest.approx(last.clip - base.clip) and last.clip_change_error > 0
    assert last.likeness is not None and -1 <= last.likeness <= 1
    entries = report["image_scores"]
    assert [(entry["step"], entry["strength"]) for entry in entries] == [(0, 0), (2, 0.5), (2, 1), (4, 0.5), (4, 1)]
    assert entries[-1]["clip_score"]["mean"] == last.clip and entries[-1]["likeness"]["mean"] == last.likeness
    assert entries[-1]["by_prompt"] == dict(zip(last.prompts, last.by_prompt, strict=True))
    assert sum("CLIP score" in text for text in host.told()) == 2

    status = read_status(host.run_folder)
    assert status and f"CLIP score {last.clip:.2f} +- {last.clip_error:.2f}, likeness" in status.text()
    history = RunHistory(host.run_folder)
    history.update()
    assert [(item["step"], item["strength"]) for item in history.scores] == [(0, 0), (2, 0.5), (2, 1), (4, 0.5), (4, 1)]


def test_scores_of_other_prompts_are_not_continued(workshop, settings, tmp_path):
    from chroma_trainer.trainer_core.train.hooks.score_images import _read

    path = tmp_path / "scores.json"
    scores = {"prompts": ["cat"], "clip": [20.0], "likeness": []}
    path.write_text(json.dumps({"key": "a", "steps": {"0": {"0": scores}}}), "utf-8")
    assert set(_read(path, "a")) == {0} and _read(path, "b") == {}
    path.write_text(json.dumps({"key": "a", "steps": {"0": {"0": {**scores, "clip": ["x"]}}}}), "utf-8")
    assert _read(path, "a") == {}


def test_scores_change_neither_the_bytes_nor_the_records(workshop, settings):
    from dataclasses import replace

    from chroma_trainer.trainer_core.config.serialize import to_record

    assert "score" not in to_record(replace(settings, score="none"))
    assert to_record(settings)["score_model"] == "tiny-clip"
    assert to_record(settings.of_the_images()) == to_record(replace(settings, score="none"))
    plain = workshop.request(replace(settings, score="none"))
    phases = [{phase.name for phase in plan_for(request, workshop.host())[0].phases} for request in (
        plain, replace(plain, validation=settings),
    )]  # fmt: skip
    assert phases[1] - phases[0] == {"score"}
