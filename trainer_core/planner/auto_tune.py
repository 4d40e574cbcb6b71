"""Suggest the cheapest change that makes a run fit, and choose the memory settings of mode auto."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..config.training import IN_BF16
from ..distributed.device_list import accelerators
from ..memory.activation_checkpointing import INTERVALS
from .advice.sharing_advice import sharing_advice
from .estimator import MemoryEstimator
from .memory_plan import MemoryPlan, bytes_to_reserve, gb

LEVELS = ("int8-quanto", "int4-quanto")
EDGES = (768, 512)
SHARE = 0.95  # share of the memory that auto uses
SMALLEST_OPTIMIZER = "adafactor"  # its states take almost no memory
SMALLEST_ELEMENTWISE = "optimi-lion"
OFFLOAD_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the blocks: what is suggested


def with_memory(request: TrainRequest, **values: Any) -> TrainRequest:
    """Return the request with other memory settings."""
    return replace(request, memory=replace(request.memory, **values))


def changes(request: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    """Yield changes that save memory, with a description each, the cheapest first.

    The first ones cost a little time, then follow coarser quantization and changes of the batches.
    """
    training, memory = request.training, request.memory
    least = request
    if training.is_sharded:
        yield from _changes_of_sharded(request)
        return
    if not training.gradient_checkpointing or memory.checkpointing_interval > 1:
        for interval in INTERVALS:
            if not training.gradient_checkpointing or interval < memory.checkpointing_interval:
                least = with_memory(
                    replace(request, training=replace(training, gradient_checkpointing=True)),
                    checkpointing_interval=interval,
                )
                yield f"gradient_checkpointing with interval {interval}", least
    off = "compile off, " if memory.compile else ""  # compiled blocks exclude offloading
    if not memory.activation_offload:
        yield f"{off}activation_offload", with_memory(least, activation_offload=True, compile=False)
    if request.model.quantization.products != "exact":
        yield "products exact", with_level(least, request.model.quantization.level, "exact")
    if request.adapter.is_full:
        yield from _changes_of_full(with_memory(least, activation_offload=True, compile=False))
        return
    levels = (
        LEVELS[LEVELS.index(request.model.quantization.level) + 1 :]
        if request.model.quantization.level in LEVELS
        else LEVELS
    )
    if request.model.quantization.level in ("none", *LEVELS):
        for level in levels:
            yield f"quantization {level}", with_level(least, level)
    if memory.group_offload == "none":
        moved = with_memory(least, model_offload=False, activation_offload=True, compile=False, blocks_per_group=1)
        for kind, share in (*(("block", share) for share in OFFLOAD_SHARES), ("leaf", 1.0)):
            offloaded = with_memory(moved, group_offload=kind, offload_share=share)
            words = f"{off}group_offload {kind}{f' with offload_share {share:g}' if share < 1 else ''}"
            yield f"{words} and activation_offload", offloaded
            for level in levels if share == 1 else ():
                yield f"{words}, activation_offload and quantization {level}", with_level(offloaded, level)
        least = with_memory(with_level(moved, levels[-1]) if levels else moved, group_offload="leaf")
    if training.batch_size > 1:
        least = replace(
            least,
            training=replace(least.training, batch_size=1, accumulation=training.batch_size * training.accumulation),
        )
        yield "all that and batch_size 1 (with accumulation for the same step)", least
    yield from _smaller_images(least)


def _changes_of_full(least: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    """Yield changes of a full-rank run. Its weights are not quantized."""
    if least.optimizer.optimizer != SMALLEST_OPTIMIZER:
        least = replace(least, optimizer=replace(least.optimizer, optimizer=SMALLEST_OPTIMIZER, beta1=0.0))
        yield f"activation_offload and optimizer {SMALLEST_OPTIMIZER}", least
    if least.memory.group_offload == "none":
        least = with_memory(least, model_offload=False, blocks_per_group=1)
        for kind, share in (*(("block", share) for share in OFFLOAD_SHARES), ("leaf", 1.0)):
            words = f"group_offload {kind}{f' with offload_share {share:g}' if share < 1 else ''}"
            changed = with_memory(least, group_offload=kind, offload_share=share)
            yield f"{words}, activation_offload and optimizer {SMALLEST_OPTIMIZER}", changed
        least = with_memory(least, group_offload="leaf")
    if least.training.batch_size > 1:
        least = replace(least, training=replace(least.training, batch_size=1))
        yield "all that and batch_size 1", least
    yield from _smaller_images(least)


def _changes_of_sharded(request: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    """Yield changes where weights are shared out: with more devices each has less of them."""
    least = with_memory(
        replace(request, training=replace(request.training, gradient_checkpointing=True)), checkpointing_interval=1
    )
    yield "gradient_checkpointing with interval 1", least
    least = replace(least, optimizer=replace(least.optimizer, optimizer=SMALLEST_ELEMENTWISE))
    yield f"all that and optimizer {SMALLEST_ELEMENTWISE}", least
    if least.model.dtype == IN_BF16 != least.training.shard:
        least = replace(least, training=replace(least.training, shard=IN_BF16))
        yield f"all that and shard {IN_BF16}", least
    if least.training.batch_size > 1:
        least = replace(least, training=replace(least.training, batch_size=1))
        yield "all that and batch_size 1", least
    least = with_memory(least, group_offload="block")
    yield "all that and group_offload block, which is slow; or more devices", least
    yield from _smaller_images(least)


def _smaller_images(least: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    if least.dataset.parts[0].resolution_type != "area":
        for edge in EDGES:
            if edge < least.dataset.parts[0].resolution:
                parts = tuple(replace(part, resolution=edge) for part in least.dataset.parts)
                least = replace(least, dataset=replace(least.dataset, parts=parts))
                yield f"all that and resolution {edge}", least


def with_level(request: TrainRequest, level: str, products: str = "") -> TrainRequest:
    """Return the request with another quantization level.

    Args:
        products: "" for those of the request. Where the level does not support them, they become exact.
    """
    current = request.model.quantization
    changed = replace(current, level=level, products=products or current.products)
    if changed.problems():
        changed = replace(changed, products="exact")
    return replace(request, model=replace(request.model, quantization=changed))


def easy_changes(request: TrainRequest, plan: MemoryPlan) -> tuple[list[str], TrainRequest]:
    """Return changes that make phases other than training smaller, at almost no cost.

    Returns:
        Descriptions of the changes, and the changed request.
    """
    words = []
    unfit = {phase.name for phase in plan.unfit()}
    if "text" in unfit and request.memory.text_encoder == "device":
        words.append("text_encoder blocks")
        request = with_memory(request, text_encoder="blocks")
    if ("latents" in unfit or "validate" in unfit) and not request.memory.vae_tiling:
        words.append("vae_tiling")
        request = with_memory(request, vae_tiling=True)
    return words, request


def suggestion(
    estimator: MemoryEstimator, request: TrainRequest, plan: MemoryPlan
) -> tuple[str, TrainRequest, MemoryPlan] | None:
    """Find the cheapest change that makes a request fit.

    Returns:
        Its description, the changed request and its plan; None where the plan fits already or no change makes it fit.
    """
    if not plan.unfit():
        return None
    easy, request = easy_changes(request, plan)
    if easy:
        plan = estimator.plan(request)
        if not plan.unfit():
            return " and ".join(easy), request, plan
    can_move = request.memory.group_offload == "none" and not request.training.is_sharded
    if {phase.name for phase in plan.unfit()} == {"validate"} and can_move:
        alone = with_memory(request, model_offload=True)
        if not estimator.plan(alone).unfit():
            return ", ".join([*easy, "model_offload"]), alone, estimator.plan(alone)
    for words, changed in changes(request):
        plan = estimator.plan(changed)
        if not plan.unfit():
            return ", ".join([*easy, words]), changed, plan
    return None


def describe(change: tuple[str, TrainRequest, MemoryPlan] | None) -> str:
    """Return what `suggestion` found, in words."""
    if change is None:
        return "no change of memory settings, quantization, batch size or resolution makes it fit"
    words, _, plan = change
    room = f"{gb(plan.device_peak)} of tensors" if plan.machine.device_bytes else gb(plan.ram_peak)
    return f"the cheapest change that fits: {words} ({room})"


def advice(estimator: MemoryEstimator, request: TrainRequest, plan: MemoryPlan, asked: TrainRequest) -> str:
    """Return what makes a request fit, in words: the cheapest change, and for a whole model sharing out its weights.

    Args:
        request: With the memory settings of the run.
        plan: Of the request; it does not fit.
        asked: The request before mode auto has chosen its memory settings.
    """
    change = suggestion(estimator, request, plan)
    easy, asked = easy_changes(asked, plan)
    # The machine of the plan, which may be smaller than the estimator's.
    shares = sharing_advice(replace(estimator, machine=plan.machine), asked, easy)
    if not shares or (change and not (estimator.num_devices > 1 or len(accelerators()) > 1)):
        return describe(change)
    return f"{describe(change)}; {shares}"


def choose_memory(estimator: MemoryEstimator, request: TrainRequest) -> MemoryConfig:
    """Choose the memory settings of mode auto: the fastest ones that fit, or the smallest where none fits.

    Settings of the VAE stay as they are, because they change the images.
    """
    manual, tight = with_memory(request, mode="manual"), _with_reserve(estimator)
    ways = _ways(request, on_device=bool(estimator.machine.device_bytes))
    index = next((i for i, way in enumerate(ways) if _trains(tight, with_memory(manual, **way))), len(ways) - 1)
    chosen = with_memory(manual, **ways[index])
    if chosen.memory.group_offload == "block" and not request.training.is_sharded:
        chosen = with_memory(chosen, offload_share=_least_share(tight, chosen))
    for name, values in (
        ("text", {"text_encoder": "blocks"}),
        ("validate", {"model_offload": chosen.memory.group_offload == "none"}),
    ):
        if request.training.is_sharded and name == "validate":
            continue
        if name in {phase.name for phase in tight.plan(chosen).unfit()}:
            chosen = with_memory(chosen, **values)
    return chosen.memory


def explain_choice(estimator: MemoryEstimator, request: TrainRequest, chosen: MemoryConfig) -> str:
    """Return in one line why mode auto did not choose the next faster settings; '' where it chose the fastest.

    Args:
        request: in mode auto.
        chosen: what choose_memory has returned for it.
    """
    manual, tight = with_memory(request, mode="manual"), _with_reserve(estimator)
    ways = _ways(request, on_device=bool(estimator.machine.device_bytes))
    names = ways[-1].keys() - {"model_offload"}  # which validation images may have set afterwards

    def values_of(memory: MemoryConfig) -> dict[str, Any]:
        return {name: getattr(memory, name) for name in names}

    index = [values_of(with_memory(manual, **way).memory) for way in ways].index(values_of(chosen))
    if index == 0:
        return ""
    faster, room = with_memory(manual, **ways[index - 1]), tight.machine
    phases = [phase for phase in tight.plan(faster).phases if phase.name in ("load", "train")]
    needs = (
        ("VRAM", max(bytes_to_reserve(phase.device) for phase in phases), room.device_bytes),
        ("RAM", max(phase.ram for phase in phases), room.ram_bytes),
    )
    where, needed, available = next((need for need in needs if 0 < need[2] < need[1]), needs[-1])
    return f"memory auto: {_words(faster.memory)} needs {gb(needed)} of {where}, and {gb(available)} may be used"


def _words(memory: MemoryConfig) -> str:
    """Return the way in words."""
    if memory.group_offload != "none":
        return f"group_offload {memory.group_offload}"
    interval = memory.checkpointing_interval
    recomputed = "recomputing all blocks" if interval == 1 else f"recomputing one block in {interval}"
    return recomputed + (" with activation_offload" if memory.activation_offload else "")


def _with_reserve(estimator: MemoryEstimator) -> MemoryEstimator:
    """Return the estimator for the share of the memory that auto uses."""
    room = estimator.machine
    return replace(
        estimator,
        machine=replace(room, device_bytes=int(room.device_bytes * SHARE), ram_bytes=int(room.ram_bytes * SHARE)),
    )


def _ways(request: TrainRequest, on_device: bool) -> Sequence[dict[str, Any]]:
    """Return the memory settings that auto chooses from, the fastest first."""
    ways: list[dict[str, Any]] = [{}]
    if request.training.gradient_checkpointing:
        ways = [{"checkpointing_interval": interval} for interval in INTERVALS]
    # On a CPU there is nothing to offload to, and compiled blocks do not support offloading inside them.
    if on_device and request.training.is_sharded:
        ways += [ways[-1] | {"group_offload": "block"}]
    elif on_device and not request.memory.compile:
        stream = torch.cuda.is_available()
        last = ways[-1] | {"activation_offload": True}
        home = last | {"blocks_per_group": 1, "offload_stream": stream, "model_offload": False}
        ways += [last, *(home | {"group_offload": kind} for kind in ("block", "leaf"))]
    return ways


def _trains(estimator: MemoryEstimator, request: TrainRequest) -> bool:
    """Return whether loading and training fit."""
    return not {phase.name for phase in estimator.plan(request).unfit()} & {"load", "train"}


def _least_share(estimator: MemoryEstimator, request: TrainRequest) -> float:
    """Return the smallest share of the blocks, in hundredths, whose offload fits. All blocks fit."""
    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        if _trains(estimator, with_memory(request, offload_share=middle / 100)):
            high = middle
        else:
            low = middle
    return high / 100
