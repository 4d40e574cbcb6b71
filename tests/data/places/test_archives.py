"""Images in tar archives and in parquet files, in a folder and in a store."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.data.places.open_source import open_source
from chroma_trainer.trainer_core.errors import UserError

from .conftest import captions, index_of, png


def write_tar(path, members, mode: Any = "w"):
    """Write (name, bytes) pairs; a text in place of bytes is the target of a link."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def shard(first, count):
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:04}.png", png(number)), (f"{number:04}.txt", f"cat {number}".encode()))
    ]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cats"
    path.mkdir()
    return path


def skipped(index):
    return {entry["image"].rpartition("/cats/")[2]: entry["reason"] for entry in index.report["skipped"]}


def test_shards_of_a_folder(folder, host):
    write_tar(folder / "00000.tar", shard(0, 3))
    write_tar(folder / "00001.tar", shard(3, 2))
    index = index_of(host(), folder)
    assert captions(index) == {f"0000{n // 3}.tar/{n:04}.png": (f"cat {n}",) for n in range(5)}
    assert [index.read(sample) for sample in index.samples] == [png(n) for n in range(5)]


def test_captions_in_json_and_names_with_several_endings(folder, host):
    write_tar(
        folder / "a.tar",
        [
            ("./x/1.seg.png", png(1)),
            ("./x/1.json", b'{"caption": "one"}'),
            ("2.png", png(2)),
            ("2.json", b'{"text": "two"}'),
        ],
    )
    index = index_of(host(), folder, captions="json file")
    assert captions(index) == {"a.tar/x/1.seg.png": ("one",), "a.tar/2.png": ("two",)}


def test_every_odd_member_is_accounted_for(folder, host):
    members = [
        ("0.png", png(0)), ("0.txt", b"a"), ("0.png", png(1)), ("1.png", "0.png"), ("2.psd", b"x"), ("3.png", b"no image"),
        ("3.txt", b"a"), ("__MACOSX/._0.png", b"x"), ("._0.png", b"x"), ("4.png", png(4)),
    ]  # fmt: skip
    write_tar(folder / "a.tar", members)
    index = index_of(host(), folder)
    assert list(captions(index)) == ["a.tar/0.png"] and index.read(index.samples[0]) == png(0)
    reasons = skipped(index)
    assert "another member of this name" in reasons["a.tar/0.png"] and "it is a link" in reasons["a.tar/1.png"]
    assert "image editor" in reasons["a.tar/2.psd"] and "not an image" in reasons["a.tar/3.png"]
    assert reasons["a.tar/4.png"] == "its caption file 4.txt is missing"
    assert index.report["found"] == 1 + len(reasons)


@pytest.mark.parametrize("where", [0.5, 0.97])
def test_an_archive_that_is_cut_off(folder, host, where):
    whole = write_tar(folder / "a.tar", shard(0, 4)).read_bytes()
    (folder / "a.tar").write_bytes(whole[: int(whole.index(b"0003.txt") * where)])
    index = index_of(host(), folder)
    assert 0 < len(index.samples) < 4
    assert any("cut off" in reason for reason in skipped(index).values()), skipped(index)


def test_damaged_headers_are_faults(folder, host):
    """Sizes of 96 bits, and negative ones, which would lead back."""
    whole = bytearray(write_tar(folder / "a.tar", shard(0, 3)).read_bytes())
    for name, size in (("b", b"\x80" + b"\x7f" * 11), ("c", b"\xff" * 10 + b"\xf0\x00")):
        start = bytes(whole).index(b"0001.png")
        damaged = bytearray(whole)
        damaged[start + 124 : start + 136] = size
        total = 256 + sum(damaged[start : start + 148]) + sum(damaged[start + 156 : start + 512])
        damaged[start + 148 : start + 156] = b"%06o\0 " % total
        (folder / f"{name}.tar").write_bytes(damaged)
    index = index_of(host(), folder)
    assert {name[:5] for name in captions(index)} == {"a.tar", "b.tar", "c.tar"} and len(index.samples) == 5
    assert all(any(f"{name}.tar" in place for place in skipped(index)) for name in "bc"), skipped(index)


def test_what_is_no_tar(folder, host):
    (folder / "a.tar").write_bytes(b"hello" * 1000)
    write_tar(folder / "b.tar", shard(0, 2), "w:gz")
    with pytest.raises(UserError, match=r"no images in 'cats'.*a.tar: the archive is damaged.*b.tar: the archive"):
        index_of(host(), folder)


def test_a_folder_with_images_is_read_as_such(folder, host, monkeypatch):
    """And not searched for archives, which takes seconds where there are a million files."""
    monkeypatch.setattr(Path, "rglob", None)
    write_tar(folder / "a.tar", shard(0, 2))
    (folder / "b.png").write_bytes(png(5))
    (folder / "b.txt").write_text("five")
    assert captions(index_of(host(), folder)) == {"b.png": ("five",)}


def test_archives_in_a_bucket(s3, host, tmp_path):
    raw = write_tar(tmp_path / "a.tar", shard(0, 5)).read_bytes()
    s3.files = {"pictures/cats/a.tar": raw, "pictures/cats/README.md": b"cats"}
    s3.fault = lambda number, path: "cut" if path.endswith(".tar") and number < 4 else None
    index = index_of(host("s3://pictures"), "s3://pictures/cats")
    assert captions(index)["a.tar/0004.png"] == ("cat 4",) and index.read(index.samples[4]) == png(4)
    assert index.samples[0].path == "s3://pictures/cats/a.tar/0000.png"
    count = len(s3.log)
    index_of(host("s3://pictures"), "s3://pictures/cats")
    assert not s3.downloads(count)


def write_parquet(path, rows, group=2):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def parquet_row(number):
    image = {"bytes": png(number), "path": f"{number}.png"}
    return {"image": image, "text": f"cat {number}\nasleep", "short": f"c{number}", "width": 64}


def test_parquet_files_with_images(folder, host):
    write_parquet(folder / "train-00000.parquet", [parquet_row(number) for number in range(5)])
    write_parquet(folder / "train-00001.parquet", [parquet_row(number) for number in range(5, 7)])
    index = index_of(host(), folder)
    assert [index.read(sample) for sample in index.samples] == [png(number) for number in range(7)]
    assert captions(index)["train-00000.parquet/000004.png"] == ("cat 4\nasleep",)
    other = index_of(host(), folder, captions="table", caption_column="short, text")
    assert captions(other)["train-00001.parquet/000001.png"] == ("c6", "cat 6\nasleep")


def test_parquet_files_in_a_bucket_and_rows_without_images(s3, host, tmp_path):
    rows = [
        parquet_row(0),
        {**parquet_row(1), "image": {"bytes": None, "path": "1.png"}},
        {**parquet_row(2), "text": None},
    ]
    raw = write_parquet(tmp_path / "a.parquet", rows).read_bytes()
    s3.files = {"pictures/cats/data/a.parquet": raw}
    index = index_of(host("s3://pictures"), "s3://pictures/cats")
    assert list(captions(index)) == ["data/a.parquet/000000.png"]
    reasons = [entry["reason"] for entry in index.report["skipped"]]
    assert any("row has no image" in reason for reason in reasons) and any(
        "its row has an empty caption" in reason for reason in reasons
    )


def test_a_parquet_file_without_images(folder, host):
    write_parquet(folder / "a.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"a.parquet has no column with images \(text, label\)"):
        index_of(host(), folder)


def test_parquet_needs_a_package(folder, host, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (folder / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        index_of(host(), folder)


def test_the_index_of_many_members_is_read_without_the_images(folder, host, monkeypatch):
    path = write_tar(folder / "a.tar", [(f"{number}.png", bytes(5000)) for number in range(2000)])
    source = open_source(str(folder), host())
    assert len(source.entries()) == 2000 and path.stat().st_size > 10_000_000
    assert json.dumps(source.left_out.unreadable) == "[]"
