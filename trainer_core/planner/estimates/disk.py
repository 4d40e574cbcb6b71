"""Estimate the disk space of a run's files and of what it adds to the caches."""

from __future__ import annotations

from ...config.model import ModelConfig
from ...config.request import TrainRequest
from ...devices import DTYPES
from ..cost_model import ModelCost
from ..step_peak import away
from ..workload import RunFacts


def disk_of(request: TrainRequest, facts: RunFacts, cost: ModelCost, other: ModelCost | None = None) -> dict[str, int]:
    """Return bytes by kind of file, as if the caches were empty.

    Args:
        other: cost of another model that samples the validation images.
    """
    optimizer_cost = cost.optimizer_cost
    lora, checkpoint = optimizer_cost.lora, optimizer_cost.saved + optimizer_cost.start + optimizer_cost.lora
    share = DTYPES[request.adapter.precision].itemsize / 4
    if request.adapter.is_full:
        average = 4 * optimizer_cost.parameters if request.adapter.ema_decay else 0
        lora, share, checkpoint = model_file_bytes(request, cost), 1.0, optimizer_cost.saved + average
    return {
        "text": facts.prompts * facts.largest.text_tokens * facts.encoder.width * facts.element_bytes,
        "latents": facts.latent_bytes,
        "quantized base": _cached_bytes(request.model, cost)
        + (_cached_bytes(request.drawn_model, other) if other else 0),
        "checkpoints": num_checkpoints(request, facts.num_steps) * checkpoint,
        "model" if request.adapter.is_full else "lora": int(lora * share) * (2 if request.training.holdout else 1),
        "offload": sum(away(each, request.memory) for each in (cost, other) if each and request.memory.offload_to_disk),
    }


def _cached_bytes(model: ModelConfig, cost: ModelCost) -> int:
    quantization = model.quantization
    return cost.weights if quantization.level != "none" and quantization.cached_bases else 0


def model_file_bytes(request: TrainRequest, cost: ModelCost) -> int:
    """Return the bytes of a trained model's file, which is in bf16."""
    return (cost.weights + cost.optimizer_cost.adapter) * 2 // DTYPES[request.model.dtype].itemsize


def num_checkpoints(request: TrainRequest, num_steps: int) -> int:
    """Return how many checkpoints stay: the last ones, those of `keep_every`, and the best of held-out images."""
    training = request.training
    every = training.checkpoint_every or num_steps
    steps = sorted({*range(every, num_steps, every), num_steps})
    last = steps[-training.keep_checkpoints :]
    others = steps[: -training.keep_checkpoints]
    forever = sum(step % training.keep_every == 0 for step in others) if training.keep_every else 0
    return len(last) + forever + (1 if training.holdout and len(others) > forever else 0)
