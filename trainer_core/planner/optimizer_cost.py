"""Count the cost of the optimizer: run the run's own optimizer and weight average for one step on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ..adapters.inject import trainable_parameters
from ..adapters.layer import AdapterLayer
from ..config.request import TrainRequest
from ..optim.optimizer import OptimizerPart, able, evaluating, parameter_groups
from ..registry import load
from ..setup.attach_adapter import new_ema
from .cost_model import OptimizerCost
from .meta_counter import MemoryTracker, ZeroItems, bytes_of


def optimizer_of(
    layers: Mapping[str, AdapterLayer], rates: Mapping[str, float], request: TrainRequest, device_type: str = "cuda"
) -> torch.optim.Optimizer:
    """Return the run's optimizer. It may change the precision of the trainable parameters.

    Args:
        layers: adapter layers, on the meta device.
        rates: factors of the learning rate, see setup.attach_adapter.learning.
        device_type: type of the device of the training. The size of temporary tensors may depend on it (adamw_bf16).
    """
    part: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    training = request.training
    # One block of each kind has its initial values; the others' parameters get the same groups.
    groups = parameter_groups(layers, rates, frozenset().union(*(layer.parts_of_base() for layer in layers.values())))
    optimizer = part.build(groups, request.optimizer, training.learning_rate, training.weight_decay, training.seed)
    able(optimizer).planned_for = device_type
    return optimizer


def count_optimizer_cost(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, AdapterLayer], request: TrainRequest
) -> OptimizerCost:
    """Count the bytes over one step, without the initial values of the layers. A few seconds for a released model."""
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    gradients = bytes_of(*parameters)
    counter = MemoryTracker()
    with ZeroItems(), counter:
        ema = new_ema(request, layers)
        average = counter.now
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        resident = counter.now - gradients  # gradients are counted as well, and stay allocated
        for parameter in parameters:
            parameter.grad = None
        step_peak = counter.peak - resident
        counter.mark()
        if ema:
            ema.update_(layers)
        step_peak = max(step_peak, counter.peak - resident)
        counter.mark()
        with evaluating(optimizer), ema.applied(layers) if ema else nullcontext():
            aside = counter.peak - resident
    copies = sum(
        master.numel() * factors[0].itemsize
        for layer in layers.values()
        if (factors := layer.working_factors())
        for master, _ in factors[1]
    )
    step_peak = max(step_peak, gradients + copies)  # gradients of the copies become those of the parameters
    return OptimizerCost(
        copies=copies, adapter=gradients, parameters=sum(parameter.numel() for parameter in parameters), start=0,
        states=resident - average, average=average, step_peak=step_peak, aside=aside,
    )  # fmt: skip
