"""The cost of a training step, block by block, in bytes and operations.

meta_model.py counts these figures, and step_peak.py adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Shape:
    """Shape of one batch."""

    KEY: ClassVar[tuple[str, ...]] = ("Shape", "width", "height", "batch", "text_tokens", "is_drawn")

    width: int  # in pixels
    height: int
    batch: int
    text_tokens: int  # per image
    is_drawn: bool = False  # a validation image: no token skips a block


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block: bytes above those allocated before the block, without its inputs, and operations.

    Args:
        weights: frozen weights, with the adapter's tensors that are not trained.
        leaves: weights of its Linear layers, with the base layers of adapters.
        largest_leaf: weights of the largest Linear layer.
        output: its output, which is the input of the next block.
        kept: output and saved tensors after a forward pass with gradients.
        forward_peak: peak of a forward pass without gradients.
        forward_grad_peak: peak of a forward pass with gradients.
        backward_peak: peak of the backward pass, with the saved tensors and the gradient of the output.
        gradients: gradients of the adapter, which stay until the optimizer step.
        forward_flops: operations of a forward pass.
        again_flops: operations of the second forward pass, where the block is recomputed. It skips what no gradient
            needs.
        backward_flops: operations of the backward pass.
        waits: tokens that skip the block and stay in memory during its forward or backward pass.
        trained: trained weights of its Linear layers (kind full).
    """

    weights: int
    leaves: int
    largest_leaf: int
    output: int
    kept: int
    forward_peak: int
    forward_grad_peak: int
    backward_peak: int
    gradients: int
    forward_flops: int
    again_flops: int
    backward_flops: int
    waits: int = 0
    trained: int = 0


@dataclass(frozen=True)
class OptimizerCost:
    """Cost of the trainable parameters and the optimizer, in bytes; independent of the batch. See optimizer_cost.py.

    Args:
        adapter: trainable parameters, in the precision of training.
        parameters: number of elements of the trainable parameters.
        start: initial values of the adapter, where they are needed later (pissa, olora, loftq). They belong to the
            frozen weights.
        states: optimizer state.
        average: exponential moving average of the weights, 0 without it.
        step_peak: gradients and temporary tensors of the optimizer step and of the average, above all of these.
        aside: copy of the trained weights while averaged weights are sampled with or saved.
        copies: trainable parameters in the precision of the products, see train/step/working_copies.py.
        large_states: states as large as their parameter, which group offload moves with it (kind full).
    """

    adapter: int
    parameters: int
    start: int
    states: int
    average: int
    step_peak: int
    aside: int
    copies: int = 0
    large_states: int = 0

    @property
    def saved(self) -> int:
        """Bytes in a checkpoint."""
        return self.adapter + self.states + self.average

    @property
    def lora(self) -> int:
        """Bytes of the LoRA file, in fp32. Stored initial values double its rank."""
        return self.parameters * 4 + self.start

    @property
    def resident(self) -> int:
        """Bytes on the device from the first step on."""
        return self.saved + self.copies


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model for one shape of a batch.

    Args:
        weights: bytes of all frozen weights and buffers.
        optimizer_cost: cost of the trainable parameters and the optimizer.
        blocks: cost of each block.
        before: bytes allocated when the first block starts: embeddings, modulation, positions, the batch.
        head_peak: peak of final layers, loss and their backward pass, above the bytes allocated after the last block.
        head_flops: operations outside of the blocks, forward and backward.
        head_forward_flops: operations outside of the blocks, forward only.
        positions: cosines and sines of this image size, which stay on the device (models.flux_lineage.rope). They are
            part of `before`.
    """

    weights: int
    optimizer_cost: OptimizerCost
    blocks: tuple[BlockCost, ...]
    before: int
    head_peak: int
    head_flops: int
    head_forward_flops: int
    positions: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the cost as JSON values. Equal blocks are written once."""
        kinds = list(dict.fromkeys(self.blocks))
        numbers = {name: value for name, value in vars(self).items() if name not in ("blocks", "optimizer_cost")}
        return {
            **numbers, "upkeep": asdict(self.optimizer_cost), "kinds": [asdict(kind) for kind in kinds],
            "blocks": [kinds.index(block) for block in self.blocks],
        }  # fmt: skip

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelCost:
        """Read what `as_json` has made.

        Raises:
            TypeError, KeyError, IndexError: another version has written it.
        """
        kinds = [BlockCost(**kind) for kind in value["kinds"]]
        numbers = {name: number for name, number in value.items() if name not in ("kinds", "blocks", "upkeep")}
        return ModelCost(
            optimizer_cost=OptimizerCost(**value["upkeep"]), blocks=tuple(kinds[i] for i in value["blocks"]), **numbers
        )


def step_flops(cost: ModelCost, again: Sequence[int]) -> int:
    """Return the operations of one micro-batch.

    Args:
        again: indices of the blocks that are recomputed in the backward pass.
    """
    blocks = sum(block.forward_flops + block.backward_flops for block in cost.blocks)
    return cost.head_flops + blocks + sum(cost.blocks[i].again_flops for i in again)


def forward_flops(cost: ModelCost) -> int:
    """Return the operations of a forward pass without gradients."""
    return cost.head_forward_flops + sum(block.forward_flops for block in cost.blocks)
