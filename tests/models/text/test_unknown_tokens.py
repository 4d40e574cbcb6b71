"""Captions with characters that T5's vocabulary lacks."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.models.text.tokenizer import read_t5_pieces
from chroma_trainer.trainer_core.models.text.unknown_tokens import UnknownText, find_unknown, unknown_parts
from tokenizers import Tokenizer

UNKNOWN_ID = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_chroma) -> Tokenizer:
    return read_t5_pieces(tiny_chroma / "tokenizer" / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red cat", []), ("一张nekox风格的猫", ["一张", "风格的猫"]), ("एक cat", ["एक"]), ("a cat 😀", ["😀"]),
        ("a {red} cat", ["{", "}"]), ("赤い猫", ["赤い猫"]),
    ],
)  # fmt: skip
def test_the_parts_that_become_the_unknown_token(tokenizer, text, parts):
    assert list(unknown_parts(text, tokenizer.encode(text), UNKNOWN_ID)) == parts


def test_texts_are_counted_with_an_example(tokenizer):
    texts = ["a cat", "赤い猫, cat", "青い犬", "the dog: 3 (red)!"]
    unknown = find_unknown(texts, tokenizer.encode, UNKNOWN_ID)
    assert unknown is not None and unknown == UnknownText(2, "赤い猫, cat", ("赤い猫",))
    assert unknown.describe("captions").startswith("captions with characters that T5's vocabulary lacks: 2.")
    assert "'赤い猫, cat', where '赤い猫' can't be read; write English instead" in unknown.describe("captions")


def test_plain_texts_need_no_tokenizer():
    def encode(text: str):
        raise AssertionError(text)

    assert find_unknown(["A photo, isn't it? (3): yes!"], encode, UNKNOWN_ID) is None
