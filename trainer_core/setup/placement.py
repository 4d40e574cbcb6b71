"""Place each part of the model as MemorySettings asks: on the device, in RAM or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inject import lora_layers
from ..adapters.layer import AdapterLayer
from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..config.training import IN_FP32
from ..devices import DTYPES, empty_cache, works_beside
from ..distributed.ranks import Ranks
from ..errors import Problem
from ..full_rank.offloaded_layer import offload_, release_
from ..full_rank.sharding import Sharding, shard_
from ..host import Host, Notice
from ..memory.activation_checkpointing import checkpoint_blocks_, places_to_recompute
from ..memory.activation_offload import SavedOnHost
from ..memory.disk_offload import wait_on_disk_
from ..memory.group_offload import GroupOffload, inner_tensors, save_as_notes_, swap_blocks_, swap_leaves_
from ..models.attention_backends import compile_blocks_, compiler_fault
from ..models.attention_check import AttentionShape, kernel_fault
from ..models.family import Family, ImageCodec, TextEncoder
from ..quant.loading import interruptible, text_converter

# Used before the run's own shapes are known.
FEW_TOKENS = AttentionShape(batch=1, text=9, image=64, heads=2, head_width=128)


def device_problems(memory: MemoryConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Problem]:
    """Return a problem for each setting that this device does not support.

    Args:
        dtype: of the model.
    """
    problems = []
    if memory.attention != "native" and (fault := kernel_fault(memory.attention, FEW_TOKENS, device, dtype)):
        where = f"on {device} in {str(dtype).removeprefix('torch.')}"
        problems.append(Problem("attention", f"{memory.attention} {fault} {where}; use native"))
    return problems


def without_streams(memory: MemoryConfig, device: torch.device, host: Host) -> MemoryConfig:
    """Return the settings with offload_stream switched off, and say so, where the device can't copy while it computes."""
    if not memory.offload_stream or works_beside(device):
        return memory
    host.emit(
        Notice(f"offload_stream is switched off: it needs a CUDA or XPU device, and this run's is {device}", "warning")
    )
    return replace(memory, offload_stream=False)


def compile_(transformer: nn.Module, family: Family, memory: MemoryConfig, device: torch.device) -> str:
    """Compile the blocks where the settings ask for it.

    Returns:
        A warning where the blocks can't be compiled, else ''.
    """
    if not memory.compile:
        return ""
    if fault := compiler_fault(device):
        return f"blocks are not compiled: {fault}; the run continues without compilation"
    compile_blocks_(family.blocks(transformer))
    return ""


def weights_stay(memory: MemoryConfig, device: torch.device) -> bool:
    """Return whether the base's weights stay on the device. On a CPU they are mapped from files, and stay there."""
    return device.type != "cpu" and memory.group_offload == "none" and not memory.model_offload


def place_(
    transformer: nn.Module,
    family: Family,
    memory: MemoryConfig,
    device: torch.device,
    *,
    checkpointing: bool,
    disk: Path,
) -> None:
    """Move a quantized transformer with its adapter to where it is trained. Outputs and gradients stay the same.

    Args:
        checkpointing: whether blocks are recomputed in the backward pass, see places_to_recompute.
        disk: folder for weights that are offloaded to disk, named by their identity.
    """
    blocks = family.blocks(transformer)
    swap, trained = None, []
    offloaded = {i: blocks[i] for i in memory.offloaded_blocks(len(blocks))}
    if offloaded:
        if memory.offload_to_disk:
            wait_on_disk_(offloaded, disk)
        trained = release_(layer for block in offloaded.values() for layer in lora_layers(block).values())
        swap = _offload_groups([*offloaded.values()], memory, device)
        swap.take_out()
    transformer.to(device)
    if swap:
        swap.send_home()
        offload_(trained, swap)
    host = None
    if memory.activation_offload:
        weights = [*transformer.parameters(), *transformer.buffers()]
        host = SavedOnHost(part for tensor in weights for part in inner_tensors(tensor))
    indices = places_to_recompute(len(blocks), memory.checkpointing_interval, not memory.moves)
    recomputed = set(indices) if checkpointing else set()
    # A recomputed block stores no activations inside: its weights are loaded again with its second forward pass.
    stored = [block for i, block in enumerate(blocks) if i not in recomputed]
    if swap or host:
        save_as_notes_(stored, swap, host)
    if checkpointing:
        checkpoint_blocks_(blocks, memory.checkpointing_interval, not memory.moves)
    if host:
        save_as_notes_([block for i, block in enumerate(blocks) if i in recomputed], None, host)


def place_sharded_(
    transformer: nn.Module,
    family: Family,
    request: TrainRequest,
    layers: Mapping[str, AdapterLayer],
    device: torch.device,
    ranks: Ranks,
    host: Host,
) -> Sharding:
    """Share out the weights of a transformer, which is in RAM, over the devices of all ranks. See TrainingConfig.shard.

    Args:
        layers: The trained layers.
    """
    training, memory, blocks = request.training, request.memory, family.blocks(transformer)
    if training.gradient_checkpointing:
        checkpoint_blocks_(blocks, memory.checkpointing_interval)
    if warning := compile_(transformer, family, memory, device):
        host.emit(Notice(warning, "warning"))
    stores_in = torch.float32 if training.shard == IN_FP32 else torch.bfloat16
    on_host = memory.group_offload != "none"
    return shard_(transformer, blocks, layers, ranks, device, DTYPES[request.model.dtype], stores_in, on_host)


def load_text_encoder(family: Family, request: TrainRequest, device: torch.device, host: Host) -> TextEncoder:
    """Load the text encoder where the request wants it: on the device, on the device block by block, or on the CPU.

    Raises:
        Cancelled: between two layers, where they are quantized or moved.
    """
    where = request.memory.text_encoder
    quantize = text_converter(request.model.quantization, device, request.model.text_encoder_file)
    convert = interruptible(quantize, host, device, resident=where == "device")
    if where == "device":
        return family.load_text_encoder(request.model, device, convert)
    encoder = family.load_text_encoder(request.model, torch.device("cpu"), convert)
    return place_text_encoder_(encoder, device) if where == "blocks" else encoder


def load_codec(family: Family, request: TrainRequest, device: torch.device) -> ImageCodec:
    """Load the codec, with tiling and slicing where the request asks for them."""
    codec = family.load_codec(request.model, device)
    codec.economise_(request.memory.vae_tiling, request.memory.vae_slicing)
    return codec


def place_text_encoder_(encoder: Any, device: torch.device) -> Any:
    """Place a text encoder that was loaded on the CPU: its blocks and other layers are on the device while they compute.

    accelerate's hooks move them. Works on any object that has transformers' models as attributes, which name their
    blocks.
    """
    from accelerate import cpu_offload

    for model in [value for value in vars(encoder).values() if isinstance(value, nn.Module)]:
        blocks: Any = model._no_split_modules
        cpu_offload(model, device, preload_module_classes=list(blocks))
    for value in vars(encoder).values():
        if hasattr(value, "encode") and hasattr(value, "device"):
            place_text_encoder_(value, device)
    if hasattr(encoder, "device"):
        encoder.device = device
    return encoder


class SoloCodec:
    """A codec that has the device to itself while it works: the transformer is moved to the CPU and back.

    The members are those of models.family.ImageCodec.
    """

    def __init__(self, codec: Any, transformer: nn.Module, device: torch.device):
        self._codec, self._transformer, self._device = codec, transformer, device
        self.factor, self.channels = codec.factor, codec.channels
        codec.move_(torch.device("cpu"))

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run_alone(self._codec.encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._run_alone(self._codec.decode, latents)

    def beside(self, transformer: nn.Module) -> SoloCodec:
        """Return the same codec for another transformer."""
        return SoloCodec(self._codec, transformer, self._device)

    def move_(self, device: torch.device) -> None:
        """Set the device that the codec computes on. Between two calls it is on the CPU."""
        self._device = device

    def economise_(self, tiling: bool, slicing: bool) -> None:
        self._codec.economise_(tiling, slicing)

    def _run_alone(self, call: Any, value: Tensor) -> Tensor:
        self._transformer.to("cpu")
        self._codec.move_(self._device)
        try:
            return call(value)
        finally:
            self._codec.move_(torch.device("cpu"))
            empty_cache(self._device)
            self._transformer.to(self._device)


def _offload_groups(blocks: Sequence[nn.Module], memory: MemoryConfig, device: torch.device) -> GroupOffload:
    if memory.group_offload == "leaf":
        return swap_leaves_(blocks, device, ahead=memory.offload_stream)
    return swap_blocks_(blocks, device, per_group=memory.blocks_per_group, ahead=memory.offload_stream)
