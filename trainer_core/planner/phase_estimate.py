"""Estimate the phases of a run: device memory and RAM of each phase, and the disk space of the run's files."""

from __future__ import annotations

from dataclasses import replace

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..data.cache.latents import images_per_batch
from ..memory.pinned_memory import CHUNK_BYTES
from ..models.flux_lineage import MAX_ROPE_GRIDS
from ..quant.weight_cache import SHARD_BYTES
from .cost_model import ModelCost
from .estimates.disk import disk_of
from .estimates.operations import phase_flops
from .estimates.sharded_cost import cost_of_one, stored
from .memory_plan import Machine, MemoryPlan, PhasePlan, bytes_to_reserve
from .step_peak import (
    away,
    resident_bytes,
    resident_weights,
    sampling_peak,
    sampling_work,
    states_away,
    training_peak,
)
from .workload import RunFacts

# Resident memory of the interpreter with torch, this package, transformers and diffusers: 470 to 515 MB measured on
# Linux, without CUDA; 300 if everything is cached and no images are sampled.
PROCESS_BYTES = 500_000_000
# Bytes per pixel of the released VAE (128 channels at full size): counted on the meta device at 256, 512 and 1024 px,
# in fp32.
VAE_ENCODE_PIXEL, VAE_DECODE_PIXEL = 2572, 3073
VAE_TILE_PIXELS = 512 * 512
PINNED_SHARE = (
    1.03  # of the weights: the unused ends of the chunks of memory/pinned_memory.py; 2.8 % for Chroma in int8
)
SPARE_RAM = 2 << 30  # that a copy for a checkpoint leaves free, see train/hooks/background_save.py
BEFORE_THE_MODEL = ("score", "text", "latents")  # phases that end before the model is loaded
SAVE_COPIES = 3  # of the weights in RAM: the export's products, the file's bytes, and the file that is read back


def estimate_run(
    request: TrainRequest,
    facts: RunFacts,
    cost: ModelCost,
    sampled: ModelCost | None,
    machine: Machine,
    whole: ModelCost | None = None,
    other: ModelCost | None = None,
    num_devices: int = 1,
) -> MemoryPlan:
    """Add up the counted costs to the estimate of a run.

    Args:
        cost: cost of the largest batch.
        sampled: cost of the largest validation image; None where none is sampled.
        whole: cost of the largest batch without token routing; None where no token is routed.
        other: cost of the largest validation image where another model samples it; else None.
        num_devices: that share out the weights, where the request asks for it. The estimate is that of one of them.
    """
    on_cpu = not machine.device_bytes
    flops = phase_flops(request, facts, cost, sampled, whole)
    words = settings_of(request)
    in_ram = 0
    disk = disk_of(request, facts, stored(cost, request) if request.training.is_sharded else cost, other)
    if request.training.is_sharded:
        sampled = sampled and cost_of_one(sampled, request, num_devices)[0]
        cost, in_ram = cost_of_one(cost, request, num_devices)
        request = replace(request, memory=replace(request.memory, group_offload="none", offload_share=1.0))
    score = {"score": _score(facts, on_cpu)} if facts.score.weights else {}
    phases = score | {
        "text": _text(request.memory, facts, on_cpu),
        "latents": (_encoding(request.memory, facts, on_cpu), 0),
        "load": _load(request, cost, on_cpu),
        "train": _train(request, facts, cost, sampled is not None),
        "save": _save(request, facts, cost, sampled is not None),
    }
    if facts.eval_images:
        phases["eval"] = _evaluate(request, facts, cost, sampled is not None)
    is_alone = False
    if sampled is not None:
        if other is None:
            sampling = _validate(request.memory, facts, sampled)
        else:
            sampling, is_alone = _validate_with_other(request, facts, cost, other, machine)
        scoring = _score_images(request.memory, facts, sampled, on_cpu)  # the other model is gone by then
        phases["validate"] = max(sampling[0], scoring[0]), max(sampling[1], scoring[1])
    device, ram = phases["train"]
    phases["train"] = device, ram + _copy_in_ram(request, cost, machine, ram + (device if on_cpu else 0))
    planned = tuple(
        PhasePlan(
            name, device, PROCESS_BYTES + ram + (in_ram if name not in BEFORE_THE_MODEL else 0) + (device if on_cpu else 0),
            flops[name] / machine.flops if machine.flops and flops.get(name) else None,
        )
        for name, (device, ram) in phases.items()
    )  # fmt: skip
    a_step = flops["train"] // max(1, facts.num_steps)
    seconds = a_step / machine.flops if machine.flops else None
    return MemoryPlan(planned, disk, machine, words, a_step, seconds, is_sampled_alone=is_alone)


def _score(facts: RunFacts, on_cpu: bool) -> tuple[int, int]:
    """Prompts and held-out images are embedded before anything else is loaded. Weights are read and then moved."""
    return facts.score.weights + facts.score.work, 0 if on_cpu else facts.score.weights


def _text(memory: MemoryConfig, facts: RunFacts, on_cpu: bool) -> tuple[int, int]:
    encoder = facts.encoder
    if memory.text_encoder == "cpu":
        return 0, encoder.weights + encoder.work
    if memory.text_encoder == "blocks":
        # Next to its blocks the largest layer is the embedding table. Each is alone on the device.
        return max(encoder.weights - encoder.blocks, encoder.largest_block) + encoder.work, encoder.weights
    # Each layer is read, converted and moved alone; the tables outside of the blocks are moved at the end.
    return encoder.weights + encoder.work, 0 if on_cpu else 2 * (encoder.weights - encoder.blocks)


def _encoding(memory: MemoryConfig, facts: RunFacts, on_cpu: bool) -> int:
    """Encode images as data/cache/latents.py does: one of 1024 px at a time, or several small ones; on a CPU one."""
    width, height = facts.largest.width, facts.largest.height
    size, count = width * height, 1 if memory.vae_slicing or on_cpu else images_per_batch((width, height))
    return facts.codec.weights + int(min(size * count, _max_tile_pixels(memory)) * VAE_ENCODE_PIXEL * facts.codec.width)


def _load(request: TrainRequest, cost: ModelCost, on_cpu: bool) -> tuple[int, int]:
    adapter = cost.optimizer_cost.adapter + cost.optimizer_cost.average
    if on_cpu:
        return cost.weights + adapter, 0
    device = resident_weights(cost, request.memory) + adapter
    if request.memory.group_offload == "none":  # each layer is read, converted and moved alone
        cached = SHARD_BYTES if request.model.quantization.level != "none" else 0  # waits to be written to the cache
        return device, 2 * max(block.largest_leaf for block in cost.blocks) + cached
    trained = cost.optimizer_cost.adapter if request.adapter.is_full else 0
    return device, cost.weights + trained + (CHUNK_BYTES if request.memory.offload_stream else 0)


def _train(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_sampled: bool) -> tuple[int, int]:
    """The VAE of the validation stays loaded, on the device or, with model_offload, in RAM."""
    peak, activations = training_peak(cost, request)
    beside, in_ram = _beside(request, facts, cost, is_sampled)
    return peak + beside, in_ram + activations


def _beside(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_sampled: bool) -> tuple[int, int]:
    """Return the bytes on the device beside the model, and those of RAM: VAE, positions, offloaded weights."""
    codec = facts.codec.weights if is_sampled else 0
    is_aside = request.memory.model_offload
    positions = cost.positions * (min(MAX_ROPE_GRIDS, facts.image_sizes) - 1)  # of the other sizes
    in_ram = _offloaded_ram(cost, request.memory) + sum(average_in_ram(request, cost)) + (codec if is_aside else 0)
    return positions + (0 if is_aside else codec), in_ram


def average_in_ram(request: TrainRequest, cost: ModelCost) -> tuple[int, int]:
    """Return the bytes of the average of a whole model, and of the trained weights whose place it takes in between."""
    if not (request.adapter.is_full and request.adapter.ema_decay):
        return 0, 0
    return 4 * cost.optimizer_cost.parameters, cost.optimizer_cost.adapter


def _copy_in_ram(request: TrainRequest, cost: ModelCost, machine: Machine, ram: int) -> int:
    """Return the bytes of the copy of which a checkpoint is written while the training continues (kind full).

    Without RAM for it the training waits for the disk, see train/hooks/background_save.py.
    """
    copy = cost.optimizer_cost.saved + average_in_ram(request, cost)[0]
    is_made = request.adapter.is_full and request.training.checkpoint_every
    return copy if is_made and PROCESS_BYTES + ram + copy + SPARE_RAM <= machine.ram_bytes else 0


def _save(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_sampled: bool) -> tuple[int, int]:
    """A checkpoint is copied to RAM, then its LoRA is written. With kind full both are written without copies."""
    optimizer_cost, (beside, in_ram) = cost.optimizer_cost, _beside(request, facts, cost, is_sampled)
    device = resident_bytes(cost, request.memory) + optimizer_cost.aside + beside
    if request.adapter.is_full:  # tensor by tensor
        return device, in_ram + 2 * max(block.largest_leaf for block in cost.blocks)
    return device, in_ram + max(optimizer_cost.saved + optimizer_cost.start, SAVE_COPIES * optimizer_cost.lora)


def _evaluate(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_sampled: bool) -> tuple[int, int]:
    """Forward passes of one image each; those of the largest batch are counted."""
    beside, in_ram = _beside(request, facts, cost, is_sampled)
    return sampling_peak(cost, request.memory) + beside, in_ram


def _validate_with_other(
    request: TrainRequest, facts: RunFacts, cost: ModelCost, other: ModelCost, machine: Machine
) -> tuple[tuple[int, int], bool]:
    """Return the peaks where another model is loaded to sample, and whether it has the device alone.

    The trained model stays where it is if both fit. Else it is in RAM meanwhile. See train/hooks/sampling_model.py.
    """
    memory, on_cpu = request.memory, not machine.device_bytes
    beside = _validate_beside(request, facts, cost, other, is_alone=False, on_cpu=on_cpu)
    if on_cpu or memory.group_offload != "none" or bytes_to_reserve(beside[0]) <= machine.device_bytes:
        return beside, False
    return _validate_beside(request, facts, cost, other, is_alone=True, on_cpu=on_cpu), True


def _validate_beside(
    request: TrainRequest, facts: RunFacts, cost: ModelCost, other: ModelCost, is_alone: bool, on_cpu: bool
) -> tuple[int, int]:
    memory, optimizer_cost, codec = request.memory, cost.optimizer_cost, facts.codec.weights
    stays = resident_bytes(cost, memory) if not is_alone else optimizer_cost.resident - optimizer_cost.adapter
    stays += optimizer_cost.aside
    weights = resident_weights(other, memory) + optimizer_cost.adapter
    passes, decoding = sampling_work(other), codec + _decoding_work(memory, facts)
    _, ram = _load(request.for_drawing, other, on_cpu)
    ram += _offloaded_ram(cost, memory) + (cost.weights + optimizer_cost.adapter if is_alone else 0)
    if memory.model_offload:  # the other model and the VAE are in turn on the device
        return stays + max(weights + passes, decoding), ram + max(codec, other.weights + optimizer_cost.adapter)
    return stays + weights + max(passes + codec, decoding), ram + _offloaded_ram(other, memory)


def _decoding_work(memory: MemoryConfig, facts: RunFacts) -> int:
    return int(min(facts.validation_pixels, _max_tile_pixels(memory)) * VAE_DECODE_PIXEL * facts.codec.width)


def _validate(memory: MemoryConfig, facts: RunFacts, sampled: ModelCost) -> tuple[int, int]:
    work = _decoding_work(memory, facts)
    optimizer_cost, codec = sampled.optimizer_cost, facts.codec.weights
    if memory.model_offload:  # the adapter is offloaded with the transformer
        decoding = optimizer_cost.resident - optimizer_cost.adapter + optimizer_cost.aside + codec + work
        return max(sampling_peak(sampled, memory), decoding), sampled.weights + optimizer_cost.adapter
    decoding = resident_bytes(sampled, memory) + optimizer_cost.aside + codec + work
    return max(sampling_peak(sampled, memory) + codec, decoding), _offloaded_ram(sampled, memory)


def _score_images(memory: MemoryConfig, facts: RunFacts, sampled: ModelCost, on_cpu: bool) -> tuple[int, int]:
    """The image tower is on the device beside the model, after the last image is decoded. It is read and then moved."""
    if not facts.score.vision:
        return 0, 0
    aside = memory.model_offload
    codec = facts.codec.weights
    device = resident_bytes(sampled, memory) + sampled.optimizer_cost.aside + (0 if aside else codec)
    in_ram = _offloaded_ram(sampled, memory) + (codec if aside else 0) + (0 if on_cpu else facts.score.vision)
    return device + facts.score.vision + facts.score.work, in_ram


def _offloaded_ram(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the RAM of offloaded weights and optimizer states. On a CPU they are copied as well."""
    if memory.offload_to_disk:
        return 0
    return int(away(cost, memory) * (PINNED_SHARE if memory.offload_stream else 1)) + states_away(cost, memory)


def _max_tile_pixels(memory: MemoryConfig) -> int:
    return VAE_TILE_PIXELS if memory.vae_tiling else 1 << 62


def trained_words(request: TrainRequest) -> str:
    """Return what is trained, in words."""
    training = request.training
    if request.adapter.is_full:
        if training.is_sharded:
            return f"all weights of {training.targets}, shared out in {training.shard}"
        return f"all weights of {training.targets}, stepped inside of the backward pass"
    return f"{request.adapter.kind} of rank {training.rank} on {training.targets}"


def settings_of(request: TrainRequest) -> str:
    """Return the settings that decide the figures, in words."""
    training, memory = request.training, request.memory
    recomputed = f"one block in {memory.checkpointing_interval}" if memory.checkpointing_interval > 1 else "all blocks"
    words = [
        f"{request.model.family} {request.model.dtype}", f"quantization {request.model.quantization.level}",
        trained_words(request),
        request.optimizer.optimizer, f"batch {training.batch_size}",
        f"checkpointing {recomputed if training.gradient_checkpointing else 'off'}",
    ]  # fmt: skip
    if training.routed_share:
        skipped = f"blocks {training.route_first} to {training.route_last}"
        words.append(f"{training.routed_share:.0%} of the image tokens skip {skipped}")
    if training.init in ("pissa", "olora", "loftq"):
        words.append(f"init {training.init}")
    if training.rollout_probability:
        words.append(
            f"rollouts of 1 to {training.rollout_steps} steps in {training.rollout_probability:.0%} of the batches"
        )
    if other := request.sampling_model:
        words.append(f"images by {other.family} {other.flavour}, quantization {other.quantization.level}")
    if request.adapter.ema_decay:
        words.append("EMA of the weights")
    if request.model.quantization.text_encoder != "none":
        words.append(f"text encoder {request.model.quantization.text_encoder}")
    if memory.text_encoder != "device":
        words.append(f"text encoder {'block by block' if memory.text_encoder == 'blocks' else 'on the CPU'}")
    if memory.group_offload != "none":
        share = f" of {memory.offload_share:.0%} of the blocks" if memory.offload_share < 1 else ""
        words.append(f"group offload by {memory.group_offload}{share}")
    words += [
        name.replace("_", " ")
        for name in ("activation_offload", "model_offload", "vae_tiling", "vae_slicing", "compile")
        if getattr(memory, name)
    ]
    return ", ".join(words)
