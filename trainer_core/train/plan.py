"""What a run will take of memory, disk and time, from shapes alone: no weights are loaded.

Bytes and operations of a step are counted (costs.py); this file adds them up along the run. Device figures are bytes of
tensors, as torch.cuda.max_memory_allocated counts them; DEVICE_OVERHEAD comes on top when it is asked whether they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from .costs import BlockCost, ModelCost, Shape, step_flops

GB = 1_000_000_000
GIB = 1 << 30
# Beside tensors: the driver's context, libraries' workspaces, gaps between the allocator's pieces. Assumed, not measured here.
DEVICE_OVERHEAD, DEVICE_GAPS = 700_000_000, 0.04
# The interpreter with torch and this package, resident: 310 to 420 MB seen on Linux, without CUDA.
PROCESS_BYTES = 400_000_000
# The released VAE (128 channels at full size), a pixel: counted on the meta device at 256, 512 and 1024 px, in fp32.
VAE_ENCODE_PIXEL, VAE_DECODE_PIXEL = 2572, 3073
VAE_TILE_PIXELS = 512 * 512
LATENT_BYTES_PIXEL = 16 * 4 / 64  # 16 channels of fp32 for 8 x 8 pixels
ADAMW = 3.0  # it keeps two numbers beside each that learns


@dataclass(frozen=True)
class Machine:
    """device_bytes: free on the accelerator, 0 for a CPU run; ram_bytes: free RAM; flops: a second, 0 unknown."""

    name: str
    device_bytes: int
    ram_bytes: int
    flops: float = 0.0


@dataclass(frozen=True)
class PhasePlan:
    """device: peak bytes of tensors where it computes; ram: peak of the process' memory; seconds: None unknown."""

    name: str
    device: int
    ram: int
    seconds: float | None = None


@dataclass(frozen=True)
class RunFacts:
    """What is known of the data and the files. largest: the bucket of most pixels.

    learned: bytes of what learns and of the optimiser's states, for each byte of fp32 weights.
        encoder_numbers: parameters of the text encoder. encoder_work: bytes it takes for the longest prompt.
    latent_pixels: pixels of all pictures. prompts: number of distinct prompts; text_width: features of a token.
    """

    largest: Shape
    num_images: int
    latent_pixels: int
    prompts: int
    text_width: int
    encoder_numbers: int
    encoder_block_numbers: int
    encoder_work: int
    element_bytes: int
    validation_pixels: int
    num_steps: int
    codec_numbers: int
    codec_width: float
    learned: float = ADAMW


@dataclass(frozen=True)
class MemoryPlan:
    """The forecast of one request on one machine."""

    phases: tuple[PhasePlan, ...]
    disk: dict[str, int]
    machine: Machine
    settings: str
    flops_per_step: int
    seconds_per_step: float | None
    advice: Callable[[], str] = lambda: ""  # what would fit, worked out when it is asked for

    @property
    def device_peak(self) -> int:
        return max(phase.device for phase in self.phases)

    @property
    def ram_peak(self) -> int:
        return max(phase.ram for phase in self.phases)

    def unfit(self) -> list[PhasePlan]:
        """Phases that take more than there is."""
        room = self.machine
        return [
            phase
            for phase in self.phases
            if (room.device_bytes and needed(phase.device) > room.device_bytes)
            or (room.ram_bytes and phase.ram > room.ram_bytes)
        ]

    def first_line(self) -> str:
        """The whole in one line."""
        room, worst = self.machine, max(self.phases, key=lambda phase: phase.device)
        where = "VRAM" if room.device_bytes else "memory"
        have = f" of {gb(room.device_bytes)} free" if room.device_bytes else ""
        # Seconds come from a table of peaks, so that they are a floor.
        speed = f", at least {self.seconds_per_step:.2g} s a step" if self.seconds_per_step else ""
        fits = "fits" if not self.unfit() else f"does not fit ({', '.join(phase.name for phase in self.unfit())})"
        need = gb(needed(worst.device)) if room.device_bytes else gb(worst.device)
        return f"plan: {fits}; {where} {need}{have} ({worst.name}), RAM {gb(self.ram_peak)}, disk {gb(sum(self.disk.values()))}{speed}"

    def text(self) -> str:
        """The forecast as a table."""
        lines = [self.first_line(), f"  {self.settings}", f"  {'phase':<10}{'tensors':>10}{'RAM':>10}{'seconds':>10}"]
        for phase in self.phases:
            seconds = "" if phase.seconds is None else f"{phase.seconds:.3g}"
            lines.append(f"  {phase.name:<10}{gb(phase.device):>10}{gb(phase.ram):>10}{seconds:>10}")
        lines.append("  disk: " + ", ".join(f"{name} {gb(size)}" for name, size in self.disk.items() if size))
        lines.append(f"  {self.flops_per_step / 1e12:.3g} TFLOP a step")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": not self.unfit(),
            "machine": {"name": self.machine.name, "device_bytes": self.machine.device_bytes, "ram_bytes": self.machine.ram_bytes},
            "phases": {p.name: {"device_bytes": p.device, "ram_bytes": p.ram, "seconds": p.seconds} for p in self.phases},
            "device_peak_bytes": self.device_peak, "ram_peak_bytes": self.ram_peak, "disk_bytes": self.disk,
            "flops_per_step": self.flops_per_step, "seconds_per_step": self.seconds_per_step, "settings": self.settings,
        }  # fmt: skip


def needed(tensors: int) -> int:
    """What an accelerator must have free for so many bytes of tensors."""
    return int(tensors * (1 + DEVICE_GAPS)) + DEVICE_OVERHEAD


def gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:.1f} GB"


def recomputed(request: TrainRequest, num_blocks: int) -> range:
    """Places of the blocks that are computed again in the backward pass."""
    interval = request.memory.checkpointing_interval
    return range(0, num_blocks, interval) if request.training.gradient_checkpointing else range(0)


def training_peak(cost: ModelCost, request: TrainRequest, learned: float = ADAMW) -> tuple[int, int]:
    """Peak bytes of tensors on the device in a step, the optimiser's states there; and bytes of activations in RAM."""
    again, to_host = set(recomputed(request, len(cost.blocks))), request.memory.activation_offload
    level = resident_weights(cost, request.memory) + int(cost.adapter * learned) + cost.before
    peak, host, inputs = level, 0, []
    carried = 0  # the last block's result, which is on the device whatever happens to it later
    for i, block in enumerate(cost.blocks):
        inputs.append(level)
        during = block.forward_peak if i in again else block.forward_grad_peak
        peak = max(peak, level + carried + during)
        kept = block.output if i in again else block.kept
        if to_host:
            host += kept
            carried = block.output
        else:
            level += kept
    peak = max(peak, level + carried + cost.head_peak)
    gradients = 0
    for i in range(len(cost.blocks) - 1, -1, -1):
        block = cost.blocks[i]
        during = _backward(block, i in again, to_host)
        peak = max(peak, inputs[i] + gradients + during + (block.output if to_host else 0))
        gradients += block.gradients
    return peak, host


def _backward(block: BlockCost, is_again: bool, to_host: bool) -> int:
    """Above what was alive before the block. The second forward pass ends before it makes the result anew."""
    if is_again:
        return max(block.forward_grad_peak, block.backward_peak - block.output)
    return block.backward_peak - (block.kept - block.output if to_host else 0)


def resident_weights(cost: ModelCost, memory: MemoryConfig) -> int:
    """Frozen weights on the device: all, or what lies outside of the blocks and the groups that are there at a time."""
    inside = sum(block.weights for block in cost.blocks)
    groups = 2 if memory.offload_stream else 1
    if memory.group_offload == "block":
        sizes = [block.weights for block in cost.blocks]
        n = memory.blocks_per_group
        return cost.weights - inside + groups * max(sum(sizes[i : i + n]) for i in range(0, len(sizes), n))
    if memory.group_offload == "leaf":
        return cost.weights - inside + groups * max(block.largest_leaf for block in cost.blocks)
    return cost.weights


def sampling_peak(cost: ModelCost, memory: MemoryConfig) -> int:
    """Peak bytes of tensors in a forward pass without gradients."""
    inside = max(block.forward_peak for block in cost.blocks) + cost.blocks[0].output
    return resident_weights(cost, memory) + cost.adapter + cost.before + max(inside, cost.head_peak)


def forecast(
    request: TrainRequest, facts: RunFacts, cost: ModelCost, drawn: ModelCost | None, machine: Machine
) -> MemoryPlan:
    """Add up what was counted.

    Args:
        cost: at the largest batch. drawn: at the largest validation picture, None where nothing is drawn.
    """
    on_cpu = not machine.device_bytes
    memory = request.memory
    train, activations = training_peak(cost, request, facts.learned)
    states = int(cost.adapter * (facts.learned - 1))
    home = (
        0 if on_cpu or memory.group_offload == "none" or memory.offload_to_disk else sum(b.weights for b in cost.blocks)
    )
    text = _text(request, facts)
    pixels = min(
        facts.largest.width * facts.largest.height * (1 if memory.vae_slicing else _pictures_at_once(facts)),
        _tile(memory),
    )
    codec = facts.codec_numbers * 4
    latents = codec + int(pixels * VAE_ENCODE_PIXEL * facts.codec_width)
    phases = [("text", *text), ("latents", latents, 0)]
    load = cost.weights + cost.adapter if on_cpu else resident_weights(cost, memory) + cost.adapter
    waiting = cost.weights if request.model.quantization.level != "none" or home else 0
    phases += [("load", load, 0 if on_cpu else waiting), ("train", train, home + activations)]
    if drawn is not None:
        decode = codec + int(min(facts.validation_pixels, _tile(memory)) * VAE_DECODE_PIXEL * facts.codec_width)
        alone = 0 if memory.model_offload else resident_weights(drawn, memory) + drawn.adapter
        sampling = sampling_peak(drawn, memory) + (0 if memory.model_offload else codec)
        phases.append(
            ("validate", states + max(sampling, alone + decode), home + (cost.weights if memory.model_offload else 0))
        )
    flops = step_flops(cost, recomputed(request, len(cost.blocks))) * request.training.accumulation
    seconds = flops / machine.flops if machine.flops else None
    durations = {"train": seconds * facts.num_steps if seconds else None}
    planned = tuple(
        PhasePlan(name, device, PROCESS_BYTES + ram + (device if on_cpu else 0), durations.get(name))
        for name, device, ram in phases
    )
    return MemoryPlan(planned, _disk(request, facts, cost), machine, settings_of(request), flops, seconds)


def _tile(memory: MemoryConfig) -> int:
    return VAE_TILE_PIXELS if memory.vae_tiling else 1 << 62


def _pictures_at_once(facts: RunFacts) -> int:
    """As data/latents.py: one picture of 1024 px, or more small ones."""
    return min(8, max(1, (1 << 20) // (facts.largest.width * facts.largest.height)))


def _text(request: TrainRequest, facts: RunFacts) -> tuple[int, int]:
    whole = facts.encoder_numbers * facts.element_bytes
    if request.memory.text_encoder == "cpu":
        return 0, whole + facts.encoder_work
    if request.memory.text_encoder == "blocks":
        return (facts.encoder_block_numbers * 2) * facts.element_bytes + facts.encoder_work, whole
    return whole + facts.encoder_work, 0


def _disk(request: TrainRequest, facts: RunFacts, cost: ModelCost) -> dict[str, int]:
    tokens = facts.largest.text_tokens
    return {
        "text": facts.prompts * tokens * facts.text_width * facts.element_bytes,
        "latents": int(facts.latent_pixels * LATENT_BYTES_PIXEL),
        "checkpoints": request.training.keep_checkpoints * int(cost.adapter * facts.learned),
        "lora": cost.adapter,
        "offload": sum(block.weights for block in cost.blocks) if request.memory.offload_to_disk else 0,
    }


def settings_of(request: TrainRequest) -> str:
    """What decides the figures, in words."""
    training, memory = request.training, request.memory
    again = f"every {memory.checkpointing_interval}. block" if memory.checkpointing_interval > 1 else "all blocks"
    words = [
        f"{request.model.family} {request.model.dtype}", f"quantisation {request.model.quantization.level}",
        f"rank {training.rank} on {training.targets}", f"batch {training.batch_size}",
        f"checkpointing {again if training.gradient_checkpointing else 'off'}",
    ]  # fmt: skip
    if memory.group_offload != "none":
        words.append(f"group offload by {memory.group_offload}")
    words += [
        name.replace("_", " ")
        for name in ("activation_offload", "model_offload", "vae_tiling")
        if getattr(memory, name)
    ]
    return ", ".join(words)


def with_memory(request: TrainRequest, **values: Any) -> TrainRequest:
    """The request with other memory settings."""
    return replace(request, memory=replace(request.memory, **values))
