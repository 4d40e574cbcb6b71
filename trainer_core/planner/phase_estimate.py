"""A run's phases, one after another: what each takes of the device and of RAM, and what the run leaves on disk."""

from __future__ import annotations

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from .cost_model import ModelCost, forward_flops, step_flops
from .memory_plan import Machine, MemoryPlan, PhasePlan
from .step_peak import away, blocks_to_recompute, resident_weights, sampling_peak, training_peak
from .workload import RunFacts, rollout_passes

# The interpreter with torch, this package, and the libraries of the text encoder and the VAE, resident: 470 to 515 MB seen on Linux, without
# CUDA; 300 where everything is cached and no pictures are drawn.
PROCESS_BYTES = 500_000_000
# The released VAE (128 channels at full size), a pixel: counted on the meta device at 256, 512 and 1024 px, in fp32.
VAE_ENCODE_PIXEL, VAE_DECODE_PIXEL = 2572, 3073
VAE_TILE_PIXELS = 512 * 512
LATENT_BYTES_PIXEL = 16 * 4 / 64  # 16 channels of fp32 for 8 x 8 pixels


def forecast(
    request: TrainRequest,
    facts: RunFacts,
    cost: ModelCost,
    drawn: ModelCost | None,
    machine: Machine,
    whole: ModelCost | None = None,
) -> MemoryPlan:
    """Add up what was counted.

    Args:
        cost: at the largest batch. drawn: at the largest validation picture, None where nothing is drawn.
        whole: as cost, with no token routed; None where none is.
    """
    on_cpu = not machine.device_bytes
    learning = step_flops(cost, blocks_to_recompute(request, len(cost.blocks)))
    rollouts = rollout_passes(request.training, facts.prior)
    beside = round(facts.prior.some * forward_flops(cost) + rollouts * forward_flops(whole or cost))
    flops = (learning + beside) * request.training.accumulation
    seconds = flops / machine.flops if machine.flops else None
    durations = {"train": seconds * facts.num_steps if seconds else None}
    phases = {
        "text": _text(request.memory, facts, on_cpu),
        "latents": (_encoding(request.memory, facts, on_cpu), 0),
        "load": _load(request, cost, on_cpu),
        "train": _train(request, facts, cost, drawn is not None),
    }
    if drawn is not None:
        phases["validate"] = _validate(request.memory, facts, drawn)
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
        # Beside its blocks the largest layer is the table of embeddings; either is there alone.
        return max(encoder.weights - encoder.blocks, encoder.largest_block) + encoder.work, encoder.weights
    # What is quantised is made in RAM; what is not comes straight from the mapped file.
    return encoder.weights + encoder.work, encoder.weights if encoder.is_quantized and not on_cpu else 0


def _encoding(memory: MemoryConfig, facts: RunFacts, on_cpu: bool) -> int:
    """As data/cache/latents.py: one picture of 1024 px at a time, or more small ones; on a CPU always one."""
    size = facts.largest.width * facts.largest.height
    count = 1 if memory.vae_slicing or on_cpu else min(8, max(1, (1 << 20) // size))
    return facts.codec.weights + int(min(size * count, _tile(memory)) * VAE_ENCODE_PIXEL * facts.codec.width)


def _load(request: TrainRequest, cost: ModelCost, on_cpu: bool) -> tuple[int, int]:
    learns = cost.upkeep.adapter + cost.upkeep.average
    if on_cpu:
        return cost.weights + learns, 0
    waits = request.model.quantization.level != "none" or request.memory.group_offload != "none"
    return resident_weights(cost, request.memory) + learns, cost.weights if waits else 0


def _train(request: TrainRequest, facts: RunFacts, cost: ModelCost, is_drawn: bool) -> tuple[int, int]:
    """The VAE that draws is there all the time, on the device or, with model_offload, in RAM."""
    peak, activations = training_peak(cost, request)
    codec = facts.codec.weights if is_drawn else 0
    aside = request.memory.model_offload
    return peak + (0 if aside else codec), _home(cost, request.memory) + activations + (codec if aside else 0)


def _validate(memory: MemoryConfig, facts: RunFacts, drawn: ModelCost) -> tuple[int, int]:
    work = int(min(facts.validation_pixels, _tile(memory)) * VAE_DECODE_PIXEL * facts.codec.width)
    upkeep, codec = drawn.upkeep, facts.codec.weights
    if memory.model_offload:  # the adapter leaves with the transformer
        decoding = upkeep.resident - upkeep.adapter + upkeep.aside + codec + work
        return max(sampling_peak(drawn, memory), decoding), drawn.weights + upkeep.adapter
    decoding = resident_weights(drawn, memory) + upkeep.resident + upkeep.aside + codec + work
    return max(sampling_peak(drawn, memory) + codec, decoding), _home(drawn, memory)


def _home(cost: ModelCost, memory: MemoryConfig) -> int:
    """RAM of weights that come to the device for a while; on a CPU they are copied as well."""
    return 0 if memory.offload_to_disk else away(cost, memory)


def _tile(memory: MemoryConfig) -> int:
    return VAE_TILE_PIXELS if memory.vae_tiling else 1 << 62


def _disk(request: TrainRequest, facts: RunFacts, cost: ModelCost) -> dict[str, int]:
    upkeep = cost.upkeep
    return {
        "text": facts.prompts * facts.largest.text_tokens * facts.encoder.width * facts.element_bytes,
        "latents": int(facts.latent_pixels * LATENT_BYTES_PIXEL),
        "checkpoints": request.training.keep_checkpoints * (upkeep.resident + upkeep.start),
        "lora": upkeep.parameters * 4 + upkeep.start,  # fp32; a start makes the file's rank twice the run's
        "offload": away(cost, request.memory) if request.memory.offload_to_disk else 0,
    }


def settings_of(request: TrainRequest) -> str:
    """What decides the figures, in words."""
    training, memory = request.training, request.memory
    again = f"one block in {memory.checkpointing_interval}" if memory.checkpointing_interval > 1 else "all blocks"
    words = [
        f"{request.model.family} {request.model.dtype}", f"quantisation {request.model.quantization.level}",
        f"{request.adapter.kind} of rank {training.rank} on {training.targets}", request.optimizer.optimizer, f"batch {training.batch_size}",
        f"checkpointing {again if training.gradient_checkpointing else 'off'}",
    ]  # fmt: skip
    if training.routed_share:
        skipped = f"blocks {training.route_first} to {training.route_last}"
        words.append(f"{training.routed_share:.0%} of the picture's tokens skip {skipped}")
    if training.init in ("pissa", "olora", "loftq"):
        words.append(f"init {training.init}")
    if training.rollout_probability:
        words.append(
            f"rollouts of 1 to {training.rollout_steps} steps in {training.rollout_probability:.0%} of the batches"
        )
    if request.adapter.ema_decay:
        words.append("an average of the weights")
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
