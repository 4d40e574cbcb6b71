"""A folder as a backend: names, order, captions."""

from __future__ import annotations

import os

from chroma_trainer.trainer_core.data.source.folder import FolderBackend


def test_every_image_of_the_folder_and_its_subfolders_in_one_order(tmp_path):
    names = ["b.PNG", "a.jpg", "sub/c.webp", "sub/deep/ä ö.gif", "日本語/猫.png", "e.jpeg", "f.tif", "g.avif", "x.bmp"]
    others = ["a.txt", "notes.md", ".hidden.png", ".cache/d.png", "sub/._c.webp", "model.safetensors"]
    for name in [*names, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [entry.name for entry in FolderBackend(tmp_path).entries()] == sorted(names)


def test_a_stamp_changes_with_the_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    before = FolderBackend(tmp_path).entries()[0].stamp
    assert FolderBackend(tmp_path).entries()[0].stamp == before
    os.utime(path, ns=(1, 1))
    assert FolderBackend(tmp_path).entries()[0].stamp != before


def test_the_caption_file_has_the_images_name(tmp_path):
    (tmp_path / "größe.v2.png").write_bytes(b"x")
    (tmp_path / "größe.v2.txt").write_text("eine Größe", encoding="utf-8")
    backend = FolderBackend(tmp_path)
    assert backend.caption_text("größe.v2.png")[0] == "eine Größe"
    assert backend.caption_text("other.png") == (None, "")
    assert backend.read("größe.v2.png") == b"x"


def test_an_empty_folder_has_no_entries(tmp_path):
    assert list(FolderBackend(tmp_path).entries()) == []
