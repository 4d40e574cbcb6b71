"""Prompts -> embeddings, once: content-keyed by the prompt and the encoder (with its rule of length)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..files import sha256_text
from ..host import Host, PhaseProgress, PhaseStarted
from ..shards import Store, fill

BATCH = 16


class Encoder(Protocol):
    """See families/contract.py: TextEncoder."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]: ...


class TextCache:
    """The embedding of every prompt, memory-mapped from the store."""

    def __init__(self, store: Store, identity: str):
        self._store, self._identity = store, identity

    def get(self, prompt: str) -> Tensor:
        """(tokens, width), in the encoder's dtype."""
        return self._store.get(prompt_key(prompt, self._identity))


def prompt_key(prompt: str, identity: str) -> str:
    return sha256_text("prompt", prompt, identity)


def cache_prompts(
    prompts: Sequence[str], identity: str, load: Callable[[], Encoder], store: Store, host: Host
) -> TextCache:
    """Encode what is missing. The encoder is loaded only if something is.

    Args:
        identity: of the encoder: Family.identity(model, "text_encoder").
    Raises:
        Cancelled: between two batches; what was encoded is kept.
    """
    by_key = {prompt_key(prompt, identity): prompt for prompt in prompts}

    def make(absent: list[str]) -> Iterator[Mapping[str, Tensor]]:
        host.emit(PhaseStarted("text", len(absent), "prompts"))
        encoder = load()
        ordered = sorted(absent, key=lambda key: (len(by_key[key]), key))  # equal lengths together waste no padding
        for start in range(0, len(ordered), BATCH):
            host.check_cancelled()
            keys = ordered[start : start + BATCH]
            with torch.no_grad():
                embeddings = encoder.encode([by_key[key] for key in keys])
            yield dict(zip(keys, embeddings, strict=True))
            host.emit(PhaseProgress("text", start + len(keys), len(absent)))

    fill(store, by_key, make)
    return TextCache(store, identity)
