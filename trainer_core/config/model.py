"""Which model is trained, as a small value that travels on sockets. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base is stored. level: a name of registry.PARTS["quantization"]."""

    level: str = "none"


@dataclass(frozen=True)
class ModelConfig:
    """A base model: where its three parts come from and the precision it is loaded in.

    Args:
        family: a name of registry.PARTS["family"].
        flavour: the family's own name of the variant, such as "hd"; recorded in the LoRA.
        repo: hub id or local diffusers folder (absolute path) that gives every part not named below.
        transformer_file, text_encoder_file, vae_file: single .safetensors files (absolute paths), "" for the repo's own.
        dtype: "bf16", "fp16" or "fp32".
    """

    family: str
    flavour: str
    repo: str
    transformer_file: str = ""
    text_encoder_file: str = ""
    vae_file: str = ""
    dtype: str = "bf16"
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
