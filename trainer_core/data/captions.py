"""Build the final captions of an image, as the text encoder receives them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import torch

from ..config.dataset import FolderConfig
from ..seeds import generator

COUNTER = re.compile(r"[\s_-]*\(?\d+\)?$")  # "red_fox_012", "red fox (3)"


def captions_of(name: str, text: str | None, config: FolderConfig, seed: int = 0) -> tuple[str, ...]:
    """Return every caption of an image, with the trigger prepended where it is missing; () if the source has none.

    - textfile: one caption per line; blank lines are ignored.
    - filename: the name without extension and counter, underscores replaced by spaces.
    - instance prompt: the same captions for all images.

    With tag_orders, each caption is followed by copies of it with its tags shuffled, which depend on the seed.
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
    """Return the caption and up to tag_orders copies with their tags shuffled, without duplicates."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    trigger = config.trigger.strip().lower()
    num_fixed = config.kept_tags + bool(trigger and tags and trigger in tags[0].lower())
    free = tags[num_fixed:]
    if not config.tag_orders or len(free) < 2:
        return [caption]
    draws = (generator(seed, "tags", caption, number) for number in range(config.tag_orders))
    orders = ([free[i] for i in torch.randperm(len(free), generator=draw)] for draw in draws)
    return list(dict.fromkeys([caption, *(", ".join([*tags[:num_fixed], *order]) for order in orders)]))


def with_trigger(caption: str, trigger: str) -> str:
    """Return "trigger, caption", or the caption alone if it contains the trigger as a word or there is no trigger."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"
