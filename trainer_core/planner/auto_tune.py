"""What makes a run fit that does not: the cheapest change, in words; and the memory settings that mode auto takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..memory.activation_checkpointing import INTERVALS
from .estimator import MemoryEstimator
from .memory_plan import MemoryPlan, gb

LEVELS = ("int8-quanto", "int4-quanto")
EDGES = (768, 512)
SHARE = 0.95  # of the free memory that auto fills


def with_memory(request: TrainRequest, **values: Any) -> TrainRequest:
    """The request with other memory settings."""
    return replace(request, memory=replace(request.memory, **values))


def changes(request: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    """Other ways to run it, the least painful first: what costs nothing but a little time, then rounding, then the data."""
    training, memory = request.training, request.memory
    least = request
    if not training.gradient_checkpointing or memory.checkpointing_interval > 1:
        for interval in INTERVALS:
            if not training.gradient_checkpointing or interval < memory.checkpointing_interval:
                least = with_memory(
                    replace(request, training=replace(training, gradient_checkpointing=True)),
                    checkpointing_interval=interval,
                )
                yield f"gradient_checkpointing with interval {interval}", least
    off = "compile off, " if memory.compile else ""  # weights and activations that move exclude it
    if not memory.activation_offload:
        yield f"{off}activation_offload", with_memory(least, activation_offload=True, compile=False)
    if request.model.quantization.products != "exact":
        yield "products exact", with_level(least, request.model.quantization.level, "exact")
    levels = (
        LEVELS[LEVELS.index(request.model.quantization.level) + 1 :]
        if request.model.quantization.level in LEVELS
        else LEVELS
    )
    if request.model.quantization.level in ("none", *LEVELS):
        for level in levels:
            yield f"quantisation {level}", with_level(least, level)
    if memory.group_offload == "none":
        moved = with_memory(least, model_offload=False, activation_offload=True, compile=False, blocks_per_group=1)
        for kind in ("block", "leaf"):
            yield f"{off}group_offload {kind} and activation_offload", with_memory(moved, group_offload=kind)
            for level in levels:
                yield (
                    f"{off}group_offload {kind}, activation_offload and quantisation {level}",
                    with_level(with_memory(moved, group_offload=kind), level),
                )
        least = with_memory(with_level(moved, levels[-1]) if levels else moved, group_offload="leaf")
    if training.batch_size > 1:
        least = replace(
            least,
            training=replace(least.training, batch_size=1, accumulation=training.batch_size * training.accumulation),
        )
        yield "all that and batch_size 1 (with accumulation for the same step)", least
    if request.dataset.parts[0].resolution_type != "area":
        for edge in EDGES:
            if edge < request.dataset.parts[0].resolution:
                parts = tuple(replace(part, resolution=edge) for part in request.dataset.parts)
                least = replace(least, dataset=replace(least.dataset, parts=parts))
                yield f"all that and resolution {edge}", least


def with_level(request: TrainRequest, level: str, products: str = "") -> TrainRequest:
    """Products are those that were asked for, and exact where the new level has them not."""
    asked = request.model.quantization
    changed = replace(asked, level=level, products=products or asked.products)
    if changed.problems():
        changed = replace(changed, products="exact")
    return replace(request, model=replace(request.model, quantization=changed))


def easy_changes(request: TrainRequest, plan: MemoryPlan) -> tuple[list[str], TrainRequest]:
    """For phases beside the training: what makes each smaller, at next to no cost."""
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
    """The cheapest change that fits, in words; None where the plan fits or nothing would."""
    if not plan.unfit():
        return None
    easy, request = easy_changes(request, plan)
    if easy:
        plan = estimator.plan(request)
        if not plan.unfit():
            return " and ".join(easy), request, plan
    if {phase.name for phase in plan.unfit()} == {"validate"} and request.memory.group_offload == "none":
        alone = with_memory(request, model_offload=True)
        if not estimator.plan(alone).unfit():
            return ", ".join([*easy, "model_offload"]), alone, estimator.plan(alone)
    for words, changed in changes(request):
        plan = estimator.plan(changed)
        if not plan.unfit():
            return ", ".join([*easy, words]), changed, plan
    return None


def describe(found: tuple[str, TrainRequest, MemoryPlan] | None) -> str:
    if found is None:
        return "no change of memory, quantisation, batch or resolution makes it fit"
    words, _, plan = found
    room = f"{gb(plan.device_peak)} of tensors" if plan.machine.device_bytes else gb(plan.ram_peak)
    return f"the cheapest change that fits: {words} ({room})"


def choose_memory(estimator: MemoryEstimator, request: TrainRequest) -> MemoryConfig:
    """mode auto: the fastest settings that fit; the smallest where none does. What the VAE does is left as it is, for it shows."""
    manual = with_memory(request, mode="manual")
    tight = replace(
        estimator,
        machine=replace(
            estimator.machine,
            device_bytes=int(estimator.machine.device_bytes * SHARE),
            ram_bytes=int(estimator.machine.ram_bytes * SHARE),
        ),
    )
    stream = bool(estimator.machine.device_bytes) and torch.cuda.is_available()
    ways: list[dict[str, Any]] = [{}]
    if request.training.gradient_checkpointing:
        ways = [{"checkpointing_interval": interval} for interval in INTERVALS]
    # On a CPU there is nowhere to go; and compiled blocks can't do with weights that move in the midst of them.
    if estimator.machine.device_bytes and not request.memory.compile:
        last = ways[-1] | {"activation_offload": True}
        home = last | {"blocks_per_group": 1, "offload_stream": stream, "model_offload": False}
        ways += [last, *(home | {"group_offload": kind} for kind in ("block", "leaf"))]
    found = with_memory(manual, **ways[-1])
    for way in ways:
        plan = tight.plan(with_memory(manual, **way))
        if not {phase.name for phase in plan.unfit()} & {"load", "train"}:
            found = with_memory(manual, **way)
            break
    for name, values in (
        ("text", {"text_encoder": "blocks"}),
        ("validate", {"model_offload": found.memory.group_offload == "none"}),
    ):
        if name in {phase.name for phase in tight.plan(found).unfit()}:
            found = with_memory(found, **values)
    return found.memory
