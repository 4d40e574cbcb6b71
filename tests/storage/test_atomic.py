"""Renames wait for programs that hold a file for a moment."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.storage import atomic as files
from chroma_trainer.trainer_core.storage.atomic import remove_temporaries, rename, replace_atomic, write_atomic


@pytest.mark.parametrize("busy", [1, 5])
def test_a_file_that_is_let_go_is_replaced(tmp_path, monkeypatch, busy):
    replace, tries = os.replace, []

    def locked(source, target):
        tries.append(source)
        if len(tries) <= busy:
            raise PermissionError(13, "The process cannot access the file", str(target))
        replace(source, target)

    monkeypatch.setattr(files, "RENAME_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", locked)
    (tmp_path / "lora").write_text("old", "utf-8")
    write_atomic(tmp_path / "lora", "new")
    assert (tmp_path / "lora").read_text("utf-8") == "new" and len(tries) == busy + 1


def test_one_that_stays_locked_keeps_its_content(tmp_path, monkeypatch):
    def locked(source, target):
        raise PermissionError(13, "The process cannot access the file", str(target))

    monkeypatch.setattr(files, "RENAME_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", locked)
    (tmp_path / "lora").write_text("old", "utf-8")
    with pytest.raises(PermissionError, match="close other programs that have it open") as caught:
        write_atomic(tmp_path / "lora", "new")
    assert caught.value.filename == str(tmp_path / "lora")  # not that of the temporary file
    assert [path.name for path in tmp_path.iterdir()] == ["lora"] and (tmp_path / "lora").read_text("utf-8") == "old"


def test_other_faults_are_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "nothing", tmp_path / "target")


def test_the_temporary_file_lies_in_the_staging_folder(tmp_path):
    (tmp_path / "run").mkdir()
    seen = []

    def write(temporary):
        seen.append(temporary.parent)
        temporary.write_text("new", "utf-8")

    replace_atomic(tmp_path / "loras" / "a.safetensors", write, staging=tmp_path / "run")
    assert seen == [tmp_path / "run"] and list((tmp_path / "run").iterdir()) == []
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["a.safetensors"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left, fresh, kept = tmp_path / ".tmp-1.safetensors", tmp_path / ".tmp-2", tmp_path / "kept.safetensors"
    for path in (left, fresh, kept):
        path.write_bytes(b"x")
    os.utime(left, (0, 0))
    remove_temporaries(tmp_path, older_than=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-2", "kept.safetensors"]
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_temporary_file_that_is_open_too_hides_no_error(tmp_path, monkeypatch):
    def locked(*paths, **options):
        raise PermissionError(13, "The process cannot access the file", str(paths[0]))

    monkeypatch.setattr(files, "RENAME_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", locked)
    monkeypatch.setattr(Path, "unlink", locked)
    with pytest.raises(PermissionError) as caught:
        write_atomic(tmp_path / "lora", "new")
    assert caught.value.filename == str(tmp_path / "lora")


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_share_that_syncs_no_folders(tmp_path, monkeypatch, number, is_raised):
    fsync = os.fsync

    def sync_files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with pytest.raises(OSError, match="error") if is_raised else nullcontext():
        write_atomic(tmp_path / "lora", "new")
    assert (tmp_path / "lora").read_text("utf-8") == "new"


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Other tests run without the sync (tests/workshop.py)."""
    order, replace = [], os.replace

    def rename(*paths):
        order.append("rename")
        replace(*paths)

    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
    )
    monkeypatch.setattr(os, "replace", rename)
    write_atomic(tmp_path / "lora", "new")
    assert order == ["file", "rename", "folder"]
