"""Adapter settings: the widgets of AdapterSettings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, ModelFile, Range, Text

NO_LORA = "none"
NEW_OPTIMIZER, CONTINUED = "new", "continue"
FORMATS = ("universal", "comfyui", "kohya")
FULL = "full"  # the kind that trains the model's own weights (docs/full-rank.md)


@dataclass(frozen=True)
class KindRule:
    """What a kind of adapter supports.

    Args:
        inits: values of TrainingConfig.init.
        formats: file formats.
    """

    inits: tuple[str, ...]
    formats: tuple[str, ...] = FORMATS


LORA_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")
KIND_RULES = {
    "lora": KindRule(LORA_INITS),
    "rslora": KindRule(LORA_INITS),
    "dora": KindRule(LORA_INITS[:-1]),
    # A Kronecker product has no rows to stack into the fused weights of the other formats.
    "lokr": KindRule(("default", "gaussian"), ("universal",)),
    "loha": KindRule(("default",)),
    # Rotations of several layers do not make one of the fused weight.
    "oft": KindRule(("default",), ("universal",)),
}


@dataclass(frozen=True)
class BlockRule:
    """A learning rate factor for some blocks.

    Args:
        text: the rule as written.
        patterns: patterns of module names; a rule applies to all modules below a match.
        factor: learning rate multiplier.
    """

    text: str
    patterns: tuple[str, ...]
    factor: float

    def matches(self, name: str) -> bool:
        """Return whether the rule applies to the module of this name."""
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in self.patterns)


def block_rules(text: str) -> list[BlockRule]:
    """Parse rules such as `transformer_blocks.0-3=0; single_transformer_blocks.*=0.5`, in order.

    Raises:
        ValueError: a rule is invalid; the message says which and why.
    """
    rules = []
    for rule in filter(None, (part.strip() for part in re.split(r"[;\n]", text))):
        pattern, equals, factor = (part.strip() for part in rule.partition("="))
        if not pattern or not equals or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", factor):
            raise ValueError(f"{rule!r} is not a valid rule; write for example transformer_blocks.0-3=0.5")
        if not float(factor) <= 100:
            raise ValueError(f"{rule!r} has the factor {factor}, which is out of range; use 0 to 100")
        span = re.search(r"\.(\d+)-(\d+)(?=\.|$)", pattern)
        if span is None:
            patterns = [pattern]
        else:
            first, last = int(span[1]), int(span[2])
            if first > last or last > 9999:
                raise ValueError(
                    f"{rule!r} has the range {first} to {last}; write the smaller number first, and at most 9999"
                )
            patterns = [f"{pattern[: span.start()]}.{i}{pattern[span.end() :]}" for i in range(first, last + 1)]
        rules.append(BlockRule(rule, tuple(patterns), float(factor)))
    return rules


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of the adapter. Rank, alpha, targets and init are widgets of LoRATrainer."""

    PATHS: ClassVar[tuple[str, ...]] = ("init_lora", "init_optimizer")
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("precision",), ("extract_rank",), ("init_optimizer",))
    KEY: ClassVar[tuple[str, ...]] = (
        "AdapterConfig", "kind", "format", "init_lora", "dropout", "block_lr", "ema_decay", "lokr_factor",
        "lokr_decompose_both", "svd_iterations", "eva_batches", "precision",
    )  # fmt: skip

    kind: Annotated[
        str,
        Choice(*names("adapter"), *names("weights")),
        Doc(
            "Adapter type. lora: W + alpha / rank B A. rslora: scaled by alpha / sqrt(rank), for high ranks. dora: "
            "trains direction and magnitude of each row separately. lokr: Kronecker product, high rank in a small "
            "file. loha: elementwise product of two LoRAs. oft: rotation of the output in blocks of rank rows; alpha "
            "has no effect. docs/lora-files.md lists which programs load which type. full: no adapter; trains the "
            "model's own weights and saves a whole model in output/diffusion_models (docs/full-rank.md)."
        ),
    ] = "lora"
    format: Annotated[
        str,
        Choice(*FORMATS),
        Doc(
            "Key names in the LoRA file. universal: diffusers names, for ComfyUI, diffusers and peft. comfyui: "
            "original fused names, diffusion_model.*. kohya: lora_unet_* with an alpha. lokr and oft support "
            "only universal. Running a finished run again with another format only rewrites the file."
        ),
    ] = "universal"
    init_lora: Annotated[
        str,
        ModelFile("loras", NO_LORA),
        Doc(
            "LoRA file in models/loras or output/loras to continue training from, in any of the formats. It must "
            "have the same kind and at most the same rank, and every key must match a layer that is trained. dora "
            "also accepts a lora file."
        ),
    ] = NO_LORA
    dropout: Annotated[
        float,
        Range(0.0, 0.95, 0.01),
        Doc(
            "Dropout: probability of zeroing an element of the adapter's input in training, against overfitting. 0: "
            "off. 0.05 to 0.1 is usual."
        ),
    ] = 0.0
    block_lr: Annotated[
        str,
        Text(placeholder="all alike"),
        Doc(
            "Learning rate multipliers per block, such as transformer_blocks.0-3=0; single_transformer_blocks.*=0.5. "
            "The last matching rule applies. 0: do not train the block."
        ),
    ] = ""
    ema_decay: Annotated[
        float,
        Range(0.0, 0.99999, 0.00001),
        Doc(
            "Exponential moving average (EMA) of the weights, over about 1 / (1 - this) steps. The LoRA file and the "
            "validation images use the average instead of the last weights. 0: off. 0.99 suits 1000 steps."
        ),
    ] = 0.0
    lokr_factor: Annotated[
        int,
        Range(-1, 4096),
        Advanced(),
        Doc(
            "lokr: size of the first matrix, as far as it divides the size of the layer. -1: as balanced as possible, "
            "which gives the smallest file."
        ),
    ] = -1
    lokr_decompose_both: Annotated[
        bool,
        Advanced(),
        Doc("lokr: also factorize the first matrix into two low-rank matrices, if rank is less than half its size."),
    ] = False
    svd_iterations: Annotated[
        int,
        Range(0, 64),
        Advanced(),
        Doc(
            "For init pissa and loftq: iterations of the randomized SVD. 0: exact SVD, which takes minutes for a large "
            "layer."
        ),
    ] = 8
    eva_batches: Annotated[
        int,
        Range(1, 1000),
        Advanced(),
        Doc("For init eva: batches of training data whose activations are analyzed before the training."),
    ] = 8
    precision: Annotated[
        str,
        Choice("fp32", "bf16", "fp16"),
        Doc(
            "Precision of the LoRA file. fp32: the exact trained weights. bf16, fp16: half the size; each weight is "
            "rounded by up to 0.4 % and 0.05 %. Checkpoints stay in fp32."
        ),
    ] = "fp32"
    extract_rank: Annotated[
        int,
        Range(0, 1024),
        Advanced(),
        Doc(
            "kind full: rank of a LoRA that is saved beside the trained model and holds its difference to the base "
            "model, approximated by an SVD of each layer. The log says the error. 0: no LoRA."
        ),
    ] = 0
    init_optimizer: Annotated[
        str,
        Choice(NEW_OPTIMIZER, CONTINUED),
        Advanced(),
        Doc(
            "For init_lora. new: start with a new optimizer. continue: go on where the file's run ended, with the exact "
            "weights and the optimizer state of its checkpoint, and the batches that come next. Needs that run's folder, "
            "and the same kind, rank, alpha, targets and optimizer. Dataset, learning rate and schedule may differ."
        ),
    ] = NEW_OPTIMIZER

    @property
    def checkpoint(self) -> str:
        """Path of the checkpoint whose optimizer state the run starts with, "" for none."""
        return "" if self.init_optimizer in (NEW_OPTIMIZER, CONTINUED) else self.init_optimizer

    @property
    def is_full(self) -> bool:
        """Whether the model's own weights are trained, and not an adapter."""
        return self.kind == FULL

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        problems = []
        if self.init_optimizer == CONTINUED and self.init_lora == NO_LORA:
            text = f"is {CONTINUED}, but init_lora names no file whose run could be continued; choose one, or use new"
            problems.append(Problem("init_optimizer", text))
        try:
            block_rules(self.block_lr)
        except ValueError as error:
            problems.append(Problem("block_lr", str(error)))
        if self.lokr_factor == 0:
            problems.append(
                Problem("lokr_factor", "is 0; use -1 for as balanced as possible, or the size of the first matrix")
            )
        return problems
