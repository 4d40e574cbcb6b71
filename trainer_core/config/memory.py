"""How the run fits into memory, and how fast it goes: the widgets of MemorySettings. None of it changes what is learnt,
but for last bits: of latents where the VAE works in tiles or slices, of all where blocks are compiled or attention is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import Problem
from ..spec import Advanced, Choice, Doc, Range

NUMERIC = ("vae_tiling", "vae_slicing", "compile", "attention")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Trades of memory for time. What contradicts what is in problems(), and with the request in setup/preflight.py."""

    checkpointing_interval: Annotated[
        int,
        Range(1, 64),
        Doc("With gradient_checkpointing: every n-th block is computed again. 1: all blocks, the least memory."),
    ] = 1
    mode: Annotated[
        str,
        Choice("manual", "auto"),
        Doc(
            "auto: the checkpointing interval and the offloads are chosen by the plan, the fastest that fit the device's free memory. manual: as set here."
        ),
    ] = "manual"
    group_offload: Annotated[
        str,
        Choice("none", "block", "leaf"),
        Doc(
            "Keep the base model's weights in RAM and bring them to the device in groups: block by block, or layer by layer (leaf: the least memory, the slowest)."
        ),
    ] = "none"
    blocks_per_group: Annotated[
        int, Range(1, 64), Doc("Blocks that come to the device together, with group_offload block.")
    ] = 1
    offload_stream: Annotated[
        bool,
        Doc(
            "With group_offload on CUDA: copy the next group while this one computes. Holds two groups, and their RAM is pinned."
        ),
    ] = False
    offload_to_disk: Annotated[
        bool,
        Advanced(),
        Doc("With group_offload: weights wait in a file in the cache, not in RAM. For little RAM and a fast disk."),
    ] = False
    activation_offload: Annotated[
        bool, Doc("What the forward pass keeps for the backward pass waits in RAM, not on the device.")
    ] = False
    model_offload: Annotated[
        bool,
        Doc("The transformer leaves the device while the VAE decodes validation pictures, and the VAE afterwards."),
    ] = False
    text_encoder: Annotated[
        str,
        Choice("device", "blocks", "cpu"),
        Doc(
            "Where prompts are encoded, once: on the device (T5-XXL takes 9.6 GB in bf16), there block by block (1 GB), or on the CPU."
        ),
    ] = "device"
    vae_tiling: Annotated[
        bool, Doc("The VAE works in tiles: less memory from 1024 px up, and faint differences at their seams.")
    ] = False
    vae_slicing: Annotated[bool, Doc("The VAE encodes one picture at a time, not several small ones together.")] = False
    compile: Annotated[
        bool,
        Doc(
            "Compile the transformer's blocks with torch.compile: the first steps take a minute or more, all others less. Without a compiler it is skipped, with a notice."
        ),
    ] = False
    attention: Annotated[
        str,
        Choice("native", "flash", "cudnn", "efficient", "math"),
        Advanced(),
        Doc(
            "Attention kernel. native: the first of flash, efficient, cudnn and math that gives correct outputs and gradients on this device. A kernel that you name and that is not correct here is refused."
        ),
    ] = "native"

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.group_offload == "none":
            found += [
                Problem(name, "has no effect while group_offload is none; choose block or leaf, or turn it off")
                for name in ("offload_stream", "offload_to_disk")
                if getattr(self, name)
            ]
        elif self.model_offload:
            found.append(
                Problem(
                    "model_offload",
                    f"and group_offload {self.group_offload} exclude each other: the base's weights are off the device already; turn one off",
                )
            )
        if self.offload_stream and self.offload_to_disk:
            found.append(
                Problem(
                    "offload_to_disk",
                    "and offload_stream exclude each other: what is copied ahead lies pinned in RAM; turn one off",
                )
            )
        if self.group_offload == "leaf" and self.blocks_per_group > 1:
            found.append(
                Problem(
                    "blocks_per_group",
                    f"is {self.blocks_per_group}, but group_offload leaf moves single layers; use 1, or group_offload block",
                )
            )
        if self.compile and (self.group_offload != "none" or self.activation_offload):
            name = "group_offload" if self.group_offload != "none" else "activation_offload"
            found.append(
                Problem("compile", f"and {name} exclude each other: weights move in the midst of a block; turn one off")
            )
        if self.mode == "auto" and (self.group_offload != "none" or self.activation_offload):
            name = "group_offload" if self.group_offload != "none" else "activation_offload"
            found.append(Problem("mode", f"auto chooses {name} itself; use manual, or leave {name} as it was"))
        return found

    @property
    def moves(self) -> bool:
        """Whether weights or activations leave the device in a step."""
        return self.group_offload != "none" or self.activation_offload

    def numeric_rules(self) -> dict[str, object]:
        """What changes the last bits of a run: part of what names it. {} with the defaults."""
        return {name: getattr(self, name) for name in NUMERIC if getattr(self, name) != getattr(MemoryConfig, name)}

    def vae_rules(self) -> str:
        """What the VAE does otherwise, as a text for the keys of cached latents; '' for nothing."""
        return "".join(f", {name}" for name in ("tiling", "slicing") if getattr(self, f"vae_{name}"))
