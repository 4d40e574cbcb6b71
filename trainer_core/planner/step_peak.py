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
    resident = resident_weights(cost, request.memory) + cost.optimizer_cost.resident
    # Gradients of earlier micro-batches stay allocated, and those of this one are added to them.
    gradients = cost.optimizer_cost.adapter if request.training.accumulation > 1 else 0
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
        reloaded = block.output if to_host else 0
        peak = max(peak, inputs[i] + adapter_gradients + block.waits + during + reloaded)
        adapter_gradients += 0 if gradients else block.gradients
    return max(peak, resident + cost.optimizer_cost.step_peak), host


def _backward_peak(block: BlockCost, is_recomputed: bool, to_host: bool) -> int:
    """Return the peak above the bytes before the block. The second forward pass ends before the block's output."""
    if is_recomputed:
        return max(block.forward_grad_peak, block.backward_peak - block.output)
    return block.backward_peak - (block.kept - block.output if to_host else 0)


def resident_weights(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of frozen weights on the device.

    With group offload these are the weights that stay on the device, and the groups that are loaded at one time.
    """
    offloaded = [cost.blocks[i] for i in memory.offloaded_blocks(len(cost.blocks))]
    if not offloaded:
        return cost.weights
    if memory.group_offload == "block":
        sizes = [block.weights for block in offloaded]
        n = memory.blocks_per_group
        groups = sorted((sum(sizes[i : i + n]) for i in range(0, len(sizes), n)), reverse=True)
    else:
        groups = [max(block.largest_leaf for block in offloaded)] * 2
    return cost.weights - away(cost, memory) + sum(groups[: 2 if memory.offload_stream else 1])


def away(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the bytes of offloaded weights. With group_offload leaf, frozen tensors of adapters stay on the device."""
    offloaded = (cost.blocks[i] for i in memory.offloaded_blocks(len(cost.blocks)))
    return sum(block.weights if memory.group_offload == "block" else block.leaves for block in offloaded)


def sampling_peak(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the peak bytes of tensors in a forward pass without gradients, with the resident bytes of the training."""
    inside = max(block.forward_peak for block in cost.blocks) + cost.blocks[0].output
    during = cost.before + max(inside, cost.head_peak)
    return resident_weights(cost, memory) + cost.optimizer_cost.resident + cost.optimizer_cost.aside + during
