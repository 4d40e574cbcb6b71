"""The final captions of an image: what the model is told."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import torch

from ..config.dataset import FolderConfig
from ..seeds import generator

COUNTER = re.compile(r"[\s_-]*\(?\d+\)?$")  # "red_fox_012", "red fox (3)"


def captions_of(name: str, text: str | None, config: FolderConfig, seed: int = 0) -> tuple[str, ...]:
    """Every caption of an image, with the trigger in front where it is lacking; () where the source has none.

    textfile: one caption a line, blank lines left out. filename: the name without ending and counter, underscores as spaces. instance prompt: the same ones for all.
    With tag_orders each is followed by itself in other orders, drawn by the seed.
    """
    if config.captions == "textfile":
        found = [line.strip() for line in (text or "").splitlines() if line.strip()]
    elif config.captions == "filename":
        stem = PurePosixPath(name).stem
        found = [COUNTER.sub("", stem).replace("_", " ").strip() or stem]
    else:
        found = config.instance_prompts
    told = (with_trigger(caption, config.trigger.strip()) for caption in found)
    return tuple(order for caption in told for order in orders_of(caption, config, seed))


def orders_of(caption: str, config: FolderConfig, seed: int) -> list[str]:
    """The caption, and at most tag_orders others with its tags in another order; equal ones once."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    trigger = config.trigger.strip().lower()
    num_kept = config.kept_tags + bool(trigger and tags and trigger in tags[0].lower())
    free = tags[num_kept:]
    if not config.tag_orders or len(free) < 2:
        return [caption]
    draws = (generator(seed, "tags", caption, number) for number in range(config.tag_orders))
    orders = ([free[i] for i in torch.randperm(len(free), generator=draw)] for draw in draws)
    return list(dict.fromkeys([caption, *(", ".join([*tags[:num_kept], *order]) for order in orders)]))


def with_trigger(caption: str, trigger: str) -> str:
    """'trigger, caption', unless the caption has the trigger as a word of its own, or there is none."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"
