"""The processes that train a run together, called ranks, and how they share out work. This file: a single process.

The request decides the mathematics: a step has `accumulation` micro-batches, whatever the number of ranks. Micro-batch
n of a step is computed by rank n mod size. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")


class RankLost(UserError):
    """Another rank ended, or failed. This rank's weights are those of the last whole step."""


@dataclass(eq=False)
class Ranks:
    """The ranks of a run, seen from one of them. Without arguments: the only one, which waits for nobody.

    process_group.py has those of several processes. Each method that they override must be called by all of them, in
    the same order.

    Args:
        rank: number of this process, from 0. Rank 0 is the main one: it alone writes the run's folder.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        node: number of this machine.
        warnings: of this rank, for rank 0 to show.
        device_names: product name of each rank's device.
        received: on rank 0, warnings of other ranks as (name of the rank, text), not shown yet.
        ends_together: whether all ranks end the run at the same place, so that they can still work together.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    warnings: list[str] = field(default_factory=list)
    received: list[tuple[str, str]] = field(default_factory=list)
    device_names: list[str] = field(default_factory=list)
    ends_together: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """Whether this is the first process of its machine, which does what can't be shared out there."""
        return self.local_rank == 0

    def numbers(self, count: int) -> range:
        """Return which of `count` items this rank computes."""
        return range(self.rank, count, self.size)

    def next_micro(self, micro: int, accumulation: int) -> int:
        """Return the micro-batch that this rank computes after this one."""
        step, number = divmod(micro, accumulation)
        following = number + self.size
        return micro + self.size if following < accumulation else (step + 1) * accumulation + self.rank

    def deal(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items that this rank computes for its machine: caches are filled once on each machine."""
        return islice(items, self.local_rank, None, self.local_size)

    def together(self, compute: Callable[[], T]) -> list[T]:
        """Compute a JSON value on each rank, and return those of all ranks.

        Raises:
            Exception: whatever `compute` raised, on every rank if it failed on one of them.
        """
        return [compute()]

    def gather_bytes(self, compute: Callable[[], bytes]) -> list[bytes]:
        """As `together`, for bytes."""
        return [compute()]

    def from_main(self, compute: Callable[[], T]) -> T:
        """Compute a JSON value on the main rank, and return it on all."""
        return self.together(lambda: compute() if self.is_main else None)[0]  # type: ignore[return-value]

    def bytes_from_main(self, compute: Callable[[], bytes]) -> bytes:
        """As `from_main`, for many bytes."""
        return compute()

    def share_out(self, count: int, compute: Callable[[int], T]) -> list[T]:
        """Compute `count` JSON values, each on one rank, and return all of them in order."""
        parts = self.together(lambda: [compute(number) for number in self.numbers(count)])
        return [parts[number % self.size][number // self.size] for number in range(count)]

    def leaders_first(self, compute: Callable[[], T]) -> T:
        """Compute a value on each rank, first on each machine's leader: the others then find its caches filled."""
        return compute()

    def from_leader(self, compute: Callable[[], T]) -> T:
        """As `from_main`, on each machine by itself."""
        values = self.together(lambda: compute() if self.is_leader else None)
        return values[self.rank - self.local_rank]  # type: ignore[return-value]

    def merge(self, values: dict[str, str]) -> dict[str, str]:
        """Return the entries of all ranks."""
        return {key: text for part in self.together(lambda: values) for key, text in part.items()}

    @property
    def as_workers(self) -> Ranks | None:
        """These ranks if there are several, for storage.tensor_store.fill."""
        return self if self.size > 1 else None

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.together(lambda: None)

    def agree(self, check: Callable[[], None]) -> None:
        """Call a function that raises if the run shall stop. It raises on all ranks if it raises on one.

        Raises:
            Cancelled: another rank shall stop.
        """
        check()

    def collect_warnings(self) -> None:
        """Move the warnings of all ranks to the main one. The same warning of several ranks becomes one."""

    def require_equal(self, values: Mapping[str, str]) -> None:
        """Compare named texts, such as the dataset's digest, with those of the main rank.

        Raises:
            UserError: on all ranks, if one is different. It names the rank, its device and what is different.
        """

    def add_gradients_(
        self, parameters: Sequence[Any], micros: range, backward: Callable[[int], Any]
    ) -> Any:  # parameters: nn.Parameter; returns a Tensor
        """Compute the gradients of these micro-batches, each on one rank, and add them up in order.

        Args:
            parameters: trainable parameters. Their .grad is None before, and on all ranks the same sum after.
            micros: numbers of the step's micro-batches.
            backward: computes the gradients of one micro-batch into .grad, and returns its loss.
        Returns:
            The sum of the losses.
        """
        raise NotImplementedError("one process adds up its gradients by itself")

    def sum_in_order(self, tensor: Any) -> Any:
        """Return the sum of a tensor of each rank, added in fp32 in the order of the ranks.

        One rank: the tensor itself.
        """
        return tensor

    def name_of(self, rank: int) -> str:
        """Return a rank with its device, for messages."""
        return f"rank {rank}"

    def report_failure(self, text: str) -> None:
        """Let the other ranks know why this one ends."""


ALONE = Ranks()
