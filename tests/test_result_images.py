"""tools/result_images.py: thumbnails, icon and banner show validation images of a run, before and after, in this order."""

from __future__ import annotations

import numpy as np
import pytest
from chroma_trainer.trainer_core.plots.image_grid import draw_grid
from PIL import Image

from tests.scripts import load_script

STEPS = (0, 300, 900)
tool = load_script("tools/result_images.py")


def color_of(prompt: int, step: int, strength: int) -> tuple[int, int, int]:
    return (40 * prompt + 20, STEPS.index(step) * 100, strength * 100)


@pytest.fixture
def run(tmp_path):
    """A run whose images are each of one color: of their prompt, step and strength."""
    prompts = sorted({name for sheet in tool.THUMBNAILS.values() for name in sheet.prompts} | {*tool.BANNER_PROMPTS})
    folder = tmp_path / "run" / "validation" / "by-name"
    folder.mkdir(parents=True)
    for i, name in enumerate(prompts):
        for step in STEPS:
            strengths = range(3) if step else range(1)
            row = [np.full((64, 64, 3), color_of(i, step, strength), np.uint8) for strength in strengths]
            labels = [f"LoRA {strength}" for strength in strengths]
            draw_grid([row], [name], labels, f"step {step}").save(folder / f"{name}-step-{step:06d}-64x64.png")
    return tmp_path / "run", prompts


def test_thumbnails_show_before_and_after(run, tmp_path):
    folder, prompts = run
    for name in ("workflows", "images"):
        (tmp_path / name).mkdir()
    assert tool.missing(tool.result_files(folder)) == []
    paths = tool.write(folder, tmp_path / "workflows", tmp_path / "images")
    assert {path.name for path in paths} == {*(f"{name}.jpg" for name in tool.THUMBNAILS), "banner.jpg", "icon.png"}
    for name, sheet in tool.THUMBNAILS.items():
        pixels = np.asarray(Image.open(tmp_path / "workflows" / f"{name}.jpg")).astype(int)
        assert pixels.shape == (640, 640, 3)
        rows, columns = len(sheet.prompts), len(sheet.steps)
        for y, prompt in enumerate(sheet.prompts):
            for x, step in enumerate(STEPS[index] for index in sheet.steps):
                at = (round(640 * (x + 0.5) / columns), round(640 * (y + 0.5) / rows))
                expected = color_of(prompts.index(prompt), step, 2 if step else 0)
                assert np.abs(pixels[at[1], at[0]] - expected).max() <= 6, (name, prompt, step)


def test_icon_and_banner_fit_the_registry(run, tmp_path):
    folder, _ = run
    paths = {path.name: path for path in tool.write(folder, tmp_path, tmp_path)}
    icon, banner = Image.open(paths["icon.png"]), Image.open(paths["banner.jpg"])
    assert icon.width <= 800 and icon.height <= 400 and banner.width * 9 == banner.height * 21


def test_what_a_run_lacks_is_named(run, tmp_path, capsys):
    folder, prompts = run
    images = folder / "validation" / "by-name"
    for path in images.glob(f"{prompts[0]}-step-*"):
        path.unlink()
    (images / f"{prompts[1]}-step-000300-64x64.png").unlink()
    assert tool.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        f"no validation images of a prompt named {prompts[0]!r}" in error
        and f"{prompts[1]!r} has images of 2 steps" in error
    )
    assert tool.main([]) == 2


def test_other_templates_have_thumbnails_of_what_they_do():
    features = load_script("tools/feature_thumbnails.py")
    assert not features.TEMPLATES.keys() & tool.THUMBNAILS.keys()
    assert all((tool.WORKFLOWS / f"{name}.jpg").is_file() for name in features.TEMPLATES)
    for before, after in features.kontext_pairs():
        assert before.size == after.size and np.asarray(before).std() > 0
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).mean() > 3
    assert features.main(["merge-loras", "only-one.safetensors"]) == 2
