"""Workflows out of pictures and LoRA files, in all the ways they are packed."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.workflow.png_metadata import PNG_MAGIC, read_texts
from chroma_trainer.trainer_core.workflow.read import read_workflow
from PIL import Image
from PIL.PngImagePlugin import PngInfo

API = {"1": {"class_type": "A", "inputs": {"text": "größer 🐈"}}}
EDITOR = {"nodes": [{"id": 7, "type": "B"}], "links": []}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(path: Path, *chunks: bytes) -> Path:
    path.write_bytes(PNG_MAGIC + b"".join(chunks) + chunk(b"IEND", b""))
    return path


def ids(path: Path) -> list[str]:
    return list(read_workflow(path, {}).nodes)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("international", [False, True])
def test_pictures_as_pillow_writes_them(tmp_path: Path, zipped: bool, ascii_only: bool, international: bool):
    info = PngInfo()
    text = json.dumps(API, ensure_ascii=ascii_only)
    if international:
        info.add_itxt("prompt", text, zip=zipped)
    else:
        info.add_text("prompt", text, zip=zipped)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert read_workflow(tmp_path / "a.png", {}).nodes["1"].inputs == {"text": "größer 🐈"}


def test_the_prompt_comes_before_the_workflow(tmp_path: Path):
    both = [
        chunk(b"tEXt", b"workflow\0" + json.dumps(EDITOR).encode()),
        chunk(b"tEXt", b"prompt\0" + json.dumps(API).encode()),
    ]
    assert ids(png(tmp_path / "a.png", *both)) == ["1"]
    assert ids(png(tmp_path / "b.png", both[0])) == ["7"]


@pytest.mark.parametrize("prompt", [b"", b"{}", b"{broken"])
def test_a_prompt_of_no_use_gives_way_to_the_workflow(tmp_path: Path, prompt: bytes):
    texts = [chunk(b"tEXt", b"prompt\0" + prompt), chunk(b"tEXt", b"workflow\0" + json.dumps(EDITOR).encode())]
    assert ids(png(tmp_path / "a.png", *texts)) == ["7"]


def test_the_name_of_a_picture_does_not_matter(tmp_path: Path):
    assert ids(png(tmp_path / "a.json", chunk(b"tEXt", b"prompt\0" + json.dumps(API).encode()))) == ["1"]


def test_broken_chunks_are_passed_over(tmp_path: Path):
    good = chunk(b"tEXt", b"prompt\0" + json.dumps(API).encode())
    broken = [chunk(b"zTXt", b"prompt\0\0not zlib"), chunk(b"iTXt", b"prompt\0\1\0"), chunk(b"tEXt", b"")]
    path = png(tmp_path / "a.png", *broken, good)
    assert ids(path) == ["1"]
    path.write_bytes(path.read_bytes()[:-20] + b"")  # breaks off in the last text
    assert "prompt" not in read_texts(path, 1000)


def test_a_text_that_unpacks_to_too_much_is_cut(tmp_path: Path):
    path = png(tmp_path / "a.png", chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 5000)))
    assert len(read_texts(path, 1000)["prompt"]) == 1000


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("key", ["prompt", "workflow"])
def test_lora_files(tmp_path: Path, name: str, key: str):
    header = json.dumps({"__metadata__": {key: json.dumps(API if key == "prompt" else EDITOR)}}).encode()
    (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header)
    assert ids(tmp_path / name) == (["1"] if key == "prompt" else ["7"])


def test_json_that_begins_like_a_safetensors_file(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"1234":{"class_type": "A", "inputs": {}}}', encoding="utf-8")  # "{" is byte 8
    assert ids(tmp_path / "a.json") == ["1234"]


def test_a_byte_order_mark_is_no_harm(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(API, ensure_ascii=False), encoding="utf-8-sig")
    assert ids(tmp_path / "a.json") == ["1"]
