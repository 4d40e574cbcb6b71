"""The copy without some images, and the table of captions: the dataset itself stays as it is."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import PurePosixPath

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.dataset_doctor.clean_copy import captions_table, free_folder, to_leave_out, write_copy
from chroma_trainer.trainer_core.dataset_doctor.examine_dataset import examine_dataset
from chroma_trainer.trainer_core.dataset_doctor.image_list import list_images
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from PIL import Image

from .conftest import dataset, scene
from .test_doctor_command import doctor  # noqa: F401


@pytest.fixture
def cats(folder, save):
    save("a.png", scene(0), "one")
    save("b.png", scene(0), "two")  # the same image
    (folder / "more").mkdir()
    save("more/c.png", scene(1), "three\nor four")
    Image.new("L", (128, 128), 255).save(folder / "more" / "c-masklabel.png")
    save("black.png", Image.new("RGB", (128, 128)), "five")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_copy_lacks_what_was_found(host, cats, tmp_path):
    before = files_of(cats)
    report, images = examine_dataset(dataset(cats), host)
    assert write_copy(images, to_leave_out(report), tmp_path / "clean", host) == 2
    expected = {"a.png", "a.txt", "more/c.png", "more/c.txt", "more/c-masklabel.png"}
    copied = files_of(tmp_path / "clean")
    assert copied == {name: before[name] for name in expected} and files_of(cats) == before
    clean, _ = examine_dataset(dataset(tmp_path / "clean"), host)
    assert clean.findings == () and clean.num_usable == 2


def test_kinds_can_be_chosen(host, cats):
    report, images = examine_dataset(dataset(cats), host)
    names = lambda *kinds: {images.images[n - 1].name for n in to_leave_out(report, kinds)}  # noqa: E731
    assert (names("exposure"), names("copies"), names("blurry")) == ({"black.png"}, {"b.png"}, set())
    with pytest.raises(UserError, match="'nothing' is no finding"):
        to_leave_out(report, ["nothing"])


def test_a_copy_replaces_nothing_and_is_whole_or_not_there(host, cats, tmp_path):
    _, images = examine_dataset(dataset(cats), host)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", "utf-8")
    for target, message in ((tmp_path / "full", "exists already"), (cats / "inside", "inside of the dataset")):
        with pytest.raises(UserError, match=message):
            write_copy(images, set(), target, host)
    with pytest.raises(UserError, match="no images; leave fewer out"):
        write_copy(images, {1, 2, 3, 4, 5}, tmp_path / "clean", host)

    def cancel() -> None:
        raise Cancelled

    object.__setattr__(host, "check_cancelled", cancel)
    with pytest.raises(Cancelled):
        write_copy(images, set(), tmp_path / "clean", host)
    assert {path.name for path in tmp_path.iterdir()} <= {"cats", "full", "out", "cache"}


def test_an_archive_becomes_a_folder(host, cats, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for name in ("a.png", "a.txt", "black.png", "black.txt"):
            tar.add(cats / name, name)
    report, images = examine_dataset(dataset(tars), host)
    write_copy(images, to_leave_out(report), tmp_path / "clean", host)
    files = {PurePosixPath(name).name: content for name, content in files_of(tmp_path / "clean").items()}
    assert files == {"a.png": (cats / "a.png").read_bytes(), "a.txt": b"one\n"}


@pytest.mark.parametrize("name", ["../../../stolen.png", "/../../../stolen.png"])
def test_no_name_in_an_archive_leads_out_of_the_copy(host, cats, tmp_path, name):
    """An archive may come from a stranger."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(cats / "a.png", "a.png")
        archive.add(cats / "b.png", name)
        archive.add(cats / "b.txt", name.replace(".png", ".txt"))
    images = list_images(dataset(folder), host)
    (stranger,) = (image for image in images.images if "stolen" in image.name)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"stolen\.png leads out of the folder of the copy"):
        write_copy(images, (), tmp_path / "deep" / "er" / "copy", host)
    assert files_of(tmp_path) == before
    assert write_copy(images, {stranger.number}, tmp_path / "deep" / "er" / "copy", host) == 1
    assert not [path for path in tmp_path.rglob("stolen*")]


def test_a_folder_is_listed_once_for_all_of_its_images(host, folder, save, tmp_path, monkeypatch):
    for number in range(12):
        save(f"{number}.png", scene(number), "a scene")
        Image.new("L", (128, 128), 255).save(folder / f"{number}-masklabel.png")
    images = list_images(dataset(folder), host)
    listed: list[str] = []

    def counting(call):
        return lambda path=".": listed.append(str(path)) or call(path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    assert write_copy(images, (), tmp_path / "copy", host) == 12
    assert sum(path == str(folder) for path in listed) <= 2  # the other time for the tables
    assert len(files_of(tmp_path / "copy")) == 36


def test_the_table_of_captions_is_read_back(host, cats):
    report, images = examine_dataset(dataset(cats), host)
    table = captions_table(report, images)
    rows = {row["file_name"]: row for row in map(json.loads, table.splitlines())}
    assert rows["black.png"] == {"file_name": "black.png", "text": "five", "findings": ["exposure"]}
    assert rows["more/c.png"]["text"] == ["three", "or four"] and "broken.png" not in rows
    (cats / "metadata.jsonl").write_text(table.replace("five", "a black square"), "utf-8")
    config = dataset(cats, captions="table")
    config = DatasetConfig(config.parts, config.roots, tables=(str(cats / "metadata.jsonl"),))
    _, again = examine_dataset(config, host)
    captions = {image.name: image.captions for image in again.images}
    assert captions["black.png"] == ("a black square",) and captions["more/c.png"] == ("three", "or four")


def test_free_names(tmp_path):
    assert free_folder(tmp_path, "people/anna").name == "anna-clean"
    (tmp_path / "anna-clean").mkdir()
    assert free_folder(tmp_path, "C:\\data\\anna\\").name == "anna-clean-2"
    assert free_folder(tmp_path, "s3://bucket/").name == "bucket-clean"


def test_the_command(doctor, cats, tmp_path):  # noqa: F811
    options = (
        "--resolution",
        128,
        "--copy",
        "clean",
        "--leave-out",
        "copies, unreadable",
        "--captions-list",
        "list.jsonl",
    )
    status, text, _ = doctor(cats, *options)
    assert status == 1 and "clean: 3 of 5 images" in text and "list.jsonl" in text
    assert len(list((tmp_path / "clean").rglob("*.png"))) == 4  # a mask too
    assert len((tmp_path / "list.jsonl").read_text("utf-8").splitlines()) == 4
    for arguments, message in (
        (("--leave-out", "copies"), "add --copy DIR"),
        (("--captions-list", "list.jsonl"), "exists already"),
        (("--copy", "clean"), "exists already"),
        (("--copy", "x", "--leave-out", "colors"), "'colors' is no finding"),
        (("--run", "nothing"), "no run 'nothing'"),
    ):
        status, _, error = doctor(cats, *arguments)
        assert status == 2 and message in error, arguments
    assert not (tmp_path / "x").exists()
