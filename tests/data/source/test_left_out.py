"""Every file that could be an image is used, or the reason why not is reported."""

from __future__ import annotations

import os
import sys
import types

import pytest
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.source import formats
from chroma_trainer.trainer_core.data.source.backend import printable_name
from chroma_trainer.trainer_core.data.source.folder import FolderBackend
from chroma_trainer.trainer_core.errors import UserError
from PIL import Image


@pytest.fixture
def used(pictures, host, events):
    """used() indexes the folder and returns (names that are used, {name: reason} of the others, warnings)."""

    def index(**settings):
        result = build_index(pictures.config(**settings), host, 0)
        skipped = {os.path.basename(entry["image"]): entry["reason"] for entry in result.report["skipped"]}
        return [sample.name for sample in result.samples], skipped, result.report, events.warnings()

    return index


def test_formats_without_a_reader_name_the_package(pictures, used):
    pictures("a.png")
    for name in ("b.heic", "c.JXL", "d.psd", "e.cr2", "notes.md", "clip.mp4", ".f.heic"):
        (pictures.folder / name).write_bytes(b"x")
    names, skipped, report, _ = used()
    assert names == ["a.png"] and report["found"] == 5
    assert skipped["b.heic"] == (
        'reading HEIC needs a package; run pip install pillow-heif, or pip install "chroma-trainer[formats]"'
    )
    assert "pillow-jxl-plugin" in skipped["c.JXL"] and "image editor" in skipped["d.psd"]
    assert skipped["e.cr2"] == "it is a raw file of a camera, which can't be read; save it as PNG"
    with pytest.raises(UserError) as caught:
        used(on_broken="stop")
    assert len(caught.value.problems) == 4 and "b.heic: reading HEIC" in str(caught.value)


def test_a_folder_of_unreadable_images_says_so(pictures, used):
    pictures.folder.mkdir()
    (pictures.folder / "b.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in 'pictures'.*b.heic: reading HEIC needs a package"):
        used()


def test_an_installed_plugin_is_used(pictures, used, monkeypatch):
    """A stand-in for pillow_heif, which registers an opener as the package does."""
    plugin = types.ModuleType("pillow_heif")
    plugin.__spec__ = types.SimpleNamespace(name="pillow_heif")  # type: ignore[assignment]
    registered = []
    plugin.register_heif_opener = lambda: registered.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    for function in (formats.readable_suffixes, formats.register_plugins):
        function.cache_clear()
    try:
        pictures("a.png").rename(pictures.folder / "a.heic")
        assert used()[0] == ["a.heic"] and registered == [True]
    finally:
        monkeypatch.undo()
        for function in (formats.readable_suffixes, formats.register_plugins):
            function.cache_clear()


def test_avif_needs_a_newer_pillow(pictures, used, monkeypatch):
    pictures("a.png")
    (pictures.folder / "b.avif").write_bytes(b"x")
    monkeypatch.setattr(formats, "_reads_avif", lambda: False)
    assert used()[1] == {"b.avif": "reading AVIF needs Pillow 11.3 or newer; run pip install -U pillow"}


def test_jfif_is_jpeg(pictures, used):
    pictures("a.jpg").rename(pictures.folder / "a.JFIF")
    assert used()[0] == ["a.JFIF"]


def test_links(pictures, used, tmp_path):
    pictures("a.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "elsewhere" / "c.png")
    os.symlink(tmp_path / "elsewhere", pictures.folder / "linked")
    os.symlink("gone.png", pictures.folder / "dangling.png")
    os.symlink(pictures.folder, pictures.folder / "loop")
    names, skipped, report, warnings = used()
    assert names == ["a.png"] and skipped == {"dangling.png": "it is a link to a file that does not exist"}
    (entry,) = report["left_out"]
    assert entry["what"].startswith("links to folders, which are not followed: add the folder itself")
    assert any("left out" in text and "links to folders" in text for text in warnings)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_opened(pictures, used):
    pictures("a.png")
    os.mkfifo(pictures.folder / "pipe.png")
    assert used()[1] == {"pipe.png": "it is not a regular file"}


FOREIGN = {
    "@eaDir/a.jpg/SYNOFILE_THUMB_M.jpg": "thumbnails of a Synology NAS",
    "#recycle/old.jpg": "the recycle bin of a NAS",
    "$RECYCLE.BIN/gone.jpg": "the recycle bin of Windows",
    "__MACOSX/._a.jpg": "metadata of a macOS archive",
    "sub/.thumbnails/t.png": "thumbnails",
    ".Trash-1000/files/b.png": "a trash folder",
    ".cache/d.png": "hidden folders (their names start with a dot)",
    "._a.jpg": "hidden files (their names start with a dot)",
    "a-masklabel.png": "OneTrainer's masks (*-masklabel): to use them, set masks to the folder of the images",
    "a-condlabel.png": "OneTrainer's conditioning images (*-condlabel)",
}


def test_folders_and_files_of_other_tools_are_left_out_and_reported(pictures, used):
    pictures("a.jpg")
    for name in FOREIGN:
        pictures(name, caption=None)
    (pictures.folder / ".git").mkdir()  # without images, so there is nothing to report
    names, skipped, report, warnings = used(captions="instance prompt", instance_prompt="a cat")
    assert names == ["a.jpg"] and skipped == {} and report["found"] == 1
    assert {entry["what"] for entry in report["left_out"]} == set(FOREIGN.values())
    assert all(entry["images"] == 1 for entry in report["left_out"])
    assert sum(text.startswith("left out 1 images: ") for text in warnings) == len(FOREIGN)


def test_masks_of_onetrainer_are_offered_as_masks(pictures, host, events):
    for name in ("a", "b"):
        pictures(f"{name}.jpg")
        Image.new("L", (80, 60), 255).save(pictures.folder / f"{name}-masklabel.png")
    config = pictures.config(masks="pictures")
    config = type(config)(config.parts, config.roots, mask_roots=config.roots)
    index = build_index(config, host, 0)
    assert [sample.name for sample in index.samples] == ["a.jpg", "b.jpg"]
    assert index.masks and [mask.captions[0] for mask in index.masks.samples] == ["a-masklabel.png", "b-masklabel.png"]


needs_bytes = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode here")


@needs_bytes
def test_names_that_are_not_utf8_are_used_and_printed_escaped(pictures, used, host):
    pictures("plain.png")
    name = os.fsdecode("кот".encode("cp1251"))
    pictures("b.png").rename(pictures.folder / f"{name}.png")
    (pictures.folder / "b.txt").rename(pictures.folder / f"{name}.txt")
    (pictures.folder / f"{name}-2.png").write_bytes(b"")
    names, skipped, _, warnings = used()
    assert names == ["plain.png", f"{name}.png"]
    assert skipped == {"\\xea\\xee\\xf2-2.png": "the file is empty"}
    assert all(text.isprintable() for text in warnings)
    _, skipped, _, _ = used(captions="filename")
    assert skipped["\\xea\\xee\\xf2.png"].startswith("its name is its caption, and is not UTF-8")


def test_control_characters_of_names_are_printed_escaped():
    assert printable_name("a\x1b[31m\n.png") == "a\\x1b[31m\\x0a.png"
    assert printable_name("größe 猫 .png") == "größe 猫 .png"


@needs_bytes
def test_a_folder_that_cannot_be_listed_is_reported(pictures, used, monkeypatch):
    pictures("a.png")
    pictures("locked/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert used()[1] == {"locked": "the folder can't be read (Permission denied)"}


def test_has_images_agrees_with_the_list(pictures):
    pictures.folder.mkdir()
    for name in ("@eaDir/a.jpg", "a-masklabel.png"):
        pictures(name)
    assert not FolderBackend(pictures.folder).has_images() and not len(FolderBackend(pictures.folder).entries())
    pictures("sub/deep/b.png")
    assert FolderBackend(pictures.folder).has_images() and len(FolderBackend(pictures.folder).entries()) == 1
