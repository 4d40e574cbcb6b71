"""Build the final captions of an image, as the text encoder receives them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import PurePosixPath

from ..config.dataset import FolderConfig

# A counter at the end of a name, set apart by _, - or parentheses: "red_fox_012", "fox-7", "red fox (3)". A number
# after a space or a letter is part of the name: "Porsche 911", "R2D2", "street in 1999".
COUNTER = re.compile(r"([_-]+\d+)?([\s_-]*\(\d+\))?\Z")

# Scripts that are written without spaces between words, and Hangul, where particles follow a word without one. A
# trigger beside such a letter stands by itself: Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han, Hangul.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\u1100-\u11ff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = rf"[^\W{UNSPACED}]"  # a letter or digit of a script that has word edges
UNSHUFFLED_VARIANTS = 8  # of a caption with tag_dropout alone
WILDCARD = re.compile(r"\{[^{}|]*\|[^{}]*\}")  # {red|blue}: other trainers pick one each time


def captions_of(name: str, text: str | None, config: FolderConfig, seed: int = 0) -> tuple[str, ...]:
    """Return every caption of an image, as it is trained; () if the source has none.

    - textfile: one caption per line; blank lines are ignored.
    - filename: the name without extension and counter (see COUNTER), underscores replaced by spaces.
    - instance prompt: the same captions for all images.
    """
    return final_captions(written_captions(name, text, config), config, seed)


def written_captions(name: str, text: str | None, config: FolderConfig) -> tuple[str, ...]:
    """Return the captions of an image as they are written in its caption file, its name or the instance prompt."""
    if config.captions == "textfile":
        return tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    if config.captions == "filename":
        stem = PurePosixPath(name).stem
        return (COUNTER.sub("", stem).replace("_", " ").strip() or stem,)
    return tuple(config.instance_prompts)


def final_captions(
    written: Iterable[str], config: FolderConfig, seed: int = 0, has_tags: bool = True
) -> tuple[str, ...]:
    """Return captions as they are trained: with the trigger where it is missing, in variants of their tags, and with
    prefix and suffix.

    Args:
        written: The captions of an image.
        config: The settings of its folder.
        seed: Decides the order of tags, and which are left out.
        has_tags: Whether the captions are lists of tags, of which variants are made.
    """
    prefix, suffix, trigger = config.caption_prefix.strip(), config.caption_suffix.strip(), config.trigger.strip()
    if prefix or suffix:  # either may hold the trigger
        trigger = "" if _contains(_join(prefix, suffix), trigger) else trigger
    triggered = (with_trigger(caption, trigger) for caption in written)
    if not (config.tag_orders or config.tag_dropout) or not has_tags:
        variants = triggered
    else:
        variants = (variant for caption in triggered for variant in variants_of(caption, config, seed))
    return tuple(_join(_join(prefix, variant), suffix) for variant in variants)


def _join(first: str, second: str) -> str:
    """Return two texts with a space between them, unless the second begins with a comma or another stop."""
    if not first or not second:
        return first or second
    return f"{first}{second}" if second[0] in ",.;:!?" else f"{first} {second}"


def variants_of(caption: str, config: FolderConfig, seed: int) -> list[str]:
    """Return the caption as it is written, and with its tags in other orders or some of them left out.

    There are up to tag_orders variants. With tag_dropout alone there are UNSHUFFLED_VARIANTS, whose tags are in the
    written order. With tag_dropout equal variants stay, each of which is as likely as another; else they are removed.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    trigger = config.trigger.strip().lower()
    num_fixed = config.kept_tags + bool(trigger and tags and trigger in tags[0].lower())
    free = tags[num_fixed:]
    is_shuffled = config.tag_orders > 1
    if not free or (len(free) < 2 and not config.tag_dropout):
        return [caption]
    count = config.tag_orders if is_shuffled else UNSHUFFLED_VARIANTS if config.tag_dropout else 1
    variants = [
        ", ".join([*tags[:num_fixed], *_vary(free, caption, number, config, seed, is_shuffled)])
        for number in range(count - 1)
    ]
    return [caption, *variants] if config.tag_dropout else list(dict.fromkeys([caption, *variants]))


def _vary(
    tags: list[str], caption: str, number: int, config: FolderConfig, seed: int, is_shuffled: bool
) -> Iterable[str]:
    """Return the tags in another order, without those that tag_dropout leaves out. Tags of the trigger stay."""
    import torch  # here, because checks of captions do without it

    from ..seeds import generator

    draw = generator(seed, "tags", caption, number)
    order = torch.randperm(len(tags), generator=draw).tolist() if is_shuffled else range(len(tags))
    if not config.tag_dropout:
        return [tags[i] for i in order]
    chances = torch.rand(len(tags), generator=draw, dtype=torch.float64).tolist()
    trigger = config.trigger.strip()
    own = {tag.strip().lower() for tag in trigger.split(",")}
    return [
        tags[i]
        for i in order
        if chances[i] >= config.tag_dropout or tags[i].lower() in own or _contains(tags[i], trigger)
    ]


def class_caption(caption: str, trigger: str, class_word: str) -> str:
    """Return the caption with the class word in place of the trigger, wherever it stands; "" without a class word."""
    if not class_word.strip() or not trigger.strip():
        return ""
    word = class_word.strip()
    return _pattern(trigger.strip()).sub(lambda _: word, caption)


def without_trigger(caption: str, trigger: str, class_word: str = "") -> str:
    """Return the caption without the trigger, or with the class word in its place.

    A comma or space that only separated the trigger from its neighbor goes with it: "neko, a cat" becomes "a cat".
    """
    if class_word.strip() or not trigger.strip():
        return class_caption(caption, trigger, class_word) or caption
    parts = [part.strip() for part in _pattern(trigger.strip()).split(caption)]
    joined = parts[0]
    for part in parts[1:]:
        part = part.lstrip(",").lstrip() if not joined or joined.endswith(",") else part
        joined = _join(joined, part)
    return joined.rstrip(" ,")


def with_trigger(caption: str, trigger: str) -> str:
    """Return "trigger, caption", or the caption alone if it contains the trigger or there is no trigger.

    The trigger must be a word of its own where the script has word edges: "sks" is not in "asks", and "neko" is in
    "一张neko风格的猫".
    """
    return caption if not trigger or _contains(caption, trigger) else f"{trigger}, {caption}"


def _contains(caption: str, trigger: str) -> bool:
    return bool(trigger and _pattern(trigger).search(caption))


@lru_cache(maxsize=64)
def _pattern(trigger: str) -> re.Pattern[str]:
    before = rf"(?<!{WORD})" if re.match(WORD, trigger) else ""
    after = rf"(?!{WORD})" if re.match(WORD, trigger[-1]) else ""
    return re.compile(before + re.escape(trigger) + after, re.IGNORECASE)
