"""Planted corrupt images: every one is used or named, before the first step, and the run comes to its end."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Event, Paths, SinkHost, StepReport
from chroma_trainer.trainer_core.train.run import run
from PIL import Image

from tests.narrowing import present

KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
TRAINING = {
    "name": "corrupt",
    "rank": 2,
    "alpha": 2.0,
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 0,
    "checkpoint_every": 0,
}


def plant(folder: Path, seed: int) -> int:
    """Two sound pictures, and for each kind ten cut short and ten with bytes flipped; also four of another sort. Their number."""
    folder.mkdir()
    draw = random.Random(seed)
    picture = Image.effect_noise((48, 40), 90).convert("RGB")
    for name in ("sound-1.png", "sound-2.png"):
        picture.save(folder / name)
    count = 0
    for kind, suffix in KINDS.items():
        stream = io.BytesIO()
        picture.save(stream, kind)
        raw = stream.getvalue()
        for i in range(10):
            (folder / f"cut-{i}{suffix}").write_bytes(raw[: draw.randrange(len(raw))])
            flipped = bytearray(raw)
            for _ in range(5):
                flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            (folder / f"flipped-{i}{suffix}").write_bytes(flipped)
            count += 2
    for name, data in {
        "empty.png": b"",
        "text.jpg": b"<html>",
        "zeros.webp": bytes(2000),
        "a folder.png": None,
    }.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
            count += 1
    return count


@pytest.mark.filterwarnings("ignore")
def test_every_planted_image_is_used_or_named(tiny_model, tmp_path, capsys):
    planted = plant(tmp_path / "pictures", seed=7)
    part = FolderConfig(folder=str(tmp_path / "pictures"), captions="filename", resolution=32)
    request = TrainRequest(
        tiny_model, DatasetConfig(parts=(part,), roots=(str(tmp_path / "pictures"),)), TrainingConfig(**TRAINING)
    )
    events: list[Event] = []
    paths = Paths(output=tmp_path / "out", cache=tmp_path / "cache")
    report = run(request, SinkHost(paths=paths, sinks=(events.append,), device="cpu")).report
    skipped = {Path(entry["image"]).name: entry["reason"] for entry in report["dataset"]["skipped"]}
    used = planted + 2 - len(skipped)
    with capsys.disabled():
        print(
            f"\ncorrupt images: {planted} planted, {len(skipped)} named and left out, {used - 2} could be read, 0 lost"
        )
    assert all(skipped.values()) and {"empty.png", "text.jpg", "zeros.webp"} <= skipped.keys()
    assert not {"sound-1.png", "sound-2.png"} & skipped.keys() and report["dataset"]["used"] == used
    assert len(skipped) >= 25 and sum(isinstance(event, StepReport) for event in events) == 2


@pytest.mark.filterwarnings("ignore")
def test_with_the_policy_stop_all_are_told_at_once_and_nothing_is_loaded(tiny_model, tmp_path):
    plant(tmp_path / "pictures", seed=7)
    part = FolderConfig(folder=str(tmp_path / "pictures"), captions="filename", resolution=32, on_broken="stop")
    request = TrainRequest(
        tiny_model, DatasetConfig(parts=(part,), roots=(str(tmp_path / "pictures"),)), TrainingConfig(**TRAINING)
    )
    with pytest.raises(UserError) as caught:
        run(request, SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache"), device="cpu"))
    *named, rest = caught.value.problems  # a screen of them, and how many more
    more = int(present(re.match(r"(\d+) more images", rest.message))[1])
    assert len(named) == 20 and len(named) + more >= 25 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("shown", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_image_that_looks_whole_and_is_not(tiny_model, tmp_path, monkeypatch, policy, shown):
    """Its structure is in order, so the scan passes it: met when the crop sheet is drawn, or when latents are made."""
    from chroma_trainer.trainer_core.data.source import scan as scans_module
    from chroma_trainer.trainer_core.train import prepare

    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.effect_noise((48, 40), 90).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "c.jpg").write_bytes(b"<html>")
    upright_size = scans_module.upright_size
    monkeypatch.setattr(scans_module, "upright_size", lambda raw: (48, 40) if raw == b"<html>" else upright_size(raw))
    if not shown:
        monkeypatch.setattr(prepare, "draw_crop_sheet", lambda index, path: None)
    part = FolderConfig(folder=str(tmp_path / "pictures"), captions="filename", resolution=32, on_broken=policy)
    dataset = DatasetConfig(parts=(part,), roots=(str(tmp_path / "pictures"),))
    request = TrainRequest(tiny_model, dataset, TrainingConfig(**TRAINING))
    host = SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache"), device="cpu")
    if policy == "stop":
        with pytest.raises(
            UserError, match=r"c\.jpg: can't be decoded: .*; fix or remove it, or set on_broken to skip"
        ):
            run(request, host)
        return
    report = {}
    for _ in range(2):  # the second start meets it as well, and goes to the same folder
        report = run(request, host).report
        (entry,) = report["dataset"]["skipped"]
        assert Path(entry["image"]).name == "c.jpg" and entry["reason"].startswith("can't be decoded: ")
    (folder,) = (tmp_path / "out" / "chroma_trainer").iterdir()
    assert report["files"]["run"] == str(folder) and report["resumed_from"] == 2
