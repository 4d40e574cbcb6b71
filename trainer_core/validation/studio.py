"""A model loaded to draw with: base and LoRA, text and codec, for pictures outside of a training run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.model import ModelConfig
from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..devices import pick_device
from ..families.contract import Family
from ..files import sha256_text
from ..host import Host, PhaseProgress, PhaseStarted, PreviewReady
from ..lora.inject import set_strength_
from ..lora.read import apply_lora_
from ..problems import UserError
from ..registry import load
from ..shards import Store
from ..text.cache import cache_prompts
from .grid import save_png
from .pictures import Pictures, draw_grids, draw_pictures, prompts_of


class Studio:
    """Loads each part once. Draw inside torch.no_grad().

    Args:
        lora: put on the model, to be drawn with at any strength; None: the base alone.
        prompts: every prompt that will be drawn, negative ones included.
    Raises:
        UserError: what is wrong with the model's files, before anything is loaded.
    """

    def __init__(self, model: ModelConfig, lora: TrainedLora | None, prompts: Sequence[str], host: Host):
        self.family: Family = load("family", model.family)()
        problems = self.family.problems(model)
        if problems:
            raise UserError(problems)
        self.host = host
        device = pick_device(host.device)
        host.free_memory()
        self.text = cache_prompts(
            prompts, self.family.identity(model, "text_encoder"),
            lambda: self.family.load_text_encoder(model, device), Store(host.paths.cache / "text"), host,
        )  # fmt: skip
        gc.collect()
        quantizer = load("quantization", model.quantization.level)()
        transformer = quantizer.quantize_(self.family.load_transformer(model), self.family.full_precision)
        self.transformer = transformer.to(device)
        if lora:
            apply_lora_(self.transformer, Path(lora.path), 1.0)
        self.codec = self.family.load_codec(model, device)

    def draw(self, settings: ValidationConfig, strength: float, on_picture: Callable[[], None]) -> Pictures:
        set_strength_(self.transformer, strength)
        return draw_pictures(
            settings, self.family, self.transformer, self.codec, self.text, on_picture, self.host.check_cancelled
        )


class Counter:
    """Progress of pictures to the host."""

    def __init__(self, host: Host, total: int):
        self.host, self.total, self.done = host, total, 0
        host.emit(PhaseStarted("validate", total, "pictures"))

    def __call__(self) -> None:
        self.done += 1
        self.host.emit(PhaseProgress("validate", self.done, self.total))


def draw(settings: ValidationConfig, model: ModelConfig, lora: TrainedLora | None, host: Host) -> list[Tensor]:
    """The base and each strength of the LoRA, in grids that are saved under output/chroma_trainer/validation.

    Returns:
        One (1, H, W, 3) fp32 tensor in [0, 1] a size: the labelled grid, as ComfyUI's IMAGE.
    """
    # ComfyUI runs nodes in inference mode; its tensors could not be trained with afterwards.
    with torch.inference_mode(False), torch.no_grad():
        studio = Studio(model, lora, prompts_of(settings), host)
        strengths = [0.0, *(settings.strengths() if lora else [])]
        count = Counter(host, len(strengths) * len(settings.sizes()) * len(settings.library()))
        columns = [(f"LoRA {s:g}" if s else "base", studio.draw(settings, s, count)) for s in strengths]
    name = lora.name.rsplit(".", 1)[0] if lora else f"{model.family}-{model.flavour}"
    images = []
    for (width, height), grid in draw_grids(columns, settings, name).items():
        key = sha256_text(repr(settings), name)[:8]
        path = host.paths.output / "chroma_trainer" / "validation" / f"{name}-{width}x{height}-{key}.png"
        save_png(grid, path, prompt=host.prompt)
        host.emit(PreviewReady(-1, path))
        images.append(torch.from_numpy(np.asarray(grid, dtype=np.float32) / 255)[None])
    return images
