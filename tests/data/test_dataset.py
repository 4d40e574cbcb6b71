"""Every image is used, or left out for a reason that is told."""

from __future__ import annotations

import shutil

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.source import scan as scans_module
from chroma_trainer.trainer_core.data.source.folder import FolderBackend
from chroma_trainer.trainer_core.errors import Cancelled, UserError


@pytest.fixture
def mixed(pictures):
    """3 that can be used, one each that is empty, cut short, no image, without a caption, with an empty one, too small."""
    pictures("a.png", (80, 60), "a cat\na kitten")
    pictures("süß/猫.png", (60, 80), "eine Katze", shade=30)
    pictures("c.jpg", (64, 64), shade=60)
    pictures("small.png", (70, 20))
    pictures("uncaptioned.png", caption=None)
    pictures("blank.png", caption=" \n")
    for name, raw in (
        ("empty.png", b""),
        ("page.png", b"<html>"),
        ("cut.jpg", (pictures.folder / "c.jpg").read_bytes()[:-200]),
    ):
        (pictures.folder / name).write_bytes(raw)
        (pictures.folder / name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    return pictures


REASONS = {
    "blank.png": "its caption file blank.txt is empty",
    "cut.jpg": "its data is damaged or truncated (image file is truncated (0 bytes not processed))",
    "empty.png": "the file is empty",
    "page.png": "it is not an image file, despite its name",
    "small.png": "its shorter edge has 20 pixels, min_size is 32",
    "uncaptioned.png": "its caption file uncaptioned.txt is missing",
}


def test_every_image_is_accounted_for(mixed, host, events):
    index = build_index(mixed.config(min_size=32), host, 0)
    report = index.report
    assert (report["found"], report["used"], len(report["skipped"])) == (9, 3, 6)
    assert [sample.key for sample in index.samples] == ["0/a.png", "0/c.jpg", "0/süß/猫.png"]
    for entry in report["skipped"]:
        name = entry["image"].replace("\\", "/").rsplit("/", 1)[-1]
        assert entry["reason"].startswith(REASONS[name][:40]), entry
    assert len({entry["image"] for entry in report["skipped"]}) == 6
    assert sum(report["buckets"].values()) == 3
    told = events.warnings()
    assert (
        sum(text.startswith("skipped ") for text in told) == 5 and "and 1 more skipped; all are in the report" in told
    )


def test_policy_stop_lists_every_fault_at_once(mixed, host):
    with pytest.raises(UserError) as caught:
        build_index(mixed.config(min_size=32, on_broken="stop"), host, 0)
    told = [str(problem) for problem in caught.value.problems]
    assert len(told) == 5  # a small image is left out by choice, it is not broken
    assert (
        told[0]
        == "pictures: blank.png: its caption file blank.txt is empty; fix or remove it, or set on_broken to skip"
    )
    assert [line.split(": ")[1] for line in told] == [
        "blank.png",
        "cut.jpg",
        "empty.png",
        "page.png",
        "uncaptioned.png",
    ]


def test_a_folder_whose_captions_lie_elsewhere(pictures, host):
    for number in range(25):
        pictures(f"{number}.png", (64, 64), caption=None)
    with pytest.raises(
        UserError,
        match=r"none of 25 images .*; and 20 more\. Add a \.txt file next to each image, or set captions to 'filename'",
    ):
        build_index(pictures.config(), host, 0)
    with pytest.raises(UserError) as caught:
        build_index(pictures.config(on_broken="stop"), host, 0)
    assert len(caught.value.problems) == 21 and str(caught.value.problems[-1]).startswith("dataset: 5 more images")


def test_counts_of_what_was_done(pictures, host, events):
    pictures("fits.png", (64, 64), shade=1)
    pictures("large.png", (128, 128), shade=2)
    pictures("wide.png", (128, 64), shade=3)
    pictures("tiny.png", (32, 32), shade=4)
    shutil.copy(pictures.folder / "fits.png", pictures.folder / "twin.png")
    shutil.copy(pictures.folder / "fits.txt", pictures.folder / "twin.txt")
    report = build_index(pictures.config(crop_aspect="square"), host, 0).report
    assert (report["found"], report["used"], report["resized"], report["cropped"]) == (5, 5, 2, 1)
    assert [path.rsplit("tiny", 1)[1] for path in report["enlarged"]] == [".png"]
    assert len(report["duplicates"]) == 2 and report["buckets"] == {"64x64": 5}
    assert any("upscaled" in text for text in events.warnings()) and any(
        "duplicates" in text for text in events.warnings()
    )


def test_images_that_are_cropped_although_crop_is_off_are_counted(pictures, host, events):
    pictures("fits.png", (64, 60))
    pictures("panorama.png", (640, 64))
    report = build_index(pictures.config(crop=False), host, 0).report
    assert report["num_cropped_despite_off"] == 1 == report["cropped"]
    assert report["cropped_despite_off"][0].endswith("panorama.png")
    assert any("1 images are cropped although crop is off" in text for text in events.warnings())


def test_captions_and_trigger(mixed, host):
    index = build_index(mixed.config(min_size=32, trigger="sks"), host, 0)
    assert index.samples[0].captions == ("sks, a cat", "sks, a kitten") and index.report["triggers"] == ["sks"]


def test_without_text_files_the_names_do(mixed, host):
    index = build_index(mixed.config(captions="filename"), host, 0)
    assert {"猫", "blank", "uncaptioned"} < {sample.captions[0] for sample in index.samples}


def test_the_second_scan_reads_only_what_changed(pictures, host, monkeypatch):
    for i in range(4):
        pictures(f"{i}.png", shade=i)
    first = build_index(pictures.config(), host, 0)
    read, seen = FolderBackend.read, []
    monkeypatch.setattr(FolderBackend, "read", lambda self, name: seen.append(name) or read(self, name))
    assert build_index(pictures.config(), host, 0).digest == first.digest and seen == []
    pictures("2.png", (90, 60), shade=77)
    assert build_index(pictures.config(), host, 0).digest != first.digest and seen == ["2.png"]


def test_a_fault_that_is_gone_is_not_remembered(pictures, host, monkeypatch):
    pictures("a.png", shade=1)
    pictures("b.png", shade=2)
    read = FolderBackend.read

    def locked(self, name):
        if name == "b.png":
            raise PermissionError(13, "Permission denied")
        return read(self, name)

    monkeypatch.setattr(FolderBackend, "read", locked)
    report = build_index(pictures.config(), host, 0).report
    assert report["skipped"][0]["reason"] == "it can't be read (Permission denied)"
    monkeypatch.setattr(FolderBackend, "read", read)
    assert build_index(pictures.config(), host, 0).report["used"] == 2


def test_a_caption_that_can_not_be_read(pictures, host, monkeypatch):
    pictures("a.png", shade=1)
    pictures("b.png", shade=2)
    text = FolderBackend.caption_text

    def locked(self, name):
        if name == "b.png":
            raise PermissionError(13, "Permission denied")
        return text(self, name)

    monkeypatch.setattr(FolderBackend, "caption_text", locked)
    report = build_index(pictures.config(), host, 0).report
    assert report["skipped"][0]["reason"] == "its caption file can't be read (Permission denied)"


def test_a_damaged_memory_is_made_again(pictures, host):
    pictures("a.png")
    digest = build_index(pictures.config(), host, 0).digest
    (memory,) = (host.paths.cache / "index").iterdir()
    memory.write_text('{"a.png": [', encoding="utf-8")
    assert build_index(pictures.config(), host, 0).digest == digest


def test_the_digest_follows_all_that_is_trained(pictures, host):
    pictures("a.png", (128, 64), "a cat")
    configs = [{}, {"repeats": 2}, {"trigger": "sks"}, {"crop_style": "corner"}, {"resolution": 128}, {"crop": False}]
    base = {"crop_aspect": "square"}
    digests = [build_index(pictures.config(**base, **config), host, 0).digest for config in configs]
    assert len(set(digests)) == len(configs)
    (pictures.folder / "a.txt").write_text("a dog", encoding="utf-8")
    assert build_index(pictures.config(**base), host, 0).digest not in digests


def test_the_digest_does_not_depend_on_where_the_folder_lies(pictures, host, tmp_path):
    pictures("a.png")
    shutil.copytree(pictures.folder, tmp_path / "elsewhere")
    moved = DatasetConfig(parts=pictures.config().parts, roots=(str(tmp_path / "elsewhere"),))
    assert build_index(moved, host, 0).digest == build_index(pictures.config(), host, 0).digest


def test_several_parts_in_their_order(pictures, host, tmp_path):
    pictures("one/a.png", shade=1)
    pictures("two/a.png", shade=2)
    parts = (
        FolderConfig(folder="one", resolution=64, trigger="x"),
        FolderConfig(folder="two", resolution=128, trigger="y"),
    )
    config = DatasetConfig(parts=parts, roots=(str(pictures.folder / "one"), str(pictures.folder / "two")))
    index = build_index(config, host, 0)
    assert [(s.key, s.part, s.captions) for s in index.samples] == [
        ("0/a.png", 0, ("x, a picture",)), ("1/a.png", 1, ("y, a picture",)),
    ]  # fmt: skip
    assert index.read(index.samples[1]) == (pictures.folder / "two" / "a.png").read_bytes()
    assert index.report["triggers"] == ["x", "y"] and index.report["found"] == 2


def test_an_empty_part_is_named(pictures, host):
    pictures.folder.mkdir()
    with pytest.raises(
        UserError, match=r"^dataset: no images in 'pictures' or its subfolders; put files there that end in .avif"
    ):
        build_index(pictures.config(), host, 0)


def test_a_cancel_is_heard(pictures, host, monkeypatch):
    pictures("a.png")
    with pytest.raises(Cancelled):
        build_index(pictures.config(), type(host)(paths=host.paths, is_cancelled=lambda: True), 0)


def test_order_does_not_depend_on_threads(pictures, host, monkeypatch):
    monkeypatch.setattr(scans_module, "SLICE", 3)
    for i in range(10):
        pictures(f"{i:02}.png", shade=i)
    assert [sample.name for sample in build_index(pictures.config(), host, 0).samples] == [
        f"{i:02}.png" for i in range(10)
    ]
