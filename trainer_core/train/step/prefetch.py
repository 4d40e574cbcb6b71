"""The next micro-batch is read and drawn while the device computes this one, and comes to it without the host waiting.

A micro-batch is a function of its number alone, so that it does not matter who makes it, or when: the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...devices import as_current, module_of, works_beside
from ...models.token_routing import Route

if TYPE_CHECKING:
    from .loop import Run


@dataclass(frozen=True)
class Batch:
    """What a micro-batch trains on.

    Args:
        x_sigma, velocity: (B, channels, h, w), fp32. sigma: (B,), fp32.
        text: B embeddings (tokens, width).
        beside: what else predict takes, such as pictures to start from.
        weight: of every place in the loss, (B, 1, h, w), fp32, where pictures have masks.
        prior: (B,), bool, where samples are trained towards the base's own prediction; None where none is.
        levels, x0: of a rollout, (steps + 1, B) and (B, channels, h, w), see rollout.py; x_sigma is at the first level then, and comes
            down to the last, which is sigma. share: (B, 1, 1, 1), of predictions in the loss, once it has come down.
        route: which tokens skip which blocks; None where none does.
    """

    x_sigma: Tensor
    velocity: Tensor
    sigma: Tensor
    text: Sequence[Tensor]
    beside: Mapping[str, Any]
    weight: Tensor | None = None
    prior: Tensor | None = None
    levels: Tensor | None = None
    x0: Tensor | None = None
    share: Tensor | None = None
    route: Route | None = None

    def to(self, device: torch.device) -> Batch:
        """The host does not wait for a GPU's copies: the kernels that read them do, being later in the same stream."""
        runs_on = works_beside(device)
        return self._changed(lambda tensor: tensor.to(device, non_blocking=runs_on))

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        beside = {name: change(tensor) for name, tensor in self.beside.items()}
        text = [change(tensor) for tensor in self.text]
        rest = (self.weight, self.prior, self.levels, self.x0, self.share)
        changed = [None if tensor is None else change(tensor) for tensor in rest]
        route = None if self.route is None else replace(self.route, kept=change(self.route.kept))
        return Batch(change(self.x_sigma), change(self.velocity), change(self.sigma), text, beside, *changed, route=route)


class Ahead:
    """Gives micro-batches by number; while one is in use a thread makes the next. `close` ends the thread.

    Args:
        make: from a number. Called here for the first one and for any that was not expected, such as a step begun anew.
        end: the number behind the last one.
    """

    def __init__(self, make: Callable[[int], Batch], end: int):
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
def reading_ahead(run: Run, make: Callable[[int], Batch]) -> Iterator[None]:
    """While it lasts run.ahead makes the micro-batches, where that is worth a thread; however it ends, none is left."""
    if not is_worth_it(run.device):
        yield
        return
    run.ahead = Ahead(_pinning(make, run.device), run.num_steps * run.config.accumulation)
    try:
        yield
    finally:
        run.ahead.close()
        run.ahead = None


def _pinning(make: Callable[[int], Batch], device: torch.device) -> Callable[[int], Batch]:
    if not works_beside(device):
        return make
    if device.index is None:
        device = torch.device(device.type, module_of(device).current_device())

    def make_pinned(micro: int) -> Batch:
        with as_current(device):  # a new thread's own is the first GPU, which may be another program's
            return make(micro).pinned()

    return make_pinned
