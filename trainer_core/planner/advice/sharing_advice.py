"""Whether a whole model that fits no device fits several that share out its weights (setting `shard`), in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...config.memory import MemoryConfig
from ...config.optimizer import ELEMENTWISE
from ...config.request import TrainRequest
from ...config.training import IN_BF16, IN_FP32
from ..estimator import MemoryEstimator
from ..memory_plan import gb

SIZES = (2, 4, 8)  # numbers of devices that are tried for a request of one device
STAYS = ("mode", "attention", "compile", "text_encoder", "vae_tiling", "vae_slicing")  # memory settings beside shard
OTHERS = ("adamw", "optimi-lion")  # in place of an optimizer that reads whole weights


def sharing_advice(estimator: MemoryEstimator, request: TrainRequest, easy: Sequence[str] = ()) -> str:
    """Return the settings with which a whole model fits where its weights are shared out, with the memory of a device.

    Args:
        estimator: Of the machine and the devices of the request.
        request: It does not fit.
        easy: Changes that it has already, in words.
    Returns:
        '' where the request can't be shared out, or does not fit then either.
    """
    training = request.training
    if not request.adapter.is_full or training.is_sharded or training.rollout_probability:
        return ""
    for size in _sizes(estimator):
        room = estimator.machine if estimator.num_devices > 1 else estimator.machine.shared_by(size)
        own = replace(estimator, machine=room, num_devices=size)
        for words, changed in shared_out(request, size):
            plan = own.plan(changed)
            if not plan.unfit():
                each = f"{gb(plan.device_peak)} of tensors" if room.device_bytes else f"{gb(plan.ram_peak)} of RAM"
                needs = "" if estimator.num_devices > 1 else f"devices {size}, accumulation {size}, "
                return f"sharing out the weights over {size} devices fits: {needs}{', '.join([words, *easy])} ({each} on each)"
    return ""


def _sizes(estimator: MemoryEstimator) -> tuple[int, ...]:
    """Return the numbers of devices to try. Processes on one CPU share its RAM, so more of them save nothing."""
    if estimator.num_devices > 1:
        return (estimator.num_devices,)
    return SIZES if estimator.machine.device_bytes else ()


def shared_out(request: TrainRequest, size: int) -> Iterator[tuple[str, TrainRequest]]:
    """Yield the request with its weights shared out over `size` devices, the cheapest first, and what is changed."""
    training, memory = request.training, request.memory
    kind = IN_BF16 if request.model.dtype == IN_BF16 else IN_FP32
    beside = MemoryConfig(**{name: getattr(memory, name) for name in STAYS})
    moves = [name for name in ("group_offload", "activation_offload", "model_offload") if _is_set(memory, name)]
    words = [f"shard {kind}", *(f"without {name}" for name in moves if memory.mode == "manual")]
    interval = memory.checkpointing_interval
    ways = [([], training.gradient_checkpointing, interval), (["gradient_checkpointing with interval 1"], True, 1)]
    for optimizer in _optimizers(request, kind):
        other = [f"optimizer {optimizer}"] if optimizer != request.optimizer.optimizer else []
        config = replace(request.optimizer, optimizer=optimizer, beta1=0.0) if other else request.optimizer
        for recomputed, is_on, every in ways:
            own = replace(training, shard=kind, accumulation=size, gradient_checkpointing=is_on)
            changed = replace(
                request, training=own, optimizer=config, memory=replace(beside, checkpointing_interval=every)
            )
            yield ", ".join([*words, *other, *recomputed]), changed


def _is_set(memory: MemoryConfig, name: str) -> bool:
    return getattr(memory, name) not in (False, "none")


def _optimizers(request: TrainRequest, kind: str) -> list[str]:
    """Return the optimizers to try: the request's own, if it reads one element at a time, and smaller ones."""
    own = request.optimizer.optimizer
    fitting = [own] if own in ELEMENTWISE and not (own == "adamw_bf16" and kind == IN_FP32) else []
    return list(dict.fromkeys([*fitting, *OTHERS]))
