"""Which model is trained, as a small value that travels on sockets. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, Range
from .flux import FLAVOURS, FOLDERS, FluxOptions

LEVELS = names("quantization")
AUTO = "auto"  # for the base alone: the plan chooses
PRODUCTS = ("exact", *names("products"))
CHROMA_REPOS = {
    "hd": "lodestones/Chroma1-HD",
    "base": "lodestones/Chroma1-Base",
    "flash": "lodestones/Chroma1-Flash",
}  # flavour -> hub id of its diffusers folder


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base and the text encoder are stored: the widgets of QuantizeModel."""

    LATER: ClassVar = (("products",),)

    level: Annotated[
        str,
        Choice(*LEVELS, AUTO),
        Doc(
            "How the base's weights are kept; memory as a share of bf16's, error of the output (docs/quantization.md). none: as loaded. int8 (0.5, 0.4 %): "
            "start here. fp8 (0.5, 1.5 %). int4-quanto (0.28, 5.6 %) and nf4-bnb (0.26, 5.6 %): where int8 does not fit. int2 (0.16, 29 %): last resort. "
            "bnb and torchao need their packages. auto: the first of none, int8-quanto and int4-quanto with which the training fits this machine's memory. Embedders, norms, the approximator and the final projection are never quantised."
        ),
    ] = "none"
    quantize_via: Annotated[
        str,
        Choice("accelerator", "cpu"),
        Doc(
            "Where weights are quantised, layer by layer. accelerator: fast, needs room for one layer there. cpu: needs none."
        ),
    ] = "accelerator"
    text_encoder: Annotated[
        str,
        Choice(*LEVELS),
        Doc(
            "The same for the text encoder, which only encodes captions and prompts once. none: in the model's precision."
        ),
    ] = "none"
    cached_bases: Annotated[
        int,
        Range(0, 16),
        Advanced(),
        Doc(
            "Quantised bases kept in the cache folder, those used last; a start that finds its own skips the full weights. "
            "Each takes as much disk as its weights take memory. 0: none."
        ),
    ] = 2
    products: Annotated[
        str,
        Choice(*PRODUCTS),
        Advanced(),
        Doc(
            "How training multiplies with the quantised base. exact: weights are decoded. int8, fp8: activations and gradients are rounded to 8 bits too, "
            "token by token; for levels of that name; fp8 needs an RTX 40 or newer. Meant for GPUs; no faster on CPUs (docs/quantization.md)."
        ),
    ] = "exact"

    def problems(self) -> list[Problem]:
        if self.products == "exact" or self.level.startswith(f"{self.products}-"):
            return []
        if self.level == AUTO:
            return [
                Problem(
                    "products",
                    f"{self.products} needs a level that stores such numbers, and level auto may choose another; name the level, or use exact",
                )
            ]
        fitting = ", ".join(level for level in LEVELS if level.startswith(f"{self.products}-"))
        return [
            Problem(
                "products",
                f"{self.products} needs a level that stores such numbers ({fitting}), and level is {self.level}; choose one of those, or exact",
            )
        ]


@dataclass(frozen=True)
class ModelConfig:
    """A base model: where its three parts come from and the precision it is loaded in.

    Args:
        family: a name of registry.PARTS["family"].
        flavour: the family's own name of the variant, such as "hd"; recorded in the LoRA.
        repo: hub id or local diffusers folder (absolute path) that gives every part not named below.
        transformer_file, text_encoder_file, vae_file: single .safetensors files (absolute paths), "" for the repo's own.
        dtype: "bf16", "fp16" or "fp32".
        flux: what only a Flux has, None for other families. Left out of records where it is None.
    """

    PATHS: ClassVar = ("repo", "transformer_file", "text_encoder_file", "vae_file")
    LATER: ClassVar = (("flux",),)

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
        """Part -> its folder in a diffusers repository, where that is not the part's own name."""
        return FOLDERS if self.flux else {}

    @property
    def takes_references(self) -> bool:
        """Whether it makes pictures out of others."""
        return self.flux is not None and self.flavour in FLAVOURS and FLAVOURS[self.flavour].takes_references
