"""Validation pictures: every prompt at every size, with a live model or with a LoRA from disk, in one labelled grid a size."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..devices import pick_device
from ..families.contract import Family, ImageCodec
from ..files import sha256_text
from ..host import Host, PhaseProgress, PhaseStarted, PreviewReady
from ..lora.inject import set_strength_
from ..lora.read import apply_lora_
from ..registry import load
from ..shards import Store
from ..text.cache import cache_prompts
from .grid import draw_grid, save_png
from .sampler import sample

Size = tuple[int, int]
Pictures = dict[
    Size, list[np.ndarray]
]  # (width, height) -> one (H, W, 3) uint8 picture a prompt, in the library's order


class Embeddings(Protocol):
    """Where prompts' embeddings come from: a text cache."""

    def get(self, prompt: str) -> Tensor: ...


def prompts_of(settings: ValidationConfig) -> list[str]:
    """Every prompt whose embedding is needed."""
    negative = [settings.negative_prompt] if settings.cfg > 1 else []
    return [*settings.library().values(), *negative]


def draw_pictures(
    settings: ValidationConfig,
    family: Family,
    transformer: nn.Module,
    codec: ImageCodec,
    text: Embeddings,
    on_picture: Callable[[], None] = lambda: None,
    on_step: Callable[[], None] = lambda: None,
) -> Pictures:
    """Sample and decode. on_step is called after every sampling step and may raise to end it; on_picture after every picture."""
    device = next(transformer.parameters()).device
    negative = text.get(settings.negative_prompt).to(device) if settings.cfg > 1 else None
    pictures: Pictures = {}
    for width, height in settings.sizes():
        for prompt in settings.library().values():
            latents = sample(
                family, transformer, text.get(prompt).to(device), negative,
                width=width, height=height, steps=settings.steps, cfg=settings.cfg, seed=settings.seed,
                channels=codec.channels, factor=codec.factor, scheduler=settings.scheduler, shift=settings.shift,
                on_step=lambda *_: on_step(),
            )  # fmt: skip
            pictures.setdefault((width, height), []).append(pixels_of(codec.decode(latents))[0])
            on_picture()
    return pictures


def pixels_of(decoded: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_grids(columns: Sequence[tuple[str, Pictures]], settings: ValidationConfig, title: str) -> dict[Size, Image.Image]:
    """One PIL image a size: a row a prompt, a column a model."""
    labels = list(settings.library())
    names = [name for name, _ in columns]
    return {
        size: draw_grid(
            [[pictures[size][row] for _, pictures in columns] for row in range(len(labels))], labels, names, title
        )
        for size in columns[0][1]
    }


def draw(settings: ValidationConfig, model: ModelConfig, lora: TrainedLora | None, host: Host) -> list[Tensor]:
    """Load the model, draw the base and each strength of the LoRA, save the grids under output/chroma_trainer/validation.

    Returns: one (1, H, W, 3) fp32 tensor in [0, 1] a size: the labelled grid, as ComfyUI's IMAGE.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _draw(settings, model, lora, host)


def _draw(settings: ValidationConfig, model: ModelConfig, lora: TrainedLora | None, host: Host) -> list[Tensor]:
    family: Family = load("family", model.family)()
    device = pick_device(host.device)
    host.free_memory()
    text = cache_prompts(
        prompts_of(settings), family.identity(model, "text_encoder"),
        lambda: family.load_text_encoder(model, device), Store(host.paths.cache / "text"), host,
    )  # fmt: skip
    gc.collect()
    transformer = family.load_transformer(model)
    transformer = (
        load("quantization", model.quantization.level)().quantize_(transformer, family.full_precision).to(device)
    )
    if lora:
        apply_lora_(transformer, Path(lora.path), 1.0)
    codec = family.load_codec(model, device)
    strengths = settings.strengths() if lora else []
    total = (1 + len(strengths)) * len(settings.sizes()) * len(settings.library())
    host.emit(PhaseStarted("validate", total, "pictures"))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        host.emit(PhaseProgress("validate", done, total))

    columns = []
    for strength in [0.0, *strengths]:
        set_strength_(transformer, strength)
        name = f"LoRA {strength:g}" if strength else "base"
        columns.append((name, draw_pictures(settings, family, transformer, codec, text, count, host.check_cancelled)))
    name = lora.name.rsplit(".", 1)[0] if lora else f"{model.family}-{model.flavour}"
    return _save(draw_grids(columns, settings, name), settings, name, host)


def _save(grids: dict, settings: ValidationConfig, name: str, host: Host) -> list[Tensor]:
    folder = host.paths.output / "chroma_trainer" / "validation"
    images = []
    for (width, height), grid in grids.items():
        key = sha256_text(repr(settings), name)[:8]
        path = folder / f"{name}-{width}x{height}-{key}.png"
        save_png(grid, path, prompt=host.prompt)
        host.emit(PreviewReady(-1, path))
        images.append(torch.from_numpy(np.asarray(grid, dtype=np.float32) / 255)[None])
    return images
