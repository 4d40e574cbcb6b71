"""How long a caption may be: the limit of the model's text encoder, counted with its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..config.model import ModelConfig
from ..host import PACKAGE, Paths
from ..models.text.tokenizer import T5_IN_COMFYUI, find_local_t5_tokenizer, folders_in_comfyui, read_t5_pieces, t5_file
from .checks.caption_checks import CountTokens

USUAL_LIMIT = 512  # of Chroma and Flux dev; 256 for schnell


def token_limit(model: ModelConfig | None, paths: Paths) -> tuple[int, CountTokens | None]:
    """Return the limit, and a function that counts the tokens of a caption; None without a tokenizer on this machine.

    Args:
        model: The model. None: Chroma or Flux dev, with the tokenizer that ComfyUI ships.
        paths: Folders in which a ComfyUI may be.
    """
    file = find_local_t5_tokenizer(model) if model else next(_in_comfyui(paths), None)
    if file is None:
        return 0, None
    tokenizer = cache(lambda: read_t5_pieces(file))  # read only if a caption is long
    return (model.text_tokens if model else USUAL_LIMIT), lambda text: len(tokenizer().encode(text).ids)


def _in_comfyui(paths: Paths) -> Iterator[Path]:
    """Yield T5's tokenizer in the ComfyUI around the models folders, or around this pack."""
    places = [*paths.models.get("text_encoders", ()), PACKAGE.parent]
    for place in places:
        for folder in folders_in_comfyui(str(place / "_"), T5_IN_COMFYUI):
            if file := t5_file(folder):
                yield file
