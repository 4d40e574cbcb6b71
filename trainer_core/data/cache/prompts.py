"""Cache the embeddings of prompts, keyed by the prompt and the text encoder (with its maximum length)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...distributed.ranks import ALONE, Ranks
from ...host import Host, PhaseProgress, PhaseStarted
from ...storage.atomic import sha256_text
from ...storage.digest_table import digests
from ...storage.lazy_sequence import LazySequence
from ...storage.tensor_store import Store, fill

BATCH = 16


class Encoder(Protocol):
    """See models/family.py: TextEncoder."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]: ...


class TextCache:
    """The embedding of every prompt, memory-mapped from the store."""

    def __init__(self, store: Store, identity: str):
        self._store, self._identity = store, identity

    def get(self, prompt: str) -> Tensor:
        """Return the embedding, (tokens, width), in the encoder's dtype."""
        return self._store.get(prompt_key(prompt, self._identity))


def prompt_key(prompt: str, identity: str) -> str:
    """Return the key of a prompt's embedding in the store."""
    return sha256_text("prompt", prompt, identity)


class Prompts(LazySequence[str]):
    """The captions of all samples plus some other prompts, without holding them in memory.

    Args:
        captions: Captions of each sample, read again on every access.
        others: Other prompts.
    """

    def __init__(self, captions: Sequence[Sequence[str]], others: Sequence[str]):
        self._captions, self._others = captions, tuple(others)

    def __len__(self) -> int:
        return self._num_captions + len(self._others)

    def __iter__(self) -> Iterator[str]:
        return chain(chain.from_iterable(self._captions), self._others)

    def _item(self, index: int) -> str:
        if index >= self._num_captions:
            return self._others[index - self._num_captions]
        row = int(np.searchsorted(self._ends, np.uint32(index), side="right"))
        return self._captions[row][index - (int(self._ends[row - 1]) if row else 0)]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Cumulative number of captions up to and including each sample, (samples,)."""
        return np.cumsum(np.fromiter(map(len, self._captions), np.uint32, len(self._captions)), dtype=np.uint32)

    @property
    def _num_captions(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0


def cache_prompts(
    prompts: Sequence[str],
    identity: str,
    load: Callable[[], Encoder],
    store: Store,
    host: Host,
    ranks: Ranks = ALONE,
) -> TextCache:
    """Encode the prompts whose embeddings are missing. The encoder is loaded only if there are any.

    Args:
        prompts: The prompts.
        identity: Identity of the encoder: Family.identity(model, "text_encoder").
        load: Loads the encoder.
        store: Where embeddings are stored.
        host: Receives progress.
        ranks: Processes that share out the batches.
    Raises:
        Cancelled: Between two batches; embeddings encoded so far are stored.
    """
    lengths = array("I")
    keys = digests(_keys(prompts, identity, lengths))

    def make(absent: np.ndarray) -> Iterator[Mapping[str, Tensor]]:
        host.emit(PhaseStarted("text", len(absent), "prompts"))
        encoder = load()
        high, low = keys[absent].T
        ordered = absent[
            np.lexsort((low, high, np.array(lengths)[absent]))
        ]  # prompts of similar length need the least padding
        for start in ranks.deal(range(0, len(ordered), BATCH)):
            host.check_cancelled()
            indices: list[int] = ordered[start : start + BATCH].tolist()
            batch = [prompts[i] for i in indices]
            with torch.no_grad():
                embeddings = encoder.encode(batch)
            yield dict(zip((prompt_key(prompt, identity) for prompt in batch), embeddings, strict=True))
            host.emit(PhaseProgress("text", start + len(batch), len(absent)))

    fill(store, keys, make, workers=ranks.as_workers)
    return TextCache(store, identity)


def _keys(prompts: Iterable[str], identity: str, lengths: array) -> Iterator[str]:
    """Yield each prompt's key, and append its length to `lengths`."""
    for prompt in prompts:
        lengths.append(len(prompt))
        yield prompt_key(prompt, identity)
