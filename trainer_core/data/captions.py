"""Build the final captions of an image, as the text encoder receives them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..config.dataset import FolderConfig

# A counter at the end of a name, set apart by _, - or parentheses: "red_fox_012", "fox-7", "red fox (3)". A number after
# a space or a letter is part of the name: "Porsche 911", "R2D2", "street in 1999".
COUNTER = re.compile(r"([_-]+\d+)?([\s_-]*\(\d+\))?\Z")

# Scripts that are written without spaces between words, and Hangul, where particles follow a word without one. A
# trigger beside such a letter stands by itself: Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han, Hangul.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\u1100-\u11ff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = rf"[^\W{UNSPACED}]"  # a letter or digit of a script that has word edges


def captions_of(name: str, text: str | None, config: FolderConfig, seed: int = 0) -> tuple[str, ...]:
    """Return every caption of an image, with the trigger prepended where it is missing; () if the source has none.

    - textfile: one caption per line; blank lines are ignored.
    - filename: the name without extension and counter (see COUNTER), underscores replaced by spaces.
    - instance prompt: the same captions for all images.

    With tag_orders, each caption is followed by copies of it with its tags shuffled, which depend on the seed: that many
    orders in all.
    """
    if config.captions == "textfile":
        captions = [line.strip() for line in (text or "").splitlines() if line.strip()]
    elif config.captions == "filename":
        stem = PurePosixPath(name).stem
        captions = [COUNTER.sub("", stem).replace("_", " ").strip() or stem]
    else:
        captions = config.instance_prompts
    triggered = (with_trigger(caption, config.trigger.strip()) for caption in captions)
    return tuple(order for caption in triggered for order in orders_of(caption, config, seed))


def orders_of(caption: str, config: FolderConfig, seed: int) -> list[str]:
    """Return the caption in up to tag_orders orders of its tags, first as it is written, without duplicates."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    trigger = config.trigger.strip().lower()
    num_fixed = config.kept_tags + bool(trigger and tags and trigger in tags[0].lower())
    free = tags[num_fixed:]
    if not config.tag_orders or len(free) < 2:
        return [caption]
    import torch  # here, because checks of captions do without it

    from ..seeds import generator

    draws = (generator(seed, "tags", caption, number) for number in range(config.tag_orders - 1))
    orders = ([free[i] for i in torch.randperm(len(free), generator=draw)] for draw in draws)
    return list(dict.fromkeys([caption, *(", ".join([*tags[:num_fixed], *order]) for order in orders)]))


def with_trigger(caption: str, trigger: str) -> str:
    """Return "trigger, caption", or the caption alone if it contains the trigger or there is no trigger.

    The trigger must be a word of its own where the script has word edges: "sks" is not in "asks", and "neko" is in
    "一张neko风格的猫".
    """
    if not trigger:
        return caption
    before = rf"(?<!{WORD})" if re.match(WORD, trigger) else ""
    after = rf"(?!{WORD})" if re.match(WORD, trigger[-1]) else ""
    is_contained = re.search(before + re.escape(trigger) + after, caption, re.IGNORECASE)
    return caption if is_contained else f"{trigger}, {caption}"
