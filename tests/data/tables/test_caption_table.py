"""Captions, weights and boxes from one table, and from a .json file beside each image."""

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.nodes import dataset_backend
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.tables import table_files
from chroma_trainer.trainer_core.data.tables.caption_row import Columns
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.setup.caption_check import _captions

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def folder(pictures):
    """Three images without caption files: a.png, b.png and sub/c.png."""
    for name in ("a.png", "b.png", "sub/c.png"):
        pictures(name, (80, 60), caption=None)
    return pictures


@pytest.fixture
def index(folder, host):
    """index("metadata.csv", b"...", captions="table") writes that table and builds the index as the node asks for it."""

    def build(name: str, raw: bytes | None, **values):
        if raw is not None:
            (folder.folder / name).write_bytes(raw)
        return build_index(dataset_of(folder, **{"captions": "table", **values}), host, 0)

    return build


def dataset_of(folder, **values) -> DatasetConfig:
    inputs = dataset_backend.Inputs(**{"folder": "pictures", "resolution": 64, **values})
    paths = Paths(output=folder.folder, cache=folder.folder, datasets=(folder.folder.parent,))
    return dataset_backend.run(inputs, SinkHost(paths=paths))[0]


def captions(index) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in index.samples}


def test_names_are_the_same_in_both_spellings_of_unicode(pictures, host):
    """As on macOS, or in archives from there: é is one character, or e and an accent."""
    spellings = [unicodedata.normalize(form, name) for name in ("café.png", "がんばれ.png") for form in ("NFC", "NFD")]
    for spelling in (spellings[0], spellings[3]):
        pictures(spelling, (80, 60), caption=None)
    rows = [{"file_name": spellings[1], "text": "one"}, {"file_name": spellings[2].removesuffix(".png"), "text": "two"}]
    (pictures.folder / "metadata.jsonl").write_bytes(jsonl(*rows))
    found = captions(build_index(dataset_of(pictures, captions="table"), host, 0))
    assert found == {spellings[0]: ("one",), spellings[3]: ("two",)}


EXPECTED = {"a.png": ("a cat",), "b.png": ("a dog, red",), "sub/c.png": ("ein Fuß",)}
THREE = (("a.png", "a cat"), ("b.png", "a dog, red"), ("sub/c.png", "ein Fuß"))


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("metadata.jsonl", jsonl(*({"file_name": n, "text": t} for n, t in THREE))),  # imagefolder of Hugging Face
        ("metadata.jsonl", b"\xef\xbb\xbf" + jsonl(*({"text": t, "file_name": n} for n, t in THREE)) + b"\n \r\n  "),
        ("metadata.csv", "file_name,text\na.png,a cat\nb.png,\"a dog, red\"\n\nsub/c.png,ein Fuß\n".encode()),
        ("metadata.csv", "image,prompt\r\na.png,a cat\r\nb.png,\"a dog, red\"\r\nsub/c.png,ein Fuß\r\n".encode("utf-16")),
        ("metadata.csv", "image;prompt\na.png;a cat\nb.png;a dog, red\nsub\\c.png;ein Fuß\n".encode("cp1252")),
        ("captions.tsv", "image\tprompt\na\ta cat\nb\ta dog, red\nc\tein Fuß\n".encode()),
        (  # kohya's meta_cap.json with --full_path, of another machine, and without extensions
            "meta_cap.json",
            json.dumps({"/data/x/a": {"caption": "a cat"}, "/data/x/b": {"caption": "a dog", "tags": "red"},
                        "/data/x/sub/c": {"tags": "ein Fuß"}}).encode(),
        ),
        ("captions.json", json.dumps(dict(THREE)).encode()),
        ("captions.json", json.dumps([{"image": f"./{n}", "prompt": t} for n, t in THREE]).encode()),
        (  # Chroma's own
            "captions.jsonl",
            jsonl(*({"filename": n, "caption_or_tags": t, "width": 80, "height": 60, "is_tag_based": False,
                     "loss_weight": 1.0} for n, t in THREE)),
        ),
    ],
)  # fmt: skip
def test_tables_of_the_usual_forms_are_taken_as_they_are(index, name, raw):
    built = index(name, raw)
    assert captions(built) == EXPECTED
    assert built.report["tables"] == [{"table": name, "unused_rows": 0, "example": ""}]


def test_a_table_equals_caption_files(index, folder, host):
    """The digest, and with it every byte of a run, is that of the same captions in .txt files."""
    table = index("metadata.jsonl", jsonl(*({"file_name": n, "text": t, "loss_weight": 1} for n, t in THREE)))
    for name, text in THREE:
        (folder.folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    assert build_index(folder.config(), host, 0).digest == table.digest


def test_columns_are_several_captions_or_alternatives(index):
    rows = jsonl(
        {"file_name": "a.png", "long": "a big cat", "short": ["cat", "kitten"]},
        {"file_name": "b.png", "long": "", "short": "dog"},
        {"file_name": "c.png", "long": None, "short": None, "other": 1},
    )
    built = index("metadata.jsonl", rows, caption_column="long, short")
    assert captions(built) == {"a.png": ("a big cat", "cat", "kitten"), "b.png": ("dog",)}
    assert built.report["skipped"][0]["reason"] == "its caption in metadata.jsonl is empty"
    assert captions(index("metadata.jsonl", None, caption_column="long|short"))["b.png"] == ("dog",)
    assert captions(index("metadata.jsonl", None, caption_column="long + short"))["a.png"] == (
        "a big cat, cat, kitten",
    )


def test_weights_sizes_and_tags_of_chromas_own_format(index):
    rows = [{"filename": n, "caption_or_tags": "u, v, w, x, y, z", "width": 80, "height": 60, "is_tag_based": i == 1,
             "loss_weight": (1.0, 0.5, "2")[i]} for i, (n, _) in enumerate(THREE)]  # fmt: skip
    built = index("captions.jsonl", jsonl(*rows[:2], rows[2] | {"width": 81}), tag_orders=4)
    assert [sample.loss_weight for sample in built.samples] == [1.0, 0.5, 2.0]
    assert [len(sample.captions) for sample in built.samples] == [1, 4, 1]  # tags alone are shuffled
    assert (built.report["num_weighted"], built.report["table_sizes_differ"]) == (2, 1)
    assert built.digest != index("captions.jsonl", jsonl(*rows[:2], rows[2] | {"loss_weight": 3}), tag_orders=4).digest


def test_rows_and_images_without_each_other_are_named(index, events):
    built = index("metadata.jsonl", jsonl({"file_name": "a.png", "text": "a cat"}, {"file_name": "z.png", "text": "x"}))
    assert captions(built) == {"a.png": ("a cat",)}
    reason = "metadata.jsonl has no row for it (its first row is for 'a.png')"
    assert [entry["reason"] for entry in built.report["skipped"]] == [reason] * 2
    assert "1 rows of metadata.jsonl name no image of the folder, such as 'z.png'" in events.warnings()
    with pytest.raises(UserError, match="has no row for it"):
        index("metadata.jsonl", None, on_broken="stop")


def test_one_row_for_two_images_is_no_guess(index, folder):
    folder("sub/a.png", (80, 60), caption=None)
    built = index("metadata.jsonl", jsonl({"file_name": "c.png", "text": "x"}, {"file_name": "sub/a", "text": "sub"}))
    assert captions(built)["sub/a.png"] == ("sub",)
    folder("other/c.png", (80, 60), caption=None)
    skipped = index("metadata.jsonl", None).report["skipped"]
    assert sum("is that of another image too" in entry["reason"] for entry in skipped) == 2


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": "1"}, {"file_name": "a.png", "text": "2"}),
         "table: metadata.jsonl has 1 rows too many: rows 1 and 2 both name 'a.png'; remove one"),
        ("metadata.jsonl", b'{"file_name": "a.png"', "line 1 is not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"} {"file_name": "b.png"}', "write one row on each line"),
        ("metadata.jsonl", b"\n  x", "line 2 is not JSON: Expecting value"),
        ("metadata.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("metadata.jsonl", b"\n\n", "has no rows"),
        ("metadata.jsonl", b'{"a":' * 5000, "nested more than 100 levels deep"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x\0"}', "line 1 contains a NUL character"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": "x\0"}), "row 1: its caption contains a NUL character"),
        ("metadata.jsonl", b'{"file_name": "' + b"x" * 3_000_000, "line 1 has more than 1,048,576 characters"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": 7}), "its text is 7, not a text"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": "x", "loss_weight": "much"}),
         "row 1: its loss_weight is 'much', not a number from 0 to 1000"),
        ("metadata.jsonl", jsonl({"file_name": None, "text": "x"}, {"file_name": "a.png", "text": "x", "loss_weight": -1}),
         "row 1: it names no file; row 2: its loss_weight is -1"),
        ("metadata.csv", b"file_name,text,text\na.png,1,2\n", "two columns named 'text'"),
        ("metadata.csv", b"file_name,text\na.png,a cat, red\n", "line 2 has 3 values, but there are 2 columns"),
        ("metadata.csv", b"name,words\na.png,x\n", "has none of the columns file_name, .* it has|set file_column"),
        ("metadata.csv", b"file_name,words\na.png,x\n", "set caption_column to one of its own: file_name, words"),
        ("metadata.csv", "file_name,text\na.png,\u732b\u306e\u7d75\n".encode("shift-jis"), "save it as UTF-8"),
        ("metadata.csv", b"\xff\xfef\0i", "not valid|has none"),
        ("captions.json", b'"a"', "is neither a list of rows nor an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said_before_anything_is_trained(index, name, raw, message):
    with pytest.raises(UserError, match=message):
        index(name, raw)


def test_a_line_of_100_mb_is_not_read_whole(index, folder):
    import tracemalloc

    with (folder.folder / "metadata.jsonl").open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    with pytest.raises(UserError, match="has more than 1,048,576 characters"):
        index("metadata.jsonl", None)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_an_unknown_column_is_named_with_those_there_are(index):
    with pytest.raises(
        UserError,
        match="has no column 'captoin', which caption_column names; it has file_name, caption; did you mean 'caption'",
    ):
        index("metadata.jsonl", jsonl({"file_name": "a.png", "caption": "x"}), caption_column="captoin")


def test_the_table_is_found_or_named(index, folder, tmp_path):
    with pytest.raises(UserError, match=r"table: is empty, and 'pictures' has none of metadata.jsonl"):
        index("notes.txt", b"")
    with pytest.raises(UserError, match=r"'metadat.csv' is not a file in 'pictures'; did you mean 'metadata.csv'"):
        index("metadata.csv", b"file_name,text\na.png,x\n", table="metadat.csv")
    with pytest.raises(UserError, match="outside the allowed folders"):
        index("metadata.csv", None, table="../../../etc/passwd")
    (tmp_path / "elsewhere.csv").write_bytes(b"file_name,text\nb.png,from beside\n")
    assert captions(index("metadata.csv", None, table="../elsewhere.csv")) == {"b.png": ("from beside",)}
    with pytest.raises(UserError, match=r"has the ending '.txt'"):
        index("notes.txt", b"x", table="notes.txt")


def test_names_are_relative_to_the_folder_of_the_table(index, folder):
    """As in a dataset of Hugging Face with a metadata.jsonl in each split."""
    folder("c.png", (80, 60), caption=None)
    rows = jsonl({"file_name": "c.png", "text": "of the table's folder"})
    assert captions(index("sub/metadata.jsonl", rows, table="sub/metadata.jsonl")) == {
        "sub/c.png": ("of the table's folder",)
    }


def test_a_table_beside_caption_files_gives_weights_alone(index, folder):
    (folder.folder / "a.txt").write_text("from the file", encoding="utf-8")
    built = index("w.csv", b"file_name,loss_weight\na.png,0.25\n", captions="textfile", table="w.csv")
    assert captions(built) == {"a.png": ("from the file",)} and built.samples[0].loss_weight == 0.25


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"caption": "a cat", "score": 3}', ("a cat",)), (b'"a cat"', ("a cat",)), (b'["a", "b"]', ("a", "b")),
        (b'\xef\xbb\xbf{"text": " a cat "}', ("a cat",)),
        (b'{"title": "a cat"}', "its caption file a.json: has none of the columns caption, text"),
        (b'{"caption": ""}', "its caption file a.json has an empty caption"), (b"{", "its caption file a.json: is not JSON"),
        (b"7", "its caption file a.json: is neither an object nor a text"), (None, "its caption file a.json is missing"),
    ],
)  # fmt: skip
def test_a_json_file_beside_each_image(index, folder, raw, expected):
    if raw is not None:
        (folder.folder / "a.json").write_bytes(raw)
    (folder.folder / "b.json").write_bytes(b'{"caption": "b", "loss_weight": 0.5}')
    built = index("unused", None, captions="json file")
    assert captions(built)["b.png"] == ("b",) and built.samples[-1].loss_weight == 0.5
    if isinstance(expected, tuple):
        assert captions(built)["a.png"] == expected
    else:
        assert built.report["skipped"][0]["reason"].startswith(expected)


def test_check_reads_the_same_captions(index, folder):
    index("metadata.jsonl", jsonl(*({"file_name": n, "text": t} for n, t in THREE)))
    listed = [text for _, text in _captions(dataset_of(folder, captions="table", trigger="sks"), [])]
    assert listed == [f"sks, {text}" for _, text in THREE]


def test_parquet_without_pyarrow_names_the_command(index, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"pyarrow is not installed; run pip install pyarrow, or pip install .*\[parquet\]"
    ):
        index("metadata.parquet", b"PAR1")


@pytest.mark.skipif(not HAS_PYARROW, reason="pyarrow is not installed")
def test_parquet_with_whole_numbers_and_lists(index, folder):
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    for number in (7, 8):
        folder(f"{number}.png", (80, 60), caption=None)
    rows = {"id": [7, 8], "captions": [["a cat", "a kitten"], ["a dog"]], "image_bytes": [b"x" * 100] * 2}
    parquet.write_table(pyarrow.table(rows), folder.folder / "metadata.parquet")
    assert captions(index("metadata.parquet", None, caption_column="captions")) == {
        "7.png": ("a cat", "a kitten"), "8.png": ("a dog",),
    }  # fmt: skip
    with pytest.raises(UserError, match="is not a valid parquet file"):
        index("metadata.parquet", b"PAR1 but not really")


def test_fields_that_do_not_fit_together_are_problems():
    part = dataset_backend.Inputs(captions="table")
    assert not part.problems()
    bad = replace(part, captions="filename", caption_column="text", file_column="image")
    assert [problem.field for problem in bad.problems()] == ["caption_column", "file_column"]


def test_a_row_is_read_alike_in_both_ways():
    """The short way for a caption alone, and the long one."""
    part = dataset_backend.Inputs(captions="table")
    for text in ("a cat", " a cat\n", "", " ", "ß"):
        values = {"file_name": "a.png", "text": text}
        columns = Columns(part, values, True)
        assert columns.pack(values) == b"".join(b"\0" + t.encode() for t in columns.row(values).captions)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'file_name,text\na.png,"two\nlines"\nb.png,x\n')
    assert [number for number, _ in table_files.table_rows(path)] == [3, 4]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.json"])
def test_damaged_tables_are_errors_of_the_user(index, name):
    """Bytes that are changed, removed or doubled at random: an index or a UserError, and nothing else."""
    whole = {
        "metadata.jsonl": jsonl(
            *({"file_name": n, "text": t, "loss_weight": 0.5, "boxes": [[0, 0, 9, 9]]} for n, t in THREE)
        ),
        "metadata.csv": b'file_name,text,boxes\na.png,a cat,"[[0, 0, 9, 9]]"\nb.png,"a dog, red",\n',
        "captions.json": json.dumps({n: {"caption": t, "tags": ["x"]} for n, t in THREE}).encode(),
    }[name]
    draw = random.Random(7)
    outcomes = Counter[str]()
    for _ in range(120):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place, length = draw.randrange(len(raw)), draw.randint(1, 9)
            piece = draw.choice(
                (b"", draw.randbytes(length), raw[place : place + length] * 2, b'"', b"\xff", b"{[", b"9" * 50)
            )
            raw[place : place + length] = piece
        try:
            index(name, bytes(raw), crop_style="boxes")
            outcomes["index"] += 1
        except UserError as error:
            assert len(str(error)) < 5000
            outcomes["error"] += 1
    assert min(outcomes["index"], outcomes["error"]) > 5
