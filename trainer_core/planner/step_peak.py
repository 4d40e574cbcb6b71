"""Peak memory of a training step and of a sampling pass: the costs of the blocks, in the order of computation."""

from __future__ import annotations

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..memory.activation_checkpointing import places_to_recompute
from .cost_model import BlockCost, ModelCost


def blocks_to_recompute(request: TrainRequest, num_blocks: int) -> range:
    """Return the indices of the blocks that are recomputed in the backward pass."""
    if not request.training.gradient_checkpointing:
        return range(0)
    return places_to_recompute(num_blocks, request.memory.checkpointing_interval, not request.memory.moves)


def training_peak(cost: ModelCost, request: TrainRequest) -> tuple[int, int]:
    """Return the peak bytes of tensors on the device in a step, and the bytes of activations in RAM."""
    recomputed, to_host = set(blocks_to_recompute(request, len(cost.blocks))), request.memory.activation_offload
    resident = resident_bytes(cost, request.memory) + _states_of_a_layer(cost, request.memory)
    # Gradients of earlier micro-batches stay allocated, and those of this one are added to them.
    gradients = cost.optimizer_cost.adapter if request.training.accumulation > 1 and not request.adapter.is_full else 0
    exchange = _exchange(cost, request)
    level = resident + gradients + cost.before
    peak, host, inputs = level, 0, []
    carried = 0  # output of the block before, which is still on the device
    for i, block in enumerate(cost.blocks):
        inputs.append(level)
        during = block.forward_peak if i in recomputed else block.forward_grad_peak
        peak = max(peak, level + carried + block.waits + during)
        stored = block.output if i in recomputed else block.kept
        if to_host:
            host += stored
            carried = block.output
        else:
            level += stored
    peak = max(peak, level + carried + cost.head_peak)
    adapter_gradients = 0
    for i in range(len(cost.blocks) - 1, -1, -1):
        block = cost.blocks[i]
        during = _backward_peak(block, i in recomputed, to_host)
        during += exchange
        during += block.trained if request.memory.compile else 0  # the gradients of all of its layers come at once
        reloaded = block.output if to_host else 0
        peak = max(peak, inputs[i] + adapter_gradients + block.waits + during + reloaded)
        adapter_gradients += 0 if gradients else block.gradients
    return max(peak, resident + cost.optimizer_cost.step_peak), host


def _backward_peak(block: BlockCost, is_recomputed: bool, to_host: bool) -> int:
    """Return the peak above the bytes before the block. The second forward pass ends before the block's output."""
    if is_recomputed:
        return max(block.forward_grad_peak, block.backward_peak - block.output)
    return block.backward_peak - (block.kept - block.output if to_host else 0)


def resident_bytes(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of weights and of the optimizer on the device from the first step on, between two steps."""
    return resident_weights(cost, memory) + cost.optimizer_cost.resident - states_away(cost, memory)


def states_away(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of optimizer states that are in RAM, because their parameters are offloaded (kind full)."""
    moved = sum(cost.blocks[i].trained for i in memory.offloaded_blocks(len(cost.blocks)))
    return _states_of(cost, moved)


def _exchange(cost: ModelCost, request: TrainRequest) -> int:
    """Return the bytes of the sum of a layer's gradients over several devices (kind full), see sum_in_order.

    The gradient twice, as it is sent and as it comes, and the sum twice in fp32, for bf16 six times the weight.
    """
    is_summed = request.adapter.is_full and request.training.accumulation > 1 and not request.training.is_sharded
    return 6 * max((block.largest_leaf for block in cost.blocks), default=0) if is_summed else 0


def _states_of_a_layer(cost: ModelCost, memory: MemoryConfig) -> int:
    offloaded = [cost.blocks[i] for i in memory.offloaded_blocks(len(cost.blocks))]
    return _states_of(cost, max((block.largest_leaf for block in offloaded if block.trained), default=0))


def _states_of(cost: ModelCost, parameters: int) -> int:
    """Return the bytes of the large states of so many bytes of parameters."""
    return cost.optimizer_cost.large_states * parameters // max(1, cost.optimizer_cost.adapter)


def resident_weights(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of frozen weights on the device, less those of trained ones that are offloaded (kind full).

    With group offload these are the weights that stay on the device, and the groups that are loaded at one time.
    """
    offloaded = [cost.blocks[i] for i in memory.offloaded_blocks(len(cost.blocks))]
    if not offloaded:
        return cost.weights
    if memory.group_offload == "block":
        sizes = [block.weights + block.trained for block in offloaded]
        n = memory.blocks_per_group
        groups = sorted((sum(sizes[i : i + n]) for i in range(0, len(sizes), n)), reverse=True)
    else:
        groups = [max(block.largest_leaf for block in offloaded)] * 2
    return cost.weights - away(cost, memory) + sum(groups[: 2 if memory.offload_stream else 1])


def away(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of offloaded weights. With group_offload leaf, frozen tensors of adapters stay on the device."""
    offloaded = (cost.blocks[i] for i in memory.offloaded_blocks(len(cost.blocks)))
    is_whole = memory.group_offload == "block"
    return sum(block.weights + block.trained if is_whole else block.leaves for block in offloaded)


def sampling_peak(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the peak bytes of tensors in a forward pass without gradients, with the resident bytes of the training."""
    return resident_bytes(cost, memory) + cost.optimizer_cost.aside + sampling_work(cost)


def sampling_work(cost: ModelCost) -> int:
    """Return the peak bytes of a forward pass without gradients, above all weights."""
    inside = max(block.forward_peak for block in cost.blocks) + cost.blocks[0].output
    return cost.before + max(inside, cost.head_peak)
