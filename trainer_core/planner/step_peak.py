"""Peaks of a training step and of a sampling pass: what was counted for each block, added up in the order in which it is computed."""

from __future__ import annotations

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..memory.activation_checkpointing import places_to_recompute
from .cost_model import BlockCost, ModelCost


def blocks_to_recompute(request: TrainRequest, num_blocks: int) -> range:
    """Places of the blocks that are computed again in the backward pass."""
    if not request.training.gradient_checkpointing:
        return range(0)
    return places_to_recompute(num_blocks, request.memory.checkpointing_interval, not request.memory.moves)


def training_peak(cost: ModelCost, request: TrainRequest) -> tuple[int, int]:
    """Peak bytes of tensors on the device in a step, and bytes of activations in RAM."""
    again, to_host = set(blocks_to_recompute(request, len(cost.blocks))), request.memory.activation_offload
    resident = resident_weights(cost, request.memory) + cost.optimizer_cost.resident
    # Gradients of the micro-batches before wait; those of this one are added to them.
    gradients = cost.optimizer_cost.adapter if request.training.accumulation > 1 else 0
    level = resident + gradients + cost.before
    peak, host, inputs = level, 0, []
    carried = 0  # the last block's result, which is on the device whatever happens to it later
    for i, block in enumerate(cost.blocks):
        inputs.append(level)
        during = block.forward_peak if i in again else block.forward_grad_peak
        peak = max(peak, level + carried + block.waits + during)
        kept = block.output if i in again else block.kept
        if to_host:
            host += kept
            carried = block.output
        else:
            level += kept
    peak = max(peak, level + carried + cost.head_peak)
    made = 0
    for i in range(len(cost.blocks) - 1, -1, -1):
        block = cost.blocks[i]
        during = _backward(block, i in again, to_host)
        peak = max(peak, inputs[i] + made + block.waits + during + (block.output if to_host else 0))
        made += 0 if gradients else block.gradients
    return max(peak, resident + cost.optimizer_cost.step_peak), host


def _backward(block: BlockCost, is_again: bool, to_host: bool) -> int:
    """Above what was alive before the block. The second forward pass ends before it makes the result anew."""
    if is_again:
        return max(block.forward_grad_peak, block.backward_peak - block.output)
    return block.backward_peak - (block.kept - block.output if to_host else 0)


def resident_weights(cost: ModelCost, memory: MemoryConfig) -> int:
    """Frozen weights on the device: all, or those that stay there and the groups that come and go."""
    groups = 2 if memory.offload_stream else 1
    if memory.group_offload == "block":
        sizes = [block.weights for block in cost.blocks]
        n = memory.blocks_per_group
        return cost.weights - away(cost, memory) + groups * max(sum(sizes[i : i + n]) for i in range(0, len(sizes), n))
    if memory.group_offload == "leaf":
        return cost.weights - away(cost, memory) + groups * max(block.largest_leaf for block in cost.blocks)
    return cost.weights


def away(cost: ModelCost, memory: MemoryConfig) -> int:
    """Bytes of weights whose home is not the device. By leaf, what adapters keep beside what learns stays there."""
    if memory.group_offload == "none":
        return 0
    return sum(block.weights if memory.group_offload == "block" else block.leaves for block in cost.blocks)


def sampling_peak(cost: ModelCost, memory: MemoryConfig) -> int:
    """Peak bytes of tensors in a forward pass without gradients, with what the training keeps."""
    inside = max(block.forward_peak for block in cost.blocks) + cost.blocks[0].output
    during = cost.before + max(inside, cost.head_peak)
    return resident_weights(cost, memory) + cost.optimizer_cost.resident + cost.optimizer_cost.aside + during
