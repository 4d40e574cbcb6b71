"""Count the cost of the optimizer: run the run's own optimizer and weight average for one step on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ..adapters.inject import trainable_parameters
from ..adapters.layer import AdapterLayer
from ..config.request import TrainRequest
from ..full_rank.step_in_backward import StepInBackward
from ..optim.optimizer import OptimizerPart, able, build_optimizer, evaluating, parameter_groups
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
    # One block of each kind has its initial values; the others' parameters get the same groups.
    groups = parameter_groups(layers, rates, frozenset().union(*(layer.parts_of_base() for layer in layers.values())))
    optimizer = build_optimizer(part, layers, groups, request.optimizer, request.training)
    able(optimizer).planned_for = device_type
    return optimizer


def count_optimizer_cost(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, AdapterLayer], request: TrainRequest
) -> OptimizerCost:
    """Count the bytes over one step, without the initial values of the layers. A few seconds for a released model."""
    if request.adapter.is_full:
        return _count_in_backward(optimizer, layers, request)
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


def _count_in_backward(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, AdapterLayer], request: TrainRequest
) -> OptimizerCost:
    """Count steps inside of the backward pass (kind full): one gradient at a time.

    What a step takes beside the activations of its block is counted with the block, see meta_model.py.
    """
    parameters = dict(trainable_parameters(layers))
    stepper = StepInBackward(optimizer, parameters, request.training.seed)
    counter, resident = MemoryTracker(), 0
    with ZeroItems(), counter:
        for step in range(2):  # the first one makes the states
            resident = counter.mark()
            for parameter in parameters.values():
                parameter.grad = torch.empty_like(parameter)
                stepper.step_(parameter, step)
            stepper.forget_norms()
    return OptimizerCost(
        adapter=bytes_of(*parameters.values()), parameters=sum(p.numel() for p in parameters.values()), start=0,
        states=resident, average=0, step_peak=counter.peak - resident, aside=0,
        large_states=sum(_large_states(optimizer, parameter) for parameter in parameters.values()),
    )  # fmt: skip


def _large_states(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> int:
    """Return the bytes of the states that are as large as the parameter."""
    states = (value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
    return bytes_of(*(value for value in states if value.numel() >= max(2, parameter.numel())))
