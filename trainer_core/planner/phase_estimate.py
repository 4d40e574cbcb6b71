"""Estimate the phases of a run: device memory and RAM of each phase, and the disk space of the run's files."""

from __future__ import annotations

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from .cost_model import ModelCost, forward_flops, step_flops
from .memory_plan import Machine, MemoryPlan, PhasePlan
from .step_peak import away, blocks_to_recompute, resident_weights, sampling_peak, training_peak
from .workload import RunFacts, rollout_passes

# Resident memory of the interpreter with torch, this package, transformers and diffusers: 470 to 515 MB measured on
# Linux, without CUDA; 300 if everything is cached and no images are sampled.
PROCESS_BYTES = 500_000_000
# Bytes per pixel of the released VAE (128 channels at full size): counted on the meta device at 256, 512 and 1024 px,
# in fp32.
VAE_ENCODE_PIXEL, VAE_DECODE_PIXEL = 2572, 3073
VAE_TILE_PIXELS = 512 * 512


def estimate_run(
    request: TrainRequest,
    facts: RunFacts,
    cost: ModelCost,
    sampled: ModelCost | None,
    machine: Machine,
    whole: ModelCost | None = None,
) -> MemoryPlan:
    """Add up the counted costs to the estimate of a run.

    Args:
        cost: cost of the largest batch.
        sampled: cost of the largest validation image; None where none is sampled.
        whole: cost of the largest batch without token routing; None where no token is routed.
    """
    on_cpu = not machine.device_bytes
    training = step_flops(cost, blocks_to_recompute(request, len(cost.blocks)))
    rollouts = rollout_passes(request.training, facts.prior)
    extra_passes = round(facts.prior.some * forward_flops(cost) + rollouts * forward_flops(whole or cost))
    flops = (training + extra_passes) * request.training.accumulation
    seconds = flops / machine.flops if machine.flops else None
    durations = {"train": seconds * facts.num_steps if seconds else None}
    phases = {
        "text": _text(request.memory, facts, on_cpu),
        "latents": (_encoding(request.memory, facts, on_cpu), 0),
        "load": _load(request, cost, on_cpu),
        "train": _train(request, facts, cost, sampled is not None),
    }
    if sampled is not None:
        phases["validate"] = _validate(request.memory, facts, sampled)
    planned = tuple(
        PhasePlan(name, device, PROCESS_BYTES + ram + (device if on_cpu else 0), durations.get(name))
        for name, (device, ram) in phases.items()
    )
    return MemoryPlan(planned, _disk(request, facts, cost), machine, settings_of(request), flops, seconds)


def _text(memory: MemoryConfig, facts: RunFacts, on_cpu: bool) -> tuple[int, int]:
    encoder = facts.encoder
    if memory.text_encoder == "cpu":
        return 0, encoder.weights + encoder.work
    if memory.text_encoder == "blocks":
        # Next to its blocks the largest layer is the embedding table. Each is alone on the device.
        return max(encoder.weights - encoder.blocks, encoder.largest_block) + encoder.work, encoder.weights
    # A quantized encoder is built in RAM; any other is loaded directly from the memory-mapped file.
    return encoder.weights + encoder.work, encoder.weights if encoder.is_quantized and not on_cpu else 0


def _encoding(memory: MemoryConfig, facts: RunFacts, on_cpu: bool) -> int:
    """Encode images as data/cache/latents.py does: one of 1024 px at a time, or several small ones; on a CPU one."""
    size = facts.largest.width * facts.largest.height
    count = 1 if memory.vae_slicing or on_cpu else min(8, max(1, (1 << 20) // size))
    return facts.codec.weights + int(min(size * count, _max_tile_pixels(memory)) * VAE_ENCODE_PIXEL * facts.codec.width)


def _load(request: TrainRequest, cost: ModelCost, on_cpu: bool) -> tuple[int, int]:
    adapter = cost.optimizer_cost.adapter + cost.optimizer_cost.average
    if on_cpu:
        return cost.weights + adapter, 0
    starts_in_ram = request.model.quantization.level != "none" or request.memory.group_offload != "none"
    return resident_weights(cost, request.memory) + adapter, cost.weights if starts_in_ram else 0


def _train(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_sampled: bool) -> tuple[int, int]:
    """The VAE of the validation stays loaded, on the device or, with model_offload, in RAM."""
    peak, activations = training_peak(cost, request)
    codec = facts.codec.weights if is_sampled else 0
    aside = request.memory.model_offload
    return peak + (0 if aside else codec), _offloaded_ram(cost, request.memory) + activations + (codec if aside else 0)


def _validate(memory: MemoryConfig, facts: RunFacts, sampled: ModelCost) -> tuple[int, int]:
    work = int(min(facts.validation_pixels, _max_tile_pixels(memory)) * VAE_DECODE_PIXEL * facts.codec.width)
    optimizer_cost, codec = sampled.optimizer_cost, facts.codec.weights
    if memory.model_offload:  # the adapter is offloaded with the transformer
        decoding = optimizer_cost.resident - optimizer_cost.adapter + optimizer_cost.aside + codec + work
        return max(sampling_peak(sampled, memory), decoding), sampled.weights + optimizer_cost.adapter
    decoding = resident_weights(sampled, memory) + optimizer_cost.resident + optimizer_cost.aside + codec + work
    return max(sampling_peak(sampled, memory) + codec, decoding), _offloaded_ram(sampled, memory)


def _offloaded_ram(cost: ModelCost, memory: MemoryConfig) -> int:
    """Return the RAM of offloaded weights. On a CPU they are copied as well."""
    return 0 if memory.offload_to_disk else away(cost, memory)


def _max_tile_pixels(memory: MemoryConfig) -> int:
    return VAE_TILE_PIXELS if memory.vae_tiling else 1 << 62


def _disk(request: TrainRequest, facts: RunFacts, cost: ModelCost) -> dict[str, int]:
    optimizer_cost = cost.optimizer_cost
    return {
        "text": facts.prompts * facts.largest.text_tokens * facts.encoder.width * facts.element_bytes,
        "latents": facts.latent_bytes,
        "checkpoints": request.training.keep_checkpoints * (optimizer_cost.saved + optimizer_cost.start),
        # fp32; stored initial values double the rank of the file.
        "lora": optimizer_cost.parameters * 4 + optimizer_cost.start,
        "offload": away(cost, request.memory) if request.memory.offload_to_disk else 0,
    }


def settings_of(request: TrainRequest) -> str:
    """Return the settings that decide the figures, in words."""
    training, memory = request.training, request.memory
    recomputed = f"one block in {memory.checkpointing_interval}" if memory.checkpointing_interval > 1 else "all blocks"
    words = [
        f"{request.model.family} {request.model.dtype}", f"quantization {request.model.quantization.level}",
        f"{request.adapter.kind} of rank {training.rank} on {training.targets}",
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
    if request.adapter.ema_decay:
        words.append("EMA of the weights")
    if request.model.quantization.text_encoder != "none":
        words.append(f"text encoder {request.model.quantization.text_encoder}")
    if memory.text_encoder != "device":
        words.append(f"text encoder {'block by block' if memory.text_encoder == 'blocks' else 'on the CPU'}")
    if memory.group_offload != "none":
        words.append(f"group offload by {memory.group_offload}")
    words += [
        name.replace("_", " ")
        for name in ("activation_offload", "model_offload", "vae_tiling", "vae_slicing", "compile")
        if getattr(memory, name)
    ]
    return ", ".join(words)
