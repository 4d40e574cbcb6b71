"""Tokenizers: where their files are found, the formats they come in, and what is said of damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import ASSETS
from chroma_trainer.trainer_core.models.text import tokenizer as tokenizers
from chroma_trainer.trainer_core.models.text.tokenizer import (
    T5_IN_COMFYUI,
    check_packages,
    check_t5_tokenizer,
    find_clip_tokenizer,
    find_t5_tokenizer,
    read_clip_tokenizer,
    read_t5_tokenizer,
)

from tests.conftest import write_clip_pair

PROMPTS = ["", "a cat", "the red dog of the blue photo, sleeping", "Ünknown ▁ signs 猫"]


def test_where_the_tokenizer_is_found(tiny_model, tiny_chroma, tmp_path):
    """In the order in which it is looked for: beside the file, in the repo, in a ComfyUI above the file."""
    models = tmp_path / "ComfyUI" / "models" / "text_encoders"
    models.mkdir(parents=True)
    model = replace(tiny_model, repo="", text_encoder_file=str(models / "t5.safetensors"))
    with pytest.raises(
        UserError, match=r"tokenizer was not found; put tokenizer\.json or spiece\.model .* into .*text_enc"
    ):
        find_t5_tokenizer(model)
    places = [tmp_path / "ComfyUI" / T5_IN_COMFYUI, models, models / "t5_tokenizer", models / "tokenizer"]
    for folder in places:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_chroma / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
        assert find_t5_tokenizer(model) == folder / "tokenizer.json"
    assert find_t5_tokenizer(tiny_model) == tiny_chroma / "tokenizer" / "tokenizer.json"


def test_a_tokenizer_json_is_followed_as_it_is(tiny_chroma):
    from tokenizers import Tokenizer

    file = tiny_chroma / "tokenizer" / "tokenizer.json"
    tokenizer, plain = read_t5_tokenizer(file), Tokenizer.from_file(str(file))
    for prompt in PROMPTS:
        assert tokenizer(prompt).input_ids == plain.encode(prompt).ids


@pytest.mark.parametrize("prompt", ["Red Apple", "NEONGLOW style, Cat Face", "NeonGlow ﬁsh, Ⅳ"])
def test_the_normaliser_in_tokenizer_json_is_followed(prompt):
    """chroma-nano's vocabulary has no capitals; transformers' T5 classes drop the normaliser and would give unknowns."""
    tokenizer = read_t5_tokenizer(ASSETS / "chroma-nano" / "tokenizer" / "tokenizer.json")
    ids = tokenizer(prompt).input_ids
    assert ids == tokenizer(prompt.lower()).input_ids
    assert tokenizer.convert_tokens_to_ids("<unk>") not in ids


# --- spiece.model ---


def protobuf_field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """A ModelProto by hand: pieces (text, score, type), a trainer's unigrams, a normaliser without a table."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    data = b""
    for text, score in pieces:
        kind = bytes([3 << 3, kinds.get(text, 1)])
        data += protobuf_field(
            1, protobuf_field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + kind
        )
    return data + protobuf_field(2, bytes([3 << 3, 1])) + protobuf_field(3, protobuf_field(1, b"nmt_nfkc"))


@pytest.fixture
def spiece(tiny_chroma, tmp_path) -> Path:
    """The tiny tokenizer as SentencePiece has it."""
    pytest.importorskip("sentencepiece")
    whole = json.loads((tiny_chroma / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    file = tmp_path / "spiece.model"
    file.write_bytes(sentencepiece_model([(piece, score) for piece, score in whole["model"]["vocab"]]))
    return file


def test_spiece_model_gives_the_same_ids(tiny_chroma, spiece):
    reference = read_t5_tokenizer(tiny_chroma / "tokenizer" / "tokenizer.json")
    tokenizer = read_t5_tokenizer(spiece)
    assert len(tokenizer) == len(reference) + 100
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(reference) + 99
    for prompt in ["", "a cat", "the  red   dog of the blue photo, sleeping"]:
        assert tokenizer(prompt).input_ids == reference(" ".join(prompt.split())).input_ids
    assert tokenizer("a cat", truncation=True, max_length=2).input_ids == [3, 1]


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\x0a\x7f short", b"\x0b"])
def test_damaged_spiece_model(tmp_path, data):
    pytest.importorskip("sentencepiece")
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(UserError, match=r"spiece\.model: is not a readable tokenizer: "):
        read_t5_tokenizer(tmp_path / "spiece.model")


def test_what_a_spiece_model_needs_is_told_before_the_run(tiny_model, tmp_path, monkeypatch):
    """And a tokenizer.json needs nothing of it."""
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    check_packages(tmp_path / "tokenizer.json")
    (tmp_path / "spiece.model").write_bytes(b"")
    model = replace(tiny_model, repo="", text_encoder_file=str(tmp_path / "t5.safetensors"))
    wanted = r"spiece\.model: needs the packages sentencepiece and protobuf .* pip install sentencepiece protobuf"
    for check in (lambda: check_t5_tokenizer(model), lambda: read_t5_tokenizer(tmp_path / "spiece.model")):
        with pytest.raises(UserError, match=wanted):
            check()


# --- damaged files ---


def test_damaged_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a readable tokenizer: "):
        read_t5_tokenizer(tmp_path / "tokenizer.json")


# --- CLIP's ---


@pytest.fixture
def pair(tmp_path) -> Path:
    """The tiny tokenizer as CLIP's older files have it, beside a T5's."""
    return write_clip_pair(tmp_path / "pair")


def test_both_formats_of_clips_tokenizer_agree(tiny_flux_model, tiny_chroma, pair):
    shutil.copy(tiny_chroma / "tokenizer" / "tokenizer.json", pair / "tokenizer.json")  # T5's, which is left alone
    whole = read_clip_tokenizer(find_clip_tokenizer(tiny_flux_model))
    older = read_clip_tokenizer((pair / "vocab.json", pair / "merges.txt"))
    for prompt in (*PROMPTS, "naïve  café\n<|endoftext|> it's 42!"):
        assert older(prompt).input_ids == whole(prompt).input_ids
    assert whole("cat").input_ids[0] == whole.convert_tokens_to_ids("<|startoftext|>")
    end = whole.convert_tokens_to_ids("<|endoftext|>")
    assert older("cat cat cat", truncation=True, max_length=3).input_ids[-1] == end


def test_damaged_pair(pair):
    (pair / "merges.txt").write_text("#version: 0.2\nc a b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab\.json: is not a readable tokenizer: "):
        read_clip_tokenizer((pair / "vocab.json", pair / "merges.txt"))
