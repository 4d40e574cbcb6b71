"""Join the ranks that torchrun (or accelerate launch) started, and talk to them with torch.distributed.

All messages travel on gloo, over the CPU. Gradients travel on NCCL where every rank has a GPU of its own and NCCL is
available, else on gloo too: the bits are the same. A run of one process imports nothing of torch.distributed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..devices import device_name, works_beside
from ..errors import Cancelled, Problem, UserError, one_line
from .device_list import device_of_rank, local_rank_and_size, num_launched
from .gradient_exchange import Wire, add_gradients_, sum_in_order
from .ranks import ALONE, RankLost, Ranks

T = TypeVar("T")
STOP, KEEP_ON = 1, 0
LONGEST_WAIT = timedelta(days=7)  # while another rank encodes a dataset. A rank that ends is noticed at once
LONGEST_STEP = timedelta(hours=1)  # of NCCL, whose watchdog ends the process; the ranks agree on gloo before each step
REASON_SECONDS = 5.0  # how long to wait for the last words of a rank that ended
REASON = "chroma_trainer/failure"


@dataclass(eq=False)
class JoinedRanks(Ranks):
    """See Ranks. The ranks are those of torch.distributed's default process group, which uses gloo.

    Args:
        device: the device of this rank.
        places: device and host name of every rank.
        wire: how gradients travel.
        group: torch's process group of the wire; None: the default one.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    places: Sequence[str] = ()
    wire: Wire | None = None
    group: Any = None

    def together(self, compute: Callable[[], T]) -> list[T]:
        return [json.loads(part) for part in self.gather_bytes(lambda: json.dumps(compute()).encode())]

    def gather_bytes(self, compute: Callable[[], bytes]) -> list[bytes]:
        error, payload = None, b""
        try:
            payload = b"+" + compute()
        except Exception as own:
            error, payload = own, b"-" + one_line(own).encode("utf-8", "replace")
        replies = self._all_gather(payload)
        if error:
            raise error
        failures = {rank: reply[1:].decode() for rank, reply in enumerate(replies) if reply[:1] == b"-"}
        if failures:
            raise self._failure_of(failures)
        return [reply[1:] for reply in replies]

    def bytes_from_main(self, compute: Callable[[], bytes]) -> bytes:
        computed: list[bytes] = []

        def length() -> int:
            computed.append(compute())
            return len(computed[0])

        data = torch.empty(self.from_main(length), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(computed[0]), dtype=torch.uint8))
        self._call(lambda dist: dist.broadcast(data, 0))
        return data.numpy().tobytes()

    def leaders_first(self, compute: Callable[[], T]) -> T:
        results: list[T] = []
        for is_turn in (self.is_leader, not self.is_leader):
            self.together(lambda is_turn=is_turn: results.append(compute()) if is_turn else None)
        return results[0]

    def agree(self, check: Callable[[], None]) -> None:
        error = None
        try:
            check()
        except BaseException as own:
            error = own
        flags = torch.tensor([STOP if error else KEEP_ON, bool(self.warnings)], dtype=torch.int32)
        self._call(lambda dist: dist.all_reduce(flags, op=dist.ReduceOp.MAX))
        stops, has_warnings = flags.tolist()
        if has_warnings:
            self.collect_warnings()
        self.ends_together = self.ends_together or bool(stops)
        if error:
            raise error
        if stops:
            raise Cancelled

    def collect_warnings(self) -> None:
        own, self.warnings = self.warnings, []
        texts = self.together(lambda: own)
        if self.is_main:
            ranks_of: dict[str, list[int]] = {}
            for rank, lines in enumerate(texts):
                for line in lines:
                    ranks_of.setdefault(line, []).append(rank)
            self.received += [(self.name_of(ranks[0]), line) for line, ranks in ranks_of.items()]

    def require_equal(self, values: Mapping[str, str]) -> None:
        all_values = self.together(lambda: dict(values))
        names = dict.fromkeys(name for own in all_values for name in own)
        problems = [
            Problem(name, f"{self.name_of(rank)} has {own.get(name)!r}, and {self.name_of(0)} has {first!r}; {FIX}")
            for name in names
            for first in [all_values[0].get(name)]
            for rank, own in enumerate(all_values)
            if own.get(name) != first
        ]
        if problems:
            raise UserError(problems)

    def add_gradients_(
        self, parameters: Sequence[torch.nn.Parameter], micros: range, backward: Callable[[int], Tensor]
    ) -> Tensor:
        assert self.wire
        return add_gradients_(self.wire, parameters, micros, backward)

    def sum_in_order(self, tensor: Tensor) -> Tensor:
        assert self.wire
        return sum_in_order(self.wire, tensor)

    def report_failure(self, text: str) -> None:
        import torch.distributed as dist

        try:
            dist.distributed_c10d._get_default_store().set(f"{REASON}/{self.rank}", text)
        except Exception:  # the store has ended too
            return

    def name_of(self, rank: int) -> str:
        return f"rank {rank} ({self.places[rank]})" if self.places else f"rank {rank}"

    def _all_gather(self, payload: bytes) -> list[bytes]:
        length = torch.tensor([len(payload)])
        lengths = torch.empty(self.size, dtype=torch.int64)
        self._call(lambda dist: gather_of(dist)(lengths, length))
        longest = int(lengths.max())
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = torch.empty(self.size * longest, dtype=torch.uint8)
        self._call(lambda dist: gather_of(dist)(parts, own))
        rows = parts.view(self.size, longest)
        return [rows[rank, :size].numpy().tobytes() for rank, size in enumerate(lengths.tolist())]

    def _call(self, collective: Callable[[Any], Any]) -> None:
        """Run a collective of torch.distributed.

        Raises:
            RankLost: another rank has ended.
        """
        import torch.distributed as dist

        try:
            collective(dist)
        except RuntimeError as error:
            raise self._failure_of(self._reasons()) from error

    def _reasons(self) -> dict[int, str]:
        """Return why other ranks ended, as far as they could say it."""
        import torch.distributed as dist

        store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + REASON_SECONDS
        others = [rank for rank in range(self.size) if rank != self.rank]
        while True:
            try:
                reasons = {n: store.get(f"{REASON}/{n}").decode() for n in others if store.check([f"{REASON}/{n}"])}
            except Exception:  # the process that held the store has ended
                return {}
            if reasons or time.monotonic() > end:
                return reasons
            time.sleep(0.1)

    def _failure_of(self, reasons: Mapping[int, str]) -> RankLost:
        if not reasons:
            text = (
                "another process of this run ended without a message (killed, or out of memory?); run again to resume"
            )
            return RankLost([Problem("devices", text)])
        return RankLost([Problem("devices", f"{self.name_of(rank)}: {text}") for rank, text in reasons.items()])


FIX = "all processes of a run need the same version, workflow, dataset and model files"


_joined: list[JoinedRanks] = []
_own: list[bool] = []  # whether the default group is that of this process alone


def gather_of(dist: Any) -> Callable[..., Any]:
    """Return torch's all_gather into one tensor, which has another name since torch 2.13."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def has_joined() -> bool:
    """Return whether this process has joined others."""
    return bool(_joined)


def join() -> Ranks:
    """Return the ranks of this run. The first call waits until all processes have called it; a single process is ALONE.

    Raises:
        UserError: there is no device for this process, or the launcher's variables are incomplete.
    """
    if not num_launched():
        return ALONE
    if not _joined:
        _joined.append(_join())
    return _joined[0]


def default_group() -> Any:
    """Return torch's default process group. A process that has joined no others makes one of its own, see leave_own."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        _own.append(True)
    return dist.group.WORLD


def leave_own() -> None:
    """Close the process group that default_group made, if it made one: other code of this process may want its own."""
    if _own:
        import torch.distributed as dist

        _own.clear()
        dist.destroy_process_group()


def leave() -> None:
    """Close the connections to the other processes, if there are any. For the end of a run that all of them reached.

    Left to the interpreter's exit, threads of gloo that still run sometimes abort the process (1 of about 30 here), and
    torchrun takes that for a failure.
    """
    import torch.distributed as dist

    if _joined:
        _joined.clear()
        dist.destroy_process_group()


def _join() -> JoinedRanks:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        text = f"is set, but {', '.join(missing)} is not; use --devices, torchrun or accelerate launch"
        raise UserError.at("WORLD_SIZE", text)
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch for Windows is built without it
    import torch.distributed as dist

    device = device_of_rank()
    if works_beside(device):
        getattr(torch, device.type).set_device(device)
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    local_rank, local_size = local_rank_and_size()
    ranks = JoinedRanks(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device=device)
    hosts = ranks.together(lambda: [socket.gethostname(), str(device), device_name(device), local_rank])
    ranks.node = sum(row[3] == 0 for row in hosts[: ranks.rank + 1]) - 1
    ranks.places = [f"{row[1]} on {row[0]}" for row in hosts]
    ranks.device_names = [str(row[2]) for row in hosts]
    ranks.wire = _wire(ranks, [f"{row[0]} {row[1]}" for row in hosts])
    return ranks


def _wire(ranks: JoinedRanks, places: Sequence[str]) -> Wire:
    """Return NCCL's collectives where each rank has a GPU of its own, else gloo's."""
    import torch.distributed as dist

    has_own_gpu = ranks.device.type == "cuda" and len(set(places)) == ranks.size
    uses_nccl = all(ranks.together(lambda: has_own_gpu and dist.is_nccl_available()))
    group = dist.new_group(backend="nccl", timeout=LONGEST_STEP) if uses_nccl else None

    def all_to_all(output: Tensor, slices: Tensor) -> None:
        ranks._call(lambda dist: dist.all_to_all_single(output, slices, group=group))

    def all_gather(output: Tensor, part: Tensor) -> None:
        ranks._call(lambda dist: gather_of(dist)(output, part, group=group))

    device, ranks.group = ranks.device if uses_nccl else torch.device("cpu"), group
    return Wire(ranks.rank, ranks.size, device, all_to_all, all_gather)
