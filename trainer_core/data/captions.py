"""The final captions of an image: what the model is told."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..config.dataset import FolderConfig

COUNTER = re.compile(r"[\s_-]*\(?\d+\)?$")  # "red_fox_012", "red fox (3)"


def captions_of(name: str, text: str | None, config: FolderConfig) -> tuple[str, ...]:
    """Every caption of an image, with the trigger in front where it is lacking; () where the source has none.

    textfile: one caption a line, blank lines left out. filename: the name without ending and counter, underscores as spaces.
    """
    if config.captions == "textfile":
        found = [line.strip() for line in (text or "").splitlines() if line.strip()]
    elif config.captions == "filename":
        stem = PurePosixPath(name).stem
        found = [COUNTER.sub("", stem).replace("_", " ").strip() or stem]
    else:
        found = [config.instance_prompt.strip()]
    return tuple(with_trigger(caption, config.trigger.strip()) for caption in found)


def with_trigger(caption: str, trigger: str) -> str:
    """'trigger, caption', unless the caption has the trigger as a word of its own, or there is none."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"
