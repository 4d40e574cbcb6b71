"""The next micro-batch is read and drawn while the device computes this one, and comes to it without the host waiting.

A micro-batch is a function of its number alone, so that it does not matter who makes it, or when: the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ...devices import as_current, module_of, works_beside
from .state import Batch, Fetch


class BatchPrefetcher:
    """Gives micro-batches by number; while one is in use a thread makes the next. `close` ends the thread.

    Args:
        make: from a number. Called here for the first one and for any that was not expected, such as a step begun anew.
        end: the number behind the last one.
    """

    def __init__(self, make: Fetch, end: int):
        self._make, self._end = make, end
        self._next: tuple[int, Future[Batch]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")

    def get(self, micro: int) -> Batch:
        """Raises: whatever making it raised, here and not in the thread."""
        expected, self._next = self._next, None
        batch = expected[1].result() if expected and expected[0] == micro else self._make(micro)
        if micro + 1 < self._end:
            self._next = micro + 1, self._pool.submit(self._make, micro + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def is_worth_it(device: torch.device) -> bool:
    """On a CPU the thread takes cores from the step itself, and MPS has no pinned memory."""
    return works_beside(device)


@contextmanager
def prefetch_batches(make: Fetch, device: torch.device, end: int) -> Iterator[Fetch]:
    """Gives what makes micro-batches by number: a thread that works ahead, where that is worth one, else `make`. No thread is left."""
    if not is_worth_it(device):
        yield make
        return
    ahead = BatchPrefetcher(_pinning(make, device), end)
    try:
        yield ahead.get
    finally:
        ahead.close()


def _pinning(make: Fetch, device: torch.device) -> Fetch:
    if not works_beside(device):
        return make
    if device.index is None:
        device = torch.device(device.type, module_of(device).current_device())

    def make_pinned(micro: int) -> Batch:
        with as_current(device):  # a new thread's own is the first GPU, which may be another program's
            return make(micro).pinned()

    return make_pinned
