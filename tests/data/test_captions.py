"""What the model is told about an image."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.data.captions import UNSHUFFLED_VARIANTS, captions_of, class_caption, with_trigger


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


TAGS = "sks, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s"


def test_tags_are_left_out_with_their_probability_and_the_first_ones_never():
    config = FolderConfig(trigger="sks", kept_tags=2, tag_orders=64, tag_dropout=0.3)
    written, *variants = captions_of("x.png", TAGS, config, seed=1)
    assert written == TAGS and len(variants) == 63 and not config.problems()
    assert all(variant.startswith("sks, a, b") for variant in variants)
    free = [len(variant.split(", ")) - 3 for variant in variants]
    assert 0.65 < sum(free) / (63 * 17) < 0.75
    assert captions_of("y.png", TAGS, config, seed=1)[1:] == tuple(variants)  # of the caption and the seed alone
    assert captions_of("x.png", TAGS, config, seed=2)[1:] != tuple(variants)


def test_tag_dropout_without_tag_orders_keeps_the_written_order():
    variants = captions_of("x.png", TAGS, FolderConfig(tag_dropout=0.5), seed=1)
    assert len(variants) == UNSHUFFLED_VARIANTS
    for variant in variants:
        assert [tag for tag in TAGS.split(", ") if tag in variant.split(", ")] == variant.split(", ")


def test_a_trigger_within_a_tag_stays():
    """With a dropout of 1 nothing but the trigger's tags is left, and equal variants stay equally likely."""
    config = FolderConfig(trigger="sks", tag_dropout=1.0)
    assert captions_of("x.png", "red, a photo of sks dog, blue", config)[1:] == ("a photo of sks dog",) * 7
    assert captions_of("x.png", "red, blue", replace(config, trigger="sks, cartoon"))[1:] == ("sks, cartoon",) * 7
    assert captions_of("x.png", "red, blue", FolderConfig(tag_dropout=1.0))[1:] == ("",) * 7


def test_prefix_and_suffix_stay_at_both_ends():
    config = FolderConfig(trigger="sks", caption_prefix="photo of", caption_suffix=", 35 mm", tag_orders=9)
    variants = captions_of("x.png", "a, b, c", config)
    assert variants[0] == "photo of sks, a, b, c, 35 mm" and len(variants) > 3
    assert all(text.startswith("photo of sks, ") and text.endswith(", 35 mm") for text in variants)
    holds_it = replace(config, caption_prefix="sks style:", tag_orders=0)
    assert captions_of("x.png", "a cat", holds_it) == ("sks style: a cat, 35 mm",)
    assert captions_of("x.png", None, config) == ()


@pytest.mark.parametrize(
    ("caption", "trigger", "word", "result"),
    [
        ("sks, a photo of Sks dog", "sks", "dog", "dog, a photo of dog dog"), ("asks sks", "sks", "a", "asks a"),
        ("sks, x", "sks", "", ""), ("x", "", "dog", ""), ("", "sks", "dog", ""), (r"a \1, b", "b", r"\1", r"a \1, \1"),
    ],
)  # fmt: skip
def test_the_class_word_takes_the_triggers_place(caption, trigger, word, result):
    assert class_caption(caption, trigger, word) == result


def test_a_class_word_without_a_trigger_is_a_problem():
    assert [problem.field for problem in FolderConfig(class_word="dog").problems()] == ["class_word"]
