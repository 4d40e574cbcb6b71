"""What a step takes of a model, block by block, in bytes and operations: the figures that skeleton.py counts and peaks.py adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One batch: pictures of (width, height) pixels, each with so many tokens of text. is_drawn: not trained on, so that no token is routed."""

    width: int
    height: int
    batch: int
    text_tokens: int
    is_drawn: bool = False


@dataclass(frozen=True)
class BlockCost:
    """Bytes above what was alive before the block, its inputs not counted, and operations.

    Args:
        weights: frozen ones, what the adapter keeps beside what learns among them. leaves: of its Linear layers, the bases of
            adapters among them; largest_leaf: of one.
        output: its result, and so the input of the next.
        kept: result and saved tensors after a forward pass with gradients.
        forward_peak: of a forward pass without gradients; forward_grad_peak: with.
        backward_peak: what was kept and the result's gradient included.
        gradients: of the adapter; they stay until the optimiser's step.
        waits: of tokens that skip the block, beside it, while it computes forward or backward.
        again_flops: of the second forward pass, where the block is computed again; it leaves out what no gradient reads.
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


@dataclass(frozen=True)
class OptimizerCost:
    """What learns and what moves it, in bytes, whatever the shape of a batch. upkeep.py counts it.

    Args:
        adapter: of what learns, in the precision it learns in. parameters: how many numbers that are.
        start: what the adapter began with, where that is needed later (pissa, olora, loftq); among the frozen weights.
        states: of the optimiser. average: of the run's own average, 0 without.
        step_peak: gradients, and what the optimiser and the average take for a while, above all of these.
        aside: what is put aside while averaged weights are drawn or saved.
    """

    adapter: int
    parameters: int
    start: int
    states: int
    average: int
    step_peak: int
    aside: int

    @property
    def resident(self) -> int:
        """On the device from the first step on."""
        return self.adapter + self.states + self.average


@dataclass(frozen=True)
class ModelCost:
    """What a shape takes of a model.

    Args:
        weights: bytes of all frozen weights and buffers.
        before: alive when the first block begins: embeddings, modulation, positions, the batch.
        head_peak: above what is alive after the last block: final layers, loss, their backward pass.
        head_flops: operations outside of the blocks, forward and backward; head_forward_flops: forward.
    """

    weights: int
    optimizer_cost: OptimizerCost
    blocks: tuple[BlockCost, ...]
    before: int
    head_peak: int
    head_flops: int
    head_forward_flops: int

    def as_json(self) -> dict[str, Any]:
        """Blocks that are equal are written once."""
        kinds = list(dict.fromkeys(self.blocks))
        numbers = {name: value for name, value in vars(self).items() if name not in ("blocks", "optimizer_cost")}
        return {
            **numbers, "upkeep": asdict(self.optimizer_cost), "kinds": [asdict(kind) for kind in kinds],
            "blocks": [kinds.index(block) for block in self.blocks],
        }  # fmt: skip

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelCost:
        """Raises TypeError, KeyError or IndexError where another version wrote it."""
        kinds = [BlockCost(**kind) for kind in value["kinds"]]
        numbers = {name: number for name, number in value.items() if name not in ("kinds", "blocks", "upkeep")}
        return ModelCost(
            optimizer_cost=OptimizerCost(**value["upkeep"]), blocks=tuple(kinds[i] for i in value["blocks"]), **numbers
        )


def step_flops(cost: ModelCost, again: Sequence[int]) -> int:
    """Operations of one micro-batch, with those blocks computed twice."""
    blocks = sum(block.forward_flops + block.backward_flops for block in cost.blocks)
    return cost.head_flops + blocks + sum(cost.blocks[i].again_flops for i in again)


def forward_flops(cost: ModelCost) -> int:
    """Operations of a pass without gradients."""
    return cost.head_forward_flops + sum(block.forward_flops for block in cost.blocks)
