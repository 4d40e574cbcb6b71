"""The folder that the trainer loads: diffusers' layout, fp16, with card and log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .base import CONFIG, Nano
from .text import save_tokenizer

LIMIT_BYTES = 12_000_000


def publish(nano: Nano, vae: AutoencoderKL, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Writes every part; returns bytes of weights by part."""
    transformer = ChromaTransformer2DModel(**CONFIG)
    transformer.load_state_dict(nano.transformer.state_dict())
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    nano.text_encoder.save_pretrained(folder / "text_encoder")
    files = {
        "transformer": folder / "transformer" / "diffusion_pytorch_model.safetensors",
        "vae": folder / "vae" / "diffusion_pytorch_model.safetensors",
        "text_encoder": folder / "text_encoder" / "model.safetensors",
    }
    for file in files.values():
        save_file({k: v.to(torch.float16).contiguous() for k, v in load_file(file).items()}, file, {"format": "pt"})
    _drop(folder / "transformer" / "config.json", "_name_or_path")
    _drop(folder / "vae" / "config.json", "_name_or_path")
    save_tokenizer(tokenizer, folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "ChromaPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ChromaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    assert sum(sizes.values()) <= LIMIT_BYTES, sizes
    return sizes


def _drop(file: Path, key: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop(key, None)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
