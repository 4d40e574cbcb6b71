"""Add the gradients of micro-batches that several ranks computed, in the order in which one process would add them.

One process accumulates ((g0 + g1) + g2) + g3 in .grad. The ranks split every gradient into as many slices as there are
ranks; each rank owns one slice, gets it from all ranks, and adds the parts in the order of micro-batches:

    all_to_all:  rank j gets slice j of every rank's gradient, for each round of micro-batches
    addition:    owned += part of micro-batch 0; owned += part of micro-batch 1; ...
    all_gather:  after the last round, every rank gets all sums

So the sum is equal bit by bit for every number of ranks. An all_reduce adds in an order that depends on their number.
The volume is the same as that of a ring all_reduce if each rank computes one micro-batch per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wire:
    """How slices travel between ranks.

    Args:
        rank: number of this rank.
        size: number of ranks.
        device: where the tensors lie that are exchanged: the CPU, or the ranks' accelerators.
        all_to_all: (output, input), both 1-D uint8 in `size` equal slices: as torch.distributed.all_to_all_single.
        all_gather: (output, input), both 1-D uint8: as torch.distributed.all_gather_single.
    """

    rank: int
    size: int
    device: torch.device
    all_to_all: Callable[[Tensor, Tensor], Any]
    all_gather: Callable[[Tensor, Tensor], Any]


@dataclass
class _Sum:
    """The sum of one dtype's elements. Only the slice that this rank owns is added up here."""

    parameters: list[nn.Parameter]
    dtype: torch.dtype
    head: int  # elements before the gradients
    owned: Tensor | None = None

    def add_round_(self, flat: Tensor, wire: Wire, num_micros: int) -> None:
        """Add a round of micro-batches.

        Args:
            flat: this rank's elements, padded to slices.
            num_micros: micro-batches in the round; those of ranks from this number on are ignored.
        """
        parts = torch.empty_like(flat)
        wire.all_to_all(parts.view(torch.uint8), flat.view(torch.uint8))
        for part in parts.view(wire.size, -1)[:num_micros]:
            if self.owned is None:
                self.owned = part.clone()  # 0 + -0.0 would be 0.0
            else:
                self.owned += part

    def collect(self, wire: Wire) -> Tensor:
        """Return the sums of all slices."""
        assert self.owned is not None
        total = torch.empty(wire.size * self.owned.numel(), dtype=self.dtype, device=wire.device)
        wire.all_gather(total.view(torch.uint8), self.owned.view(torch.uint8))
        return total


def add_gradients_(
    wire: Wire, parameters: Sequence[nn.Parameter], micros: range, backward: Callable[[int], Tensor]
) -> Tensor:
    """See Ranks.add_gradients_."""
    head = 1 + len(parameters)  # the loss, and which parameters have a gradient at all
    sums = [_Sum(own, dtype, head * (dtype == torch.float32)) for dtype, own in _by_dtype(parameters).items()]
    device = parameters[0].device
    for first in range(0, len(micros), wire.size):
        num_micros = min(wire.size, len(micros) - first)
        loss = torch.zeros((), device=device)
        if wire.rank < num_micros:
            loss = backward(micros[first + wire.rank])
        front = torch.cat([loss.reshape(1).float(), _has_gradient(parameters, device)])
        for part in sums:
            part.add_round_(_flatten(part, front, wire), wire, num_micros)
        _clear_(parameters)
    totals = [part.collect(wire).to(device) for part in sums]
    front = next(total[:head] for total, part in zip(totals, sums, strict=True) if part.head)
    is_used = dict(zip(map(id, parameters), front[1:].tolist(), strict=True))
    for part, total in zip(sums, totals, strict=True):
        _set_gradients_(part, total, is_used)
    return front[0].clone()


def sum_in_order(wire: Wire, tensor: Tensor) -> Tensor:
    """See Ranks.sum_in_order."""
    flat = tensor.reshape(-1).to(wire.device)
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % wire.size)])
    parts = torch.empty_like(flat)
    wire.all_to_all(parts.view(torch.uint8), flat.view(torch.uint8))
    first, *others = parts.view(wire.size, -1)
    owned = first.to(torch.float32, copy=True)
    for part in others:
        owned += part
    total = torch.empty(wire.size * owned.numel(), device=wire.device)
    wire.all_gather(total.view(torch.uint8), owned.view(torch.uint8))
    # A new tensor, because a kernel may add up a norm of a slice in another order.
    return torch.empty(tensor.shape, device=tensor.device).copy_(total[: tensor.numel()].view(tensor.shape))


class ShardSum:
    """Adds up the gradients of several tensors, of which each rank owns a slice, over the rounds of a step.

    The order is that of micro-batches, whatever the number of ranks. FSDP2 calls it in place of its reduce_scatter, with
    the protocol of torch.distributed.fsdp's ReduceScatter.

    Args:
        wire: how slices travel.
    """

    def __init__(self, wire: Wire):
        self.wire = wire
        self.total: Tensor | None = None  # of this rank's slice, fp32, on the wire's device
        self._position = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for an input or an output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Add a round: all slices of this rank's micro-batch. `take` has the result, and not output_tensor."""
        assert not async_op
        flat = input_tensor.to(self.wire.device)
        parts = torch.empty_like(flat)
        self.wire.all_to_all(parts.view(torch.uint8), flat.view(torch.uint8))
        for part in parts.view(self.wire.size, -1):
            if self.total is None:
                self.total = part.to(torch.float32, copy=True)  # 0 + -0.0 would be 0.0
            else:
                self.total += part
        self._position = 0

    def take(self, numel: int, padded_numel: int) -> Tensor:
        """Return the sum of the next tensor's slice, (numel,), on the wire's device.

        Args:
            numel: elements of this rank's slice.
            padded_numel: elements of the largest slice.
        """
        assert self.total is not None and self._position + padded_numel <= self.total.numel()
        part = self.total[self._position : self._position + numel]
        self._position += padded_numel
        return part

    def forget_if_taken(self) -> None:
        """Free the sums once `take` has returned all of them. They live on in what it returned."""
        if self.total is not None and self._position == self.total.numel():
            self.total = None

    def clear(self) -> None:
        self.total, self._position = None, 0


def _by_dtype(parameters: Sequence[nn.Parameter]) -> dict[torch.dtype, list[nn.Parameter]]:
    """Return the parameters by dtype: each is added in its own precision, as by autograd. fp32 has the losses too."""
    groups: dict[torch.dtype, list[nn.Parameter]] = {torch.float32: []}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return groups


def _has_gradient(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    return torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)


def _flatten(part: _Sum, front: Tensor, wire: Wire) -> Tensor:
    """Return the gradients of one dtype as one vector on the wire's device, with zeros for those that are missing."""
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in part.parameters]
    pieces = [front, *gradients] if part.head else gradients
    length = sum(piece.numel() for piece in pieces)
    pieces.append(torch.zeros(-length % wire.size, dtype=part.dtype, device=front.device))
    return torch.cat(pieces).to(wire.device)


def _clear_(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _set_gradients_(part: _Sum, total: Tensor, is_used: dict[int, float]) -> None:
    """Set .grad to new tensors. For slices, which are not aligned, a kernel may add up a norm in another order."""
    start = part.head
    for parameter in part.parameters:
        piece = total[start : start + parameter.numel()]
        start += parameter.numel()
        if is_used[id(parameter)]:
            parameter.grad = torch.empty_like(parameter).copy_(piece.view(parameter.shape))
