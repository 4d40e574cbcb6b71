"""Files and arguments that may be anything: one line and exit status 2, before anything is loaded; never a traceback."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.data.source.decode import BrokenImage, decode
from chroma_trainer.trainer_core.data.source.folder import FolderBackend
from chroma_trainer.trainer_core.data.source.integrity import upright_size
from chroma_trainer.trainer_core.data.source.text_encoding import MAX_BYTES, UnreadableText
from chroma_trainer.trainer_core.errors import printable
from chroma_trainer.trainer_core.storage import safetensors_header
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from PIL import Image

RECORD = {
    "request": {
        "training": {"name": "cat", "rank": 4},
        "model": {"family": "chroma", "flavour": "nano", "repo": "x", "dtype": "fp32", "quantization": {"level": "none"}},
    },
    "versions": {"torch": "2"}, "dataset": {"digest": "0" * 64, "images": 3}, "trigger": "sks", "step": 7,
}  # fmt: skip


def lora(path: Path, metadata: object = None, tensors: Any = None, data: bytes = b"", raw: bytes | None = None) -> Path:
    """A safetensors file with any header."""
    header = {**({} if metadata is None else {"__metadata__": metadata}), **({} if tensors is None else tensors)}
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


TENSOR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
INSPECTED = {
    "a sound one": ({"chroma_trainer": json.dumps(RECORD), "prompt": "{}"}, TENSOR, b"12345678", "sks"),
    "a plain text as prompt": ({"prompt": "a cat"}, TENSOR, b"12345678", "prompt: a cat"),
    "a record that is cut": ({"chroma_trainer": '{"request": '}, TENSOR, b"12345678", "damaged   its metadata chroma_trainer"),
    "a record that is a list": ({"chroma_trainer": "[1]"}, TENSOR, b"12345678", "is not a JSON object"),
    "a deep record": ({"chroma_trainer": "[" * 900}, TENSOR, b"12345678", "not written by ChromaTrainer"),
    "a record without its parts": ({"chroma_trainer": '{"request": {}}'}, TENSOR, b"12345678", "base      unknown"),
    "a record of other types": (
        {"chroma_trainer": '{"request": {"model": [1], "training": "x"}, "versions": 3, "dataset": null, "step": {}}'},
        TENSOR, b"12345678", "base      unknown",
    ),
    "a record with other entries": ({"chroma_trainer": '{"file": 1, "metadata": 2}'}, TENSOR, b"12345678", "tensors"),
    "a workflow of other types": ({"chroma_trainer": "{}", "prompt": '{"1": 5}'}, TENSOR, b"12345678", "1 (unknown)"),
    "metadata that are no texts": ({"a": 1, "b": "kept"}, TENSOR, b"12345678", "b: kept"),
    "metadata that are a list": ([1], TENSOR, b"12345678", "damaged"),
    "a tensor that is a number": ({}, {"a": 5}, b"", "1 of its 1 tensors"),
    "a tensor without a dtype": ({}, {"a": {"shape": []}, **{"b": TENSOR["a"]}}, b"12345678", "1 F32"),
    "a tensor with negative offsets": ({}, {"a": {"dtype": "F32", "shape": [], "data_offsets": [-4, 0]}}, b"", "1 of its 1"),
    "a tensor of another size": ({}, {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "8 bytes"),
    "a file that is cut": ({}, TENSOR, b"1234", "download it again"),
    "an unknown dtype": ({}, {"a": {"dtype": "F5", "shape": [2], "data_offsets": [0, 2]}}, b"12", "1 F5"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INSPECTED)
def test_inspect_shows_what_can_be_read_and_names_the_rest(tmp_path, capsys, kind):
    metadata, tensors, data, expected = INSPECTED[kind]
    path = lora(tmp_path / "a.safetensors", metadata, tensors, data)
    assert main(["inspect", str(path)]) == 0
    assert expected in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "a.safetensors"


NO_HEADERS = {
    "empty": b"",
    "text": b"a cat",
    "negative": b"\xff" * 8,
    "list": struct.pack("<Q", 2) + b"[]",
    "cut": struct.pack("<Q", 900) + b"{",
    "nan": struct.pack("<Q", 10) + b'{"a": NaN}',
    "not utf-8": struct.pack("<Q", 4) + b'"\xff\xff"',
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "digits": struct.pack("<Q", 5002) + b"[" + b"9" * 5000 + b"]",
}


@pytest.mark.parametrize("kind", NO_HEADERS)
def test_inspect_of_what_is_no_safetensors_file(tmp_path, capsys, kind):
    (tmp_path / "a.safetensors").write_bytes(NO_HEADERS[kind])
    assert_refused(["inspect", str(tmp_path / "a.safetensors")], capsys, "is not a safetensors file")


def assert_refused(arguments: list[str], capsys: pytest.CaptureFixture, message: str = "") -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") and len(line) < 5000 for line in lines), lines
    assert message in "\n".join(lines), lines


def test_a_header_has_a_bound_on_its_size(tmp_path, capsys):
    """A header of 99 MB took 1.5 GB."""
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 99_000_000))
        stream.truncate(100_000_000)
    tracemalloc.start()
    assert_refused(["inspect", str(path)], capsys, "its header is 94.4 MiB in size; the limit is 22.9 MiB")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_shape_with_a_million_axes_is_no_shape(tmp_path):
    tensors = {"a": {"dtype": "F32", "shape": [1 << 61] * 100_000, "data_offsets": [0, 0]}}
    assert safetensors_header.read_header(lora(tmp_path / "a", {}, tensors)).tensors == {}


def test_control_characters_are_shown_escaped(tmp_path, capsys):
    metadata = {"comment": "\x1b[2J\x9b31m\u202etxt.exe\r\n  trigger   fake", "\x07": "x"}
    path = lora(tmp_path / "a.safetensors", metadata, TENSOR, b"12345678")
    for options in ([], ["--json"]):
        assert main(["inspect", str(path), *options]) == 0
        out = capsys.readouterr().out
        assert not any(character in out for character in "\x1b\x9b\u202e\r\x07")
        assert "\\u001b[2J\\u009b31m\\u202e" in out
    assert json.loads(out)["metadata"] == metadata  # the escapes are JSON's own
    assert main(["inspect", str(tmp_path / "\x1b]0;title\x07.safetensors")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_printable_leaves_other_scripts_alone():
    assert printable("größe 猫 🐱 é\tx\ud800") == "größe 猫 🐱 é\\tx\\ud800"
    assert printable("a\nb\x00", lines=True) == "a\nb\\u0000"


def test_long_metadata_are_shortened_as_text(tmp_path):
    path = lora(tmp_path / "a.safetensors", {"ss_tag_frequency": "x" * 50_000}, TENSOR, b"12345678")
    assert "(50000 characters; --json shows all)" in describe(path).text() and len(describe(path).text()) < 1000


def workflow(**more: object) -> dict:
    return {
        "1": {"class_type": "LoadChroma", "inputs": {}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "cats", "resolution": 32}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0]}},
        **more,
    }  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "cats" / "a.png")
    (tmp_path / "cats" / "a.txt").write_text("a cat", "utf-8")
    (tmp_path / "w.json").write_text(json.dumps(workflow()), "utf-8")
    return tmp_path


def test_the_sound_workflow_is_sound(home, capsys):
    assert main(["check", "w.json"]) == 0, capsys.readouterr().err


LONG = "x" * 300
ARGUMENTS = {
    "digits": ["check", "w.json", "--set", f"LoRATrainer.rank={'9' * 5000}"],
    "nesting": ["check", "w.json", "--set", f"LoRATrainer.rank={'[' * 100_000}"],
    "900 brackets": ["check", "w.json", "--set", f"LoRATrainer.rank={'[' * 900}{']' * 900}"],
    "NaN": ["check", "w.json", "--set", "LoRATrainer.learning_rate=NaN"],
    "a surrogate": ["check", "w.json", "--set", "LoRATrainer.name=\ud800"],
    "a long node": ["check", "w.json", "--set", f"{'x' * 100_000}.rank=1"],
    "no workflow": ["check", "nowhere.json"],
    "a long workflow": ["check", LONG],
    "a NUL in a workflow": ["check", "a\0b.json"],
    "a long output": ["run", "w.json", "--output", LONG],
    "a NUL in an output": ["run", "w.json", "--output", "a\0b"],
    "a long report": ["run", "w.json", "--report", LONG],
    "a long datasets folder": ["check", "w.json", "--datasets", LONG],
    "a NUL in a models folder": ["check", "w.json", "--models", "a\0b"],
    "a very long path": ["check", "w.json", "--models", "x/" * 3000],
    "a long config": ["check", "w.json", "--model-config", LONG],
    "a long run": ["stop", LONG],
    "a NUL in a run": ["stop", "a\0b"],
    "inspect a folder": ["inspect", "cats"],
    "inspect a long name": ["inspect", LONG],
    "plan of a long name": ["plan", LONG],
    "a long folder": ["check", "w.json", "--set", f"DatasetBackend.folder={LONG}"],
    "a long model": ["check", "w.json", "--set", f"LoadChroma.diffusion_model={LONG}"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(home, capsys, kind):
    assert_refused(ARGUMENTS[kind], capsys)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
@pytest.mark.parametrize("command", [["check"], ["run"], ["plan"], ["inspect"], ["check", "w.json", "--model-config"]])
def test_a_device_is_no_file(home, capsys, command):
    assert_refused([*command, "/dev/zero"], capsys, "is not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_fifo_is_no_file(home, capsys):
    os.mkfifo(home / "fifo")
    for command in (["check", "fifo"], ["inspect", "fifo"], ["check", "w.json", "--model-config", "fifo"]):
        assert_refused(command, capsys, "is not a regular file")


YAML = {
    "an impossible date": "a:\n  base_path: 2024-13-45\n",
    "an int that is none": "a: {base_path: !!int x}",
    "an empty int": "a: {base_path: !!int ''}",
    "a bool that is none": "a: {base_path: !!bool x}",
    "a timestamp that is none": "a: {base_path: !!timestamp x}",
    "900 brackets": "[" * 900,
    "closed brackets": "a: " + "[" * 900 + "]" * 900,
    "aliases": "a: &a [x]\n" + "".join(f"k{i}: &k{i} [*{'a' if i == 0 else f'k{i - 1}'}, *a]\n" for i in range(30)),
    "merges": "a: &k0 {x: y}\n" + "".join(f"m{i}: &k{i} {{<<: [*k{i - 1}, *k{i - 1}]}}\n" for i in range(1, 40)),
    "a python object": "a: !!python/object/apply:os.system [x]",
    "a list as base path": "a: {base_path: [1]}",
    "a NUL": 'a: {base_path: "a\\0b"}',
    "a long name": f"a: {{base_path: {LONG}}}",
    "a long line": f"a:\n  base_path: .\n  vae: {LONG}\n",
    "binary": "\x00\x01",
    "large": "# " + "x" * (300 << 10),
    "unhashable": "? [a]\n: b\n? {c: d}\n: e",
}


@pytest.mark.parametrize("kind", YAML)
def test_an_extra_model_paths_file_may_be_anything(home, capsys, kind):
    (home / "extra.yaml").write_text(YAML[kind], "utf-8")
    assert_refused(["check", "w.json", "--model-config", "extra.yaml"], capsys, "extra.yaml: ")


def test_merges_and_aliases_of_ordinary_files_are_read(home, capsys):
    (home / "extra.yaml").write_text("a: &a {base_path: shared, vae: vae}\nb: {<<: *a, loras: loras}\nc:\n", "utf-8")
    assert main(["check", "w.json", "--model-config", "extra.yaml"]) == 0, capsys.readouterr().err


DEEP: object = 1
for _ in range(90):
    DEEP = [DEEP]
INF = float("inf")
LITERALS = {
    "NaN beside a literal": {"value": 8, "note": float("nan")},
    "a large number beside a literal": {"value": 8, "note": {"a": [-INF]}},
    "a surrogate beside a literal": {"value": 8, "note": "\ud800"},
    "a surrogate as a key": {"value": 8, "note": {"\udfff": 1}},
}


@pytest.mark.parametrize("kind", LITERALS)
def test_what_cannot_be_recorded_is_refused_before_the_run(home, capsys, kind):
    data = workflow(**{"9": {"class_type": "PrimitiveInt", "inputs": LITERALS[kind]}})
    data["5"]["inputs"]["rank"] = ["9", 0]
    (home / "w.json").write_text(json.dumps(data), "utf-8")
    assert_refused(["run", "w.json"], capsys, "node 9 (PrimitiveInt).note: ")


SAVERS = {
    "a slot that is none": {"images": ["4", 9]},
    "a negative slot": {"images": ["4", -1]},
    "an output of another type": {"images": ["5", 0]},
    "a prefix that is a number": {"images": ["4", 0], "filename_prefix": 5},
    "a long prefix": {"images": ["4", 0], "filename_prefix": LONG},
    "a NUL in a prefix": {"images": ["4", 0], "filename_prefix": "a\0b"},
}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_node_that_saves_images_is_checked_before_the_training(home, capsys, kind):
    data = workflow(**{
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": "a cat", "resolutions": "32x32"}},
        "6": {"class_type": "SaveImage", "inputs": SAVERS[kind]},
    })  # fmt: skip
    (home / "w.json").write_text(json.dumps(data), "utf-8")
    assert_refused(["run", "w.json"], capsys, "node 6 (SaveImage).")


CONFIGS = {
    "a text for a number": {"num_layers": "2"},
    "a list for a number": {"num_single_layers": [2]},
    "true for a number": {"attention_head_dim": True},
    "null": {"num_attention_heads": None},
    "zero": {"num_layers": 0},
    "a billion layers": {"num_layers": 1_000_000_000},
    "a number for a list": {"axes_dims_rope": 5},
    "texts in a list": {"axes_dims_rope": ["a"]},
    "a huge size": {"joint_attention_dim": 1 << 40},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_models_config_has_its_types(home, tiny_chroma, capsys, kind, command):
    folder = home / "models" / "diffusers" / "tiny"
    (folder / "transformer").mkdir(parents=True)
    config = json.loads((tiny_chroma / "transformer" / "config.json").read_text("utf-8"))
    (folder / "transformer" / "config.json").write_text(json.dumps(config | CONFIGS[kind]), "utf-8")
    arguments = [command, "w.json", "--models", "models", "--set", "LoadChroma.folder=tiny"]
    assert_refused(arguments, capsys, "config.json: is damaged: ")


@pytest.mark.parametrize("text", ["[" * 10_000, "[1]", "{", '{"_class_name": NaN}', "\udcff"])
def test_a_models_config_may_be_anything(home, capsys, text):
    folder = home / "models" / "diffusers" / "tiny" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(
        ["check", "w.json", "--models", "models", "--set", "LoadChroma.folder=tiny"], capsys, "config.json: "
    )


def test_a_caption_of_100_megabytes_is_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(100 * MAX_BYTES)
    with pytest.raises(UnreadableText, match=r"is 100 MiB in size; the limit is 1 MiB"):
        FolderBackend(tmp_path).caption_text("a.png")


def png_of_zeros(edge: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * edge)
    data = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    head = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unopened():
    raw = png_of_zeros(7200)
    assert len(raw) < 1e6 and upright_size(raw) is None
    with pytest.raises(BrokenImage, match=r"7200 x 7200 pixels in only 0\.2 MB"):
        decode(raw)
    assert decode(png_of_zeros(900)).size == (900, 900)  # small ones may compress as well as they like
