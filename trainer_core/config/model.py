"""Choice of the base model, as a small value that nodes pass on. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, Range
from .flux import ASSISTANT_FILE, ASSISTANT_REPO, ASSISTED, FLAVOURS, FOLDERS, FluxOptions

LEVELS = names("quantization")
AUTO = "auto"  # only for the base model: the planner chooses the level
T5_TOKENS = 512  # of Chroma's texts; as in models/text/t5.py, which imports torch
PRODUCTS = ("exact", *names("products"))
CHROMA_REPOS = {
    "hd": "lodestones/Chroma1-HD",
    "base": "lodestones/Chroma1-Base",
    "flash": "lodestones/Chroma1-Flash",
}  # flavour -> Hugging Face repository in diffusers format
RADIANCE_REPO = "lodestones/Chroma1-Radiance"  # single files


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantization of the frozen base model and the text encoder: the widgets of QuantizeModel."""

    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("products",),)
    KEY: ClassVar[tuple[str, ...]] = (
        "QuantizationConfig",
        "level",
        "quantize_via",
        "text_encoder",
        "cached_bases",
        "products",
    )

    level: Annotated[
        str,
        Choice(*LEVELS, AUTO),
        Doc(
            "Storage format of the base model's weights, with memory relative to bf16 and relative output error. none: "
            "as loaded. int8 (0.5, 0.4 %): start here. fp8 (0.5, 1.5 %). int4-quanto (0.28, 5.6 %) and nf4-bnb (0.26, "
            "5.6 %): if int8 does not fit. int2 (0.16, 29 %): last resort. auto: the first of none, int8-quanto and "
            "int4-quanto with which the training fits into the memory of this machine. bnb and torchao levels need "
            "their packages. Embedders, norms, the approximator and the final projection are never quantized. See "
            "docs/quantization.md."
        ),
    ] = "none"
    quantize_via: Annotated[
        str,
        Choice("accelerator", "cpu"),
        Doc(
            "Where the weights are quantized, layer by layer. accelerator: fast, needs device memory for one layer. "
            "cpu: needs no device memory."
        ),
    ] = "accelerator"
    text_encoder: Annotated[
        str,
        Choice(*LEVELS),
        Doc(
            "Storage format of the text encoder's weights. The text encoder only encodes captions and prompts, once. "
            "none: the model's precision."
        ),
    ] = "none"
    cached_bases: Annotated[
        int,
        Range(0, 16),
        Advanced(),
        Doc(
            "Number of quantized base models to keep in the cache folder (the most recently used ones). A run whose "
            "model is cached does not load the full weights. Each takes as much disk space as its weights take memory. "
            "0: none."
        ),
    ] = 2
    products: Annotated[
        str,
        Choice(*PRODUCTS),
        Advanced(),
        Doc(
            "Matrix multiplication with the quantized base model in training. exact: dequantize the weights first. "
            "int8, fp8: also round activations and gradients to 8 bits, per token; for levels of the same name; fp8 "
            "needs an RTX 40 or newer. For GPUs; not faster on CPUs (docs/quantization.md)."
        ),
    ] = "exact"

    def problems(self) -> list[Problem]:
        """Return a problem if the level can't be used with these products."""
        if self.products == "exact" or self.level.startswith(f"{self.products}-"):
            return []
        if self.level == AUTO:
            return [
                Problem(
                    "products",
                    f"{self.products} needs a level that stores {self.products} weights, and level auto may choose "
                    "another; choose a level, or use exact",
                )
            ]
        fitting = ", ".join(level for level in LEVELS if level.startswith(f"{self.products}-"))
        return [
            Problem(
                "products",
                f"{self.products} needs a level that stores {self.products} weights ({fitting}), but level is "
                f"{self.level}; choose one of those, or exact",
            )
        ]


@dataclass(frozen=True)
class ModelConfig:
    """A base model: where its parts come from, and the precision it is loaded in.

    Args:
        family: a name in registry.PARTS["family"].
        flavour: the variant, such as "hd"; recorded in the LoRA.
        repo: Hugging Face repository or local diffusers folder (absolute path) for every part without a file below.
        transformer_file: single .safetensors file or diffusers folder (absolute path), or Hugging Face repository, of
            the transformer alone; "" to use the repo.
        text_encoder_file: single .safetensors file (absolute path), "" to use the repo.
        vae_file: single .safetensors file (absolute path), "" to use the repo.
        dtype: "bf16", "fp16" or "fp32".
        quantization: storage format of the base model and the text encoder.
        flux: settings that only Flux has, None for other families. Left out of records where it is None.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("repo", "transformer_file", "text_encoder_file", "vae_file")
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("flux",),)
    KEY: ClassVar[tuple[str, ...]] = (
        "ModelConfig", "family", "flavour", "repo", "transformer_file", "text_encoder_file", "vae_file", "dtype",
        "quantization", "flux",
    )  # fmt: skip

    family: str
    flavour: str
    repo: str
    transformer_file: str = ""
    text_encoder_file: str = ""
    vae_file: str = ""
    dtype: str = "bf16"
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    flux: FluxOptions | None = None

    @property
    def folders(self) -> Mapping[str, str]:
        """Map of part to its folder in a diffusers repository, for parts whose folder has another name."""
        return FOLDERS if self.flux else {}

    @property
    def training_hint(self) -> str:
        """What should be known before the model is trained, "" for nothing."""
        if not self.flux or self.flavour != ASSISTED or self.flux.assistant_file:
            return ""
        return (
            f"{ASSISTED} is trained without its assistant, so it unlearns to sample in four steps; download "
            f"{ASSISTANT_FILE} of huggingface.co/{ASSISTANT_REPO}, put it into models/loras as "
            "flux-schnell-training-adapter.safetensors, and set assistant of LoadFlux to by flavour"
        )

    @property
    def text_tokens(self) -> int:
        """Length to which texts are cut, in tokens of T5 with the end token."""
        return self.flux.max_tokens if self.flux else T5_TOKENS

    @property
    def takes_references(self) -> bool:
        """Whether the model edits reference images."""
        return self.flux is not None and self.flavour in FLAVOURS and FLAVOURS[self.flavour].takes_references
