"""The cost of a step for one of several devices that share out the weights (full_rank/sharding.py)."""

from __future__ import annotations

from dataclasses import replace

from ...config.request import TrainRequest
from ...config.training import IN_FP32
from ...devices import DTYPES
from ...full_rank.sharding import holds_gradients
from ..cost_model import ModelCost

FP32 = 4
# Of the largest block, in the precision of the products: FSDP2 holds the block that computes, and of the next one the
# gathered rows and the weights that they are copied to; the gradients of the block before are still on their way.
GATHERED, ON_THEIR_WAY = 3, 1
NOISE = 4  # bytes for each element of the largest layer: random numbers of a whole weight, from which a device takes its own


def widening(request: TrainRequest) -> int:
    """Return how many times as large the shards of weights and states are as in the model's precision."""
    return FP32 // DTYPES[request.model.dtype].itemsize if request.training.shard == IN_FP32 else 1


def stored(cost: ModelCost, request: TrainRequest) -> ModelCost:
    """Return the cost with the sizes of all shards together: what a checkpoint has."""
    own, factor = cost.optimizer_cost, widening(request)
    own = replace(own, adapter=factor * own.adapter, states=factor * own.states, large_states=factor * own.large_states)
    return replace(cost, optimizer_cost=own)


def cost_of_one(cost: ModelCost, request: TrainRequest, num_devices: int) -> tuple[ModelCost, int]:
    """Return the cost of one device, and the bytes that it has in RAM.

    Args:
        cost: Of a device that has the whole model, counted without steps inside of the backward pass.
    """
    whole = stored(cost, request).optimizer_cost
    gathered = [block.weights + block.trained for block in cost.blocks]  # in the precision of the products
    outside = cost.weights + cost.optimizer_cost.adapter - sum(gathered)
    gradients = FP32 * whole.parameters if holds_gradients(request, num_devices) else 0
    shares = [-(-size // num_devices) for size in (cost.weights, whole.adapter, whole.states, gradients)]
    frozen, adapter, states, sums = shares
    largest = max((block.largest_leaf for block in cost.blocks), default=0)
    working = (GATHERED + ON_THEIR_WAY) * max(gathered, default=0) + max(outside, 0)
    working += NOISE * largest // DTYPES[request.model.dtype].itemsize
    in_ram = 0
    if request.memory.group_offload != "none":
        in_ram, frozen, adapter, states, sums = sum(shares), 0, 0, 0, 0
    own = replace(
        whole, adapter=adapter, states=states, large_states=0, step_peak=whole.step_peak // num_devices,
        average=-(-whole.average // num_devices), aside=-(-whole.aside // num_devices),
        parameters=-(-whole.parameters // num_devices),
    )  # fmt: skip
    blocks = tuple(replace(block, gradients=0) for block in cost.blocks)
    return replace(cost, weights=frozen + sums + working, optimizer_cost=own, blocks=blocks), in_ram
