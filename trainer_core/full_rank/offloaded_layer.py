"""Trained layers whose weights live in RAM (group offload of kind full).

memory/group_offload.py copies a weight to the device before it is used, as it does with frozen ones. Here the backward
pass of the layer's product also steps the weight there, with the optimizer's states, and copies both back. Autograd
knows no parameter that moves: the graph of a step would hold the device's copies until its end. So the product has a
gradient of its own, with the kernels of torch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.layer import AdapterLayer
from ..memory.group_offload import GroupOffload
from .trained_layer import TrainedLayer


def release_(layers: Iterable[AdapterLayer]) -> list[TrainedLayer]:
    """Let group offload move the parameters of these layers, because autograd does not know them. Return the layers."""
    trained = [layer for layer in layers if isinstance(layer, TrainedLayer)]
    for layer in trained:
        layer.base.requires_grad_(False)
    return trained


def offload_(layers: Iterable[TrainedLayer], offload: GroupOffload) -> None:
    """Let released layers compute with the copies on the device. Call while all parameters are in RAM."""
    for layer in layers:
        layer.moved = MovedProduct(layer.base, offload)


class MovedProduct:
    """The product of a layer whose weight and bias are on the device only while they are used.

    Args:
        base: The layer, with its parameters in RAM.
        offload: Moves them.
    """

    def __init__(self, base: nn.Linear, offload: GroupOffload):
        self.base, self.offload = base, offload
        self.homes = dict(base.named_parameters(recurse=False))
        self.group = offload.group_of(base)
        self.stepper: Any = None  # StepInBackward, once there is an optimizer
        self._trigger = torch.zeros((), requires_grad=True)  # so that autograd calls for a gradient in the first block

    def __call__(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self._trigger, self)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        self.offload.acquire(self.group)
        return F.linear(x, self.base.weight, self.base.bias)

    def backward(self, x: Tensor, gradient: Tensor, needs_input: bool) -> Tensor | None:
        """Return the gradient of x, after a step of the weight and the bias."""
        self.offload.acquire(self.group)
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = torch.mm(rows, self.base.weight).view(x.shape) if needs_input else None
        self._step_("weight", torch.mm(rows.t(), inputs))
        if self.base.bias is not None:
            self._step_("bias", rows.sum(0))
        return of_x

    def _step_(self, part: str, gradient: Tensor) -> None:
        assert self.stepper is not None, "a backward pass without an optimizer"
        resident = self.base.get_parameter(part)
        self.stepper.step_copy_(self.homes[part], resident, gradient)
        self.offload.write_back(self.group, resident)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, product: MovedProduct) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.product = product
        ctx.save_for_backward(x)
        return product.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return ctx.product.backward(x, gradient, ctx.needs_input_grad[0]), None, None
