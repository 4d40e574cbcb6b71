"""Prepare the next micro-batch in a thread while the device computes the current one.

A micro-batch is a pure function of its number. It has the same bytes whichever thread makes it, and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ...devices import as_current, module_of, works_beside
from .state import Batch, Fetch


class BatchPrefetcher:
    """Return micro-batches by number, and prepare the next one in a thread. `close` ends the thread.

    Args:
        make: makes a micro-batch from its number. It is called in the caller's thread for the first micro-batch and for
            every one that was not prepared, as when a step is retried.
        end: number of the last micro-batch plus one.
        following: returns the number of the micro-batch that comes after this one.
    """

    def __init__(self, make: Fetch, end: int, following: Callable[[int], int] = lambda micro: micro + 1):
        self._make, self._end, self._following = make, end, following
        self._next: tuple[int, Future[Batch]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")

    def get(self, micro: int) -> Batch:
        """Return a micro-batch.

        Raises:
            Exception: whatever `make` raised, also in the thread.
        """
        expected, self._next = self._next, None
        batch = expected[1].result() if expected and expected[0] == micro else self._make(micro)
        following = self._following(micro)
        if following < self._end:
            self._next = following, self._pool.submit(self._make, following)
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def is_worth_it(device: torch.device) -> bool:
    """Return whether prefetching pays off on a device.

    On a CPU the thread would take cores from the step itself, and MPS has no pinned memory.
    """
    return works_beside(device)


@contextmanager
def prefetch_batches(
    make: Fetch, device: torch.device, end: int, following: Callable[[int], int] = lambda micro: micro + 1
) -> Iterator[Fetch]:
    """Yield a function that returns micro-batches by number: with prefetching where it pays off, else `make` itself.

    The thread has ended when the context exits.
    """
    if not is_worth_it(device):
        yield make
        return
    prefetcher = BatchPrefetcher(_pin_batches(make, device), end, following)
    try:
        yield prefetcher.get
    finally:
        prefetcher.close()


def _pin_batches(make: Fetch, device: torch.device) -> Fetch:
    if not works_beside(device):
        return make
    if device.index is None:
        device = torch.device(device.type, module_of(device).current_device())

    def make_pinned(micro: int) -> Batch:
        with as_current(device):  # a new thread starts on the first GPU, which another program may use
            return make(micro).pinned()

    return make_pinned
