"""What the model is told about an image."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.data.captions import captions_of, with_trigger


def test_a_text_file_gives_one_caption_a_line():
    assert captions_of("a.png", "  a cat \n\n a dog\r\n", FolderConfig()) == ("a cat", "a dog")


@pytest.mark.parametrize("text", [None, "", " \n\t\n"])
def test_no_text_gives_no_caption(text):
    assert captions_of("a.png", text, FolderConfig(trigger="sks")) == ()


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_fox.png", "red fox"), ("red_fox_012.jpg", "red fox"), ("red fox (3).png", "red fox"),
        ("animals/red_fox-7.png", "red fox"), ("2024.png", "2024"), ("grün_ß.png", "grün ß"), ("赤い狐.png", "赤い狐"),
        ("v1.5 cat.png", "v1.5 cat"), ("Porsche 911.jpg", "Porsche 911"), ("R2D2.png", "R2D2"), ("A4.png", "A4"),
        ("street in 1999.png", "street in 1999"), ("red_fox_001 (2).png", "red fox"), ("fox(2).png", "fox"),
        ("_001.png", "_001"), ("Boeing_747_at_night.png", "Boeing 747 at night"),
    ],
)  # fmt: skip
def test_a_name_becomes_a_caption_without_its_counter(name, caption):
    assert captions_of(name, None, FolderConfig(captions="filename")) == (caption,)


def test_the_instance_prompt_is_everyones():
    config = FolderConfig(captions="instance prompt", instance_prompt=" a photo of sks dog ", trigger="sks")
    assert captions_of("a.png", "other", config) == ("a photo of sks dog",)


def test_several_instance_prompts():
    config = FolderConfig(captions="instance prompt", instance_prompt="deblur || sharpen the image|s|| ")
    assert captions_of("a.png", None, config) == ("deblur", "sharpen the image|s") and not config.problems()
    assert replace(config, instance_prompt=" || ").problems()[0].field == "instance_prompt"


@pytest.mark.parametrize(
    ("caption", "trigger", "told"),
    [
        ("a cat", "", "a cat"), ("a cat", "sks", "sks, a cat"), ("SKS cat", "sks", "SKS cat"), ("a sks", "sks", "a sks"),
        ("asks a cat", "sks", "sks, asks a cat"), ("sks, a cat", "sks", "sks, a cat"), ("a cat", "c++ (x)", "c++ (x), a cat"),
        ("in c++ (x) style", "c++ (x)", "in c++ (x) style"), ("绘画, 猫", "绘画", "绘画, 猫"), ("Ein Äffchen", "äffchen", "Ein Äffchen"),
        ("一张nekox风格的猫", "nekox", "一张nekox风格的猫"), ("油绘画猫", "绘画", "油绘画猫"), ("绘画cat", "绘画", "绘画cat"),
        ("nekoxes 猫", "nekox", "nekox, nekoxes 猫"), ("nekoxの猫", "nekox", "nekoxの猫"), ("nekox는 고양이", "nekox", "nekox는 고양이"),
        ("пёсsks", "sks", "sks, пёсsks"), ("ภาพsksแมว", "sks", "ภาพsksแมว"),
    ],
)  # fmt: skip
def test_the_trigger_is_put_in_front_where_it_is_lacking(caption, trigger, told):
    assert with_trigger(caption, trigger) == told


def test_tags_in_other_orders():
    config = FolderConfig(trigger="sks", tag_orders=64, kept_tags=1)
    orders = captions_of("a.png", "fox, snow, sun, red\na cat", config, seed=3)
    assert orders[0] == "sks, fox, snow, sun, red" and orders[-1] == "sks, a cat"  # nothing to be moved in the last
    assert set(orders[1:-1]) == {f"sks, fox, {x}, {y}, {z}" for x, y, z in permutations(("snow", "sun", "red"))} - {
        orders[0]
    }
    assert len(orders) == len(set(orders)) and orders == captions_of(
        "b.png", "fox, snow, sun, red\na cat", config, seed=3
    )
    few = FolderConfig(tag_orders=2)
    assert len({captions_of("a.png", "a, b, c, d, e, f", few, seed) for seed in range(8)}) > 4
    assert len(captions_of("a.png", "a, b, c, d, e, f", FolderConfig(tag_orders=3))) == 3
    assert captions_of("a.png", "a, b, c", FolderConfig(tag_orders=1)) == ("a, b, c",)
    assert captions_of("a.png", "a, b", FolderConfig(), seed=1) == ("a, b",)
    assert [p.field for p in FolderConfig(kept_tags=1).problems()] == ["kept_tags"]
