"""What the dataset doctor finds, and that it finds nothing in good datasets."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.dataset_doctor.checks.repeated_marks import MOST_IMAGES, pick_for_marks
from chroma_trainer.trainer_core.dataset_doctor.examine_dataset import examine_dataset
from chroma_trainer.trainer_core.dataset_doctor.findings import dataset_text
from chroma_trainer.trainer_core.dataset_doctor.findings_sheet import draw_findings
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import ASSETS, PhaseProgress
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from .conftest import dataset, scene


def examine(host, folder, *parts, **fields):
    report, _ = examine_dataset(dataset(folder, *parts, **fields), host)
    return report


def named(report, kind):
    """The names of the images of a finding, with what was measured."""
    cases = [case for finding in report.findings if finding.kind == kind for case in finding.cases]
    return {case.label.split(" ", 1)[1]: case.value for case in cases}


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def enlarge(image, factor):
    small = image.resize((image.width // factor, image.height // factor), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.LANCZOS)


@pytest.mark.parametrize("name", ["neon-emoji", "plain-emoji"])
def test_the_shipped_datasets_are_sound(host, name):
    """No false alarm on 84 images, half of which are round faces of one size in one place."""
    report = examine(host, ASSETS / name, resolution=64)
    assert report.is_sound and not report.findings, dataset_text(report)
    assert report.num_usable == report.num_images == sum(report.buckets.values())


def test_copies_are_found_and_others_are_not(host, folder, save):
    for seed in range(12):
        save(f"{seed:02}.png", scene(seed))
    first = scene(0)
    changed = {
        "again": first, "jpeg": jpeg(first, 30), "small": first.resize((64, 64), Image.Resampling.LANCZOS),
        "bright": ImageEnhance.Brightness(first).enhance(1.15), "turned": ImageOps.mirror(first),
        "cut": first.crop((2, 2, 126, 126)),
    }  # fmt: skip
    for name, image in changed.items():
        save(f"x-{name}.png", image)
    report = examine(host, folder)
    expected = {f"x-{name}.png": "nearly #1" for name in changed}
    expected |= {"00.png": "", "x-again.png": "exact copy of #1", "x-turned.png": "mirror image of #1"}
    assert named(report, "copies") == expected
    assert {case.group for finding in report.findings if finding.kind == "copies" for case in finding.cases} == {1}


def test_blurry_images_and_images_that_were_enlarged_before(host, folder, save):
    for seed in range(6):
        save(f"{seed}-clean.png", scene(seed))
        save(f"{seed}-noisy.png", jpeg(scene(seed + 10), 60))
        save(f"{seed}-blur.png", scene(seed + 20).filter(ImageFilter.GaussianBlur(1.5)))
        save(f"{seed}-twice.png", enlarge(scene(seed + 30), 2))
        save(f"{seed}-four.png", enlarge(scene(seed + 40), 4))
    blurry = named(examine(host, folder), "blurry")
    assert sorted(blurry) == sorted(f"{seed}-{kind}.png" for seed in range(6) for kind in ("blur", "twice", "four"))
    assert not named(examine(host, folder, resolution=64), "blurry").keys() - {f"{s}-four.png" for s in range(6)}


def test_sizes_and_brightness(host, folder, save):
    save("good.png", scene(0))
    save("tiny.png", scene(1, 48, 64))
    save("smaller.png", scene(2, 96, 96))
    save("night.png", ImageEnhance.Brightness(scene(3)).enhance(0.15))
    save("snow.png", Image.blend(scene(4), Image.new("RGB", (128, 128), "white"), 0.9))
    save("fog.png", Image.blend(scene(5), Image.new("RGB", (128, 128), "gray"), 0.9))
    save("drawing.png", ImageOps.expand(scene(6, 24, 24), 52, "white"))
    report = examine(host, folder)
    assert named(report, "tiny") == {"tiny.png": "48 x 64, enlarged 2.33 times"}
    assert named(report, "enlarged") == {"smaller.png": "96 x 96, enlarged 1.33 times"}
    kinds = {name: value.partition(":")[0] for name, value in named(report, "exposure").items()}
    assert kinds == {"night.png": "dark", "snow.png": "bright", "fog.png": "without contrast"}


def stamp(image: Image.Image, opacity: float) -> Image.Image:
    edge = min(image.size)
    mask = Image.new("L", image.size)
    at = image.width - edge * 0.04, image.height - edge * 0.04
    font = ImageFont.load_default(edge * 0.1)
    ImageDraw.Draw(mask).text(at, "© studio", fill=round(255 * opacity), font=font, anchor="rs")
    return Image.composite(Image.new("RGB", image.size, "white"), image, mask)


@pytest.mark.parametrize("opacity", [1.0, 0.5])
def test_a_watermark_is_found_in_the_images_that_have_it(host, folder, save, opacity):
    sizes = ((192, 192), (256, 192), (192, 288))
    marked = set()
    for seed in range(24):
        image = scene(seed, *sizes[seed % 3])
        if seed % 2:
            marked.add(f"{seed:02}.png")
            image = stamp(image, opacity)
        save(f"{seed:02}.png", image)
    report = examine(host, folder, resolution=192)
    (mark,) = [finding for finding in report.findings if finding.kind == "mark"]
    images = {case.label.split()[1] for case in mark.cases}
    assert "in the lower right" in mark.text and images <= marked and len(images) >= 8, sorted(images)
    assert all(case.box[0] > 0.4 and case.box[1] > 0.4 for case in mark.cases)


def test_frames_and_horizons_are_no_marks(host, folder, save):
    for seed in range(16):
        image = scene(seed, 192, 192)
        if seed % 2:
            image = ImageOps.expand(image.crop((0, 0, 192, 144)), (0, 24), "black")
        save(f"{seed:02}.png", image)
    assert not named(examine(host, folder, resolution=192), "mark")


def test_captions(host, folder, save):
    save("a.png", scene(0), "zelda, a red fox")
    save("b.png", scene(1), "A  red fox")
    save("c.png", scene(2), "a red FOX")
    save("d.png", scene(3), None)
    save("e.png", scene(4), "zelda")
    (folder / "f.png").write_bytes(b"no image")
    report = examine(host, folder, trigger="zelda")
    assert named(report, "caption_missing").keys() == {"d.png"}
    assert named(report, "trigger_missing") == {"b.png": "A  red fox", "c.png": "a red FOX"}
    assert named(report, "caption_equal").keys() == {"b.png", "c.png"}
    assert list(named(report, "unreadable")) == ["f.png"]
    assert (report.num_images, report.num_usable) == (6, 4)
    assert not named(examine(host, folder, captions="instance prompt", instance_prompt="x"), "caption_equal")


def test_a_folder_without_any_captions_is_examined(host, folder, save):
    """The training would refuse it, but the images can be judged."""
    save("a.png", scene(0), None)
    save("b.png", scene(0), None)
    report = examine(host, folder)
    assert len(named(report, "caption_missing")) == 2 and len(named(report, "copies")) == 2


def test_an_empty_folder_is_an_error(host, folder):
    with pytest.raises(UserError, match="has no images that can be read"):
        examine(host, folder)


def test_several_resolutions_of_a_folder_are_one(host, folder, save):
    save("a.png", scene(0))
    parts = [FolderConfig(folder="cats", resolution=edge) for edge in (64, 128, 96)]
    report = examine(host, folder, *parts)
    assert report.num_images == 1 and list(report.buckets) == ["128x128"]
    assert any("2 left out" in remark for remark in report.remarks)


def test_it_shows_progress_and_can_be_canceled(host, folder, save):
    for seed in range(40):
        save(f"{seed}.png", scene(seed, 32, 32))
    progress = []
    sink = lambda event: progress.append(event.done) if isinstance(event, PhaseProgress) else None  # noqa: E731
    stops = replace(host, sinks=(sink,), is_cancelled=lambda: bool(progress))
    with pytest.raises(Cancelled):
        examine(stops, folder, resolution=32)
    assert progress == [16]


def test_what_is_stored_of_an_image_is_bounded():
    """The gradients of an image take 92 KB; they are stored for so many images at most."""
    for count in (1, 256, 257, 1000, 100_000):
        chosen = pick_for_marks(count)
        assert 0 < len(chosen) <= MOST_IMAGES and chosen[-1] < count


def test_the_sheet_shows_every_finding(host, folder, save):
    save("a.png", scene(0))
    save("b.png", scene(0))
    save("c.png", scene(1), None)
    report, images = examine_dataset(dataset(folder), host)
    sheet = draw_findings(report, images, host)
    colors = {color for _, color in sheet.getcolors(1 << 24) or ()}
    assert (58, 96, 222) in colors  # the frame of the first group
    (folder / "a.png").unlink()
    assert draw_findings(report, images, host).size == sheet.size
