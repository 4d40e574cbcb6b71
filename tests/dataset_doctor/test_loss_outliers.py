"""Images whose loss is out of line, by what a run has measured of each; and a real run whose record is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.dataset_doctor.checks.loss_outliers import check_losses, losses_of, scores
from chroma_trainer.trainer_core.dataset_doctor.examine_dataset import examine_dataset
from chroma_trainer.trainer_core.dataset_doctor.image_list import list_images
from chroma_trainer.trainer_core.runs.image_manifest import FILE, ImageManifest
from chroma_trainer.trainer_core.storage.atomic import sha256_of

from .conftest import dataset, scene


def write_run(output: Path, folder: Path, losses: dict[str, tuple[float, float]], step: int = 90) -> Path:
    """A run with the losses of each image at its start and at a step. The keys of its images are those of another part."""
    run = output / "chroma_trainer" / "cats-12345678"
    checkpoint = run / "checkpoints" / f"step-{step:06}"
    checkpoint.mkdir(parents=True)
    rows = ((f"3/{name}", sha256_of(folder / name)[:16], "0" * 16) for name in losses)
    ImageManifest.gather(rows).write(run / FILE)
    names = list(losses)
    group = lambda part, at: {f"3/{name}": [losses[name][at]] * 4 for name in part}  # noqa: E731
    evaluations = {
        str(at): {"judged": group(names[:4], index), "trained": group(names[4:], index)}
        for index, at in enumerate((0, step))
    }
    (checkpoint / "state.json").write_text(json.dumps({"evaluations": evaluations}), "utf-8")
    return run


@pytest.fixture
def names(save) -> list[str]:
    return [save(f"{seed:02}.png", scene(seed, 64, 64)).name for seed in range(12)]


def ordinary(names: list[str]) -> dict[str, tuple[float, float]]:
    return {name: (0.6 + 0.01 * index, 0.4 + 0.012 * index) for index, name in enumerate(names)}


def test_images_that_are_hard_or_do_not_learn(tmp_path, host, folder, names):
    losses = ordinary(names)
    losses["03.png"], losses["07.png"] = (1.9, 1.7), (0.5, 0.55)
    run = write_run(tmp_path / "out", folder, losses)
    report, _ = examine_dataset(dataset(folder, resolution=64), host, run=run)
    (finding,) = [finding for finding in report.findings if finding.kind == "loss"]
    assert {case.number: case.value for case in finding.cases} == {
        4: "loss 1.700, the median is 0.484", 8: "changed by +0.050, the median by -0.189"
    }  # fmt: skip
    assert finding.severity == "note" and "cats-12345678" in finding.text and report.as_json()
    assert not any("cats-12345678" in remark for remark in report.remarks)


def test_images_like_the_others_are_not_named(tmp_path, host, folder, names):
    run = write_run(tmp_path / "out", folder, ordinary(names))
    result = check_losses(list_images(dataset(folder), host), run)
    assert result.findings == () and result.remark == ""
    assert scores([1.0] * 9) == [0.0] * 9


def test_what_to_switch_on_where_losses_are_missing(tmp_path, host, folder, names):
    losses = ordinary(names)
    run = write_run(tmp_path / "out", folder, dict(list(losses.items())[:9]))
    images = list_images(dataset(folder), host)
    assert "no losses of 3 of these images" in (text := check_losses(images, run).remark)
    assert "eval_images of at least 12" in text and "holdout above 0" in text
    few = replace(images, images=images.images[:7])
    assert "the losses of 7 of these images, which is too few" in check_losses(few, run).remark
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes() + b" ")  # another image under the same name
    assert "no losses of 4" in check_losses(list_images(dataset(folder), host), run).remark


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"evaluations": []}',
        '{"evaluations": {"x": {}}}',
        '{"evaluations": {"9": {"judged": {"a": ["x"]}, "trained": {}}}}',
    ],
)
def test_a_damaged_record_is_passed_over(tmp_path, folder, names, text):
    run = write_run(tmp_path / "out", folder, ordinary(names))
    damaged = run / "checkpoints" / "step-000120"
    damaged.mkdir()
    (damaged / "state.json").write_text(text, "utf-8")
    assert len(losses_of(run)) == 12
    (run / FILE).write_bytes(b"x")
    assert losses_of(run) == {}
