"""Gradients of several processes are added as one process adds them, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.fleet import Fleet, Job

SHAPES = ((3, 5), (7,), (1,), (2, 2, 3))


def gradients(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Gradients whose sizes differ so much that the order of additions decides the last bits."""
    rng = torch.Generator().manual_seed(count)
    return [
        [(torch.randn(shape, generator=rng) * 10.0 ** (3 * (micro % 3))).to(dtype) for shape in SHAPES]
        for micro in range(count)
    ]


def added_by_one(parts: list[list[Tensor]]) -> list[Tensor]:
    """What autograd does in one process."""
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in parts[0]]
    for part in parts:
        sum((p * g).sum() for p, g in zip(parameters, part, strict=True)).backward()  # type: ignore[union-attr]
    return [parameter.grad for parameter in parameters]  # type: ignore[misc]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("size", "count"), [(2, 4), (2, 5), (3, 4), (4, 6), (4, 4)])
def test_the_sum_is_in_the_order_of_micro_batches(fleet: Fleet, tmp_path: Any, size: int, count: int):
    parts = gradients(count)
    job = Job(size, "exchange", {"gradients": parts}, tmp_path)
    assert fleet.run(job) == [0] * size, job.log(0)
    losses = [part[0].flatten()[0] for part in parts]
    expected = losses[0]
    for loss in losses[1:]:
        expected = expected + loss
    for rank in range(size):
        result = job.result(rank)
        assert same_bits(result["sums"], added_by_one(parts)) and torch.equal(result["loss"], expected)


def test_all_reduce_would_not_do(fleet: Fleet, tmp_path: Any):
    parts = gradients(6)
    job = Job(4, "exchange", {"gradients": parts}, tmp_path)
    fleet.run(job)
    assert not same_bits(job.result(0)["reduced"], added_by_one(parts))


def test_negative_zeros_and_bf16_stay_as_they_are(fleet: Fleet, tmp_path: Any):
    parts = [[*gradients(4)[micro][:2], *gradients(4, torch.bfloat16)[micro][2:]] for micro in range(4)]
    for part in parts:
        part[0][0] = -0.0
    job = Job(2, "exchange", {"gradients": parts}, tmp_path)
    assert fleet.run(job) == [0, 0], job.log(0)
    assert same_bits(job.result(1)["sums"], added_by_one(parts))
    assert job.result(1)["sums"][0][0].signbit().all()


def test_a_parameter_without_a_gradient_has_none_after(fleet: Fleet, tmp_path: Any):
    parts = gradients(2)
    job = Job(2, "exchange_without_last", {"gradients": parts}, tmp_path)
    assert fleet.run(job) == [0, 0], job.log(0)
    assert [gradient is None for gradient in job.result(0)] == [False, False, False, True]
