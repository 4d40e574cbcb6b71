"""What kind of adapter is trained: the widgets of AdapterSettings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, ModelFile, Range, Text

NO_LORA = "none"
FORMATS = ("universal", "comfyui", "kohya")


@dataclass(frozen=True)
class KindRule:
    """What goes with a kind of adapter: starts (TrainingConfig.init) and formats of its file."""

    inits: tuple[str, ...]
    formats: tuple[str, ...] = FORMATS


LORA_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")
KIND_RULES = {
    "lora": KindRule(LORA_INITS),
    "rslora": KindRule(LORA_INITS),
    "dora": KindRule(LORA_INITS[:-1]),
    # A Kronecker product has no rows that could be stacked to the fused weights of the other formats.
    "lokr": KindRule(("default", "gaussian"), ("universal",)),
    "loha": KindRule(("default",)),
}


@dataclass(frozen=True)
class BlockRule:
    """text: as it was written; patterns: of module names, whose whole subtree is meant; factor: of the learning rate."""

    text: str
    patterns: tuple[str, ...]
    factor: float


def block_rules(text: str) -> list[BlockRule]:
    """Rules such as `transformer_blocks.0-3=0; single_transformer_blocks.*=0.5`, in order.

    Raises:
        ValueError: says what is wrong with which rule.
    """
    found = []
    for rule in filter(None, (part.strip() for part in re.split(r"[;\n]", text))):
        pattern, equals, factor = (part.strip() for part in rule.partition("="))
        if not pattern or not equals or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", factor):
            raise ValueError(f"{rule!r} is no rule; write for example transformer_blocks.0-3=0.5")
        if not float(factor) <= 100:
            raise ValueError(f"{rule!r} asks for {factor} times the rate; use 0 to 100")
        span = re.search(r"\.(\d+)-(\d+)(?=\.|$)", pattern)
        if span is None:
            patterns = [pattern]
        else:
            first, last = int(span[1]), int(span[2])
            if first > last or last > 9999:
                raise ValueError(f"{rule!r} goes from {first} to {last}; write the smaller number first")
            patterns = [f"{pattern[: span.start()]}.{i}{pattern[span.end() :]}" for i in range(first, last + 1)]
        found.append(BlockRule(rule, tuple(patterns), float(factor)))
    return found


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter beyond rank, alpha, targets and init, which are the trainer's own widgets."""

    PATHS: ClassVar = ("init_lora",)
    LATER: ClassVar = (("precision",),)

    kind: Annotated[
        str,
        Choice(*names("adapter")),
        Doc(
            "lora: W + alpha / rank B A. rslora: scaled by alpha / sqrt(rank), for high ranks. dora: direction and length of each row learn apart. "
            "lokr: a Kronecker product, small files of high rank. loha: an elementwise product of two LoRAs. docs/lora-files.md says who can load which."
        ),
    ] = "lora"
    format: Annotated[
        str,
        Choice(*FORMATS),
        Doc(
            "Names in the file. universal: diffusers' names, loads in ComfyUI, diffusers and peft. comfyui: the original fused names, diffusion_model.*. "
            "kohya: lora_unet_* with an alpha. lokr is written as universal only. A finished run that is started again with another format only writes the file anew."
        ),
    ] = "universal"
    init_lora: Annotated[
        str,
        ModelFile("loras", NO_LORA),
        Doc(
            "Go on from this file of models/loras or output/loras, in any of the formats. It must be of the same kind and of at most this rank, and every key must fit a layer that is trained. dora also takes a LoRA."
        ),
    ] = NO_LORA
    dropout: Annotated[
        float,
        Range(0.0, 0.95, 0.01),
        Doc(
            "Share of the adapter's inputs that are zeroed while training, against learning by heart. 0: none; 0.05 to 0.1 is usual."
        ),
    ] = 0.0
    block_lr: Annotated[
        str,
        Text(placeholder="all alike"),
        Doc(
            "Factors of the learning rate by block, such as transformer_blocks.0-3=0; single_transformer_blocks.*=0.5. The last rule that fits counts; 0 leaves the block out of training."
        ),
    ] = ""
    ema_decay: Annotated[
        float,
        Range(0.0, 0.99999, 0.00001),
        Doc(
            "Save and draw an average over about 1 / (1 - this) steps in place of the last weights. 0: off; 0.99 suits 1000 steps."
        ),
    ] = 0.0
    lokr_factor: Annotated[
        int,
        Range(-1, 4096),
        Advanced(),
        Doc(
            "lokr: edge of the first matrix, as far as it divides the layer's. -1: both matrices as square as they go, the smallest file."
        ),
    ] = -1
    lokr_decompose_both: Annotated[
        bool,
        Advanced(),
        Doc("lokr: the first matrix is a product of two thin ones as well, where rank is less than half its edge."),
    ] = False
    svd_iterations: Annotated[
        int,
        Range(0, 64),
        Advanced(),
        Doc(
            "init pissa and loftq: iterations of the randomised SVD; 0: an exact one, which takes minutes for a large layer."
        ),
    ] = 8
    eva_batches: Annotated[
        int,
        Range(1, 1000),
        Advanced(),
        Doc("init eva: batches of the run's own data whose activations are looked at before the training."),
    ] = 8
    precision: Annotated[
        str,
        Choice("fp32", "bf16", "fp16"),
        Doc(
            "Precision of the LoRA's file. fp32: exactly what was trained. bf16, fp16: half the size, each weight rounded by up to 0.4 % and 0.05 %. Checkpoints stay in fp32."
        ),
    ] = "fp32"

    def problems(self) -> list[Problem]:
        found = []
        try:
            block_rules(self.block_lr)
        except ValueError as fault:
            found.append(Problem("block_lr", str(fault)))
        if self.lokr_factor == 0:
            found.append(
                Problem("lokr_factor", "is 0; use -1 for as square as it goes, or the edge of the first matrix")
            )
        return found
