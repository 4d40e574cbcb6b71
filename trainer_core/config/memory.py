"""Memory and speed settings: the widgets of MemorySettings.

They do not change the result of the training, except for the last bits of floating-point values: of latents with VAE
tiling or slicing, and of everything with compiled blocks or another attention kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..spec import Advanced, Choice, Doc, Range

NUMERIC = ("vae_tiling", "vae_slicing", "compile", "attention")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Settings that trade memory for time.

    problems() checks them against each other; setup/preflight.py checks them against the rest of the request.
    """

    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("offload_share",),)

    checkpointing_interval: Annotated[
        int,
        Range(1, 64),
        Doc("With gradient_checkpointing: recompute every n-th block. 1: all blocks, which takes the least memory."),
    ] = 1
    mode: Annotated[
        str,
        Choice("manual", "auto"),
        Doc(
            "auto: choose the fastest checkpointing interval and offloads that fit the free memory of the device. "
            "manual: use the settings of this node."
        ),
    ] = "manual"
    group_offload: Annotated[
        str,
        Choice("none", "block", "leaf"),
        Doc(
            "Keep the base model's weights in RAM and copy them to the device in groups when they are needed. block: "
            "one or more blocks. leaf: single layers, which takes the least memory and is the slowest."
        ),
    ] = "none"
    blocks_per_group: Annotated[
        int, Range(1, 64), Doc("With group_offload block: number of blocks that are copied to the device together.")
    ] = 1
    offload_stream: Annotated[
        bool,
        Doc(
            "With group_offload on CUDA: copy the next group while the current one computes. Takes device memory for "
            "two groups, and pins the weights in RAM. Switched off on other devices."
        ),
    ] = False
    offload_to_disk: Annotated[
        bool,
        Advanced(),
        Doc("With group_offload: keep the weights in a cache file instead of RAM. For little RAM and a fast disk."),
    ] = False
    activation_offload: Annotated[
        bool, Doc("Store the activations for the backward pass in RAM instead of on the device.")
    ] = False
    model_offload: Annotated[
        bool,
        Doc("Move the transformer off the device while the VAE decodes validation images, and the VAE afterwards."),
    ] = False
    text_encoder: Annotated[
        str,
        Choice("device", "blocks", "cpu"),
        Doc(
            "Where captions and prompts are encoded, once. device: on the device (T5-XXL takes 9.6 GB in bf16). "
            "blocks: on the device, block by block (1 GB). cpu: on the CPU."
        ),
    ] = "device"
    vae_tiling: Annotated[
        bool,
        Doc("Run the VAE in tiles: less memory from 1024 px up, with faint differences at the seams of the tiles."),
    ] = False
    vae_slicing: Annotated[
        bool, Doc("Encode one image at a time with the VAE, instead of batches of small images.")
    ] = False
    compile: Annotated[
        bool,
        Doc(
            "Compile the transformer's blocks with torch.compile: the first steps take a minute or more, later steps "
            "are faster. Skipped with a notice if no compiler is installed."
        ),
    ] = False
    attention: Annotated[
        str,
        Choice("native", "flash", "cudnn", "efficient", "math"),
        Advanced(),
        Doc(
            "Attention kernel. native: the first of flash, efficient, cudnn and math that gives correct outputs and "
            "gradients on this device. Any other choice is an error if the kernel is not correct on this device."
        ),
    ] = "native"
    offload_share: Annotated[
        float,
        Range(0, 1, 0.01),
        Advanced(),
        Doc(
            "With group_offload: share of the blocks whose weights are offloaded, spread evenly over the model. The "
            "other blocks stay on the device, which is faster. 1: all blocks."
        ),
    ] = 1.0

    def problems(self) -> list[Problem]:
        """Return the contradictions between these settings."""
        problems: list[Problem] = []
        if self.group_offload == "none":
            problems += [
                Problem(name, "has no effect while group_offload is none; choose block or leaf, or turn it off")
                for name in ("offload_stream", "offload_to_disk", "offload_share")
                if getattr(self, name) != getattr(MemoryConfig, name)
            ]
        elif self.model_offload:
            problems.append(
                Problem(
                    "model_offload",
                    f"and group_offload {self.group_offload} exclude each other: the base model's weights are off the "
                    "device already; turn one off",
                )
            )
        if self.group_offload != "none" and not self.offload_share:
            text = "is 0, so no block is offloaded; use a share above 0, or group_offload none"
            problems.append(Problem("offload_share", text))
        if self.offload_stream and self.offload_to_disk:
            problems.append(
                Problem(
                    "offload_to_disk",
                    "and offload_stream exclude each other: offload_stream needs weights pinned in RAM; turn one off",
                )
            )
        if self.group_offload == "leaf" and self.blocks_per_group > 1:
            problems.append(
                Problem(
                    "blocks_per_group",
                    f"is {self.blocks_per_group}, but group_offload leaf moves single layers; use 1, or group_offload "
                    "block",
                )
            )
        if self.compile and (self.group_offload != "none" or self.activation_offload):
            name = "group_offload" if self.group_offload != "none" else "activation_offload"
            problems.append(
                Problem("compile", f"and {name} exclude each other: tensors move within a compiled block; turn one off")
            )
        if self.mode == "auto" and (self.group_offload != "none" or self.activation_offload):
            name = "group_offload" if self.group_offload != "none" else "activation_offload"
            problems.append(Problem("mode", f"auto chooses {name} itself; use manual, or reset {name} to its default"))
        return problems

    @property
    def moves(self) -> bool:
        """Whether weights or activations are moved off the device during a step."""
        return self.group_offload != "none" or self.activation_offload

    def offloaded_blocks(self, num_blocks: int) -> list[int]:
        """Return the indices of the blocks whose weights are offloaded.

        They are spread evenly, so that a group is copied while the blocks before it compute.

        Args:
            num_blocks: number of blocks of the model.
        """
        if self.group_offload == "none":
            return []
        count = math.ceil(num_blocks * self.offload_share - 1e-9)  # 0.07 * 100 is 7.000000000000001
        return [i * num_blocks // count for i in range(count)]

    def numeric_rules(self) -> dict[str, object]:
        """Return the non-default settings that change the last bits of a run: they are part of the run's identity."""
        return {name: getattr(self, name) for name in NUMERIC if getattr(self, name) != getattr(MemoryConfig, name)}

    def vae_rules(self) -> str:
        """Return the VAE settings as a suffix for the keys of cached latents; "" for the defaults."""
        return "".join(f", {name}" for name in ("tiling", "slicing") if getattr(self, f"vae_{name}"))
