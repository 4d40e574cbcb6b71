"""Load a model for sampling (base, LoRA, text embeddings, VAE) and sample images outside of a training run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.files.load import apply_lora_
from ..adapters.inject import remove_, set_strength_
from ..config.model import ModelConfig
from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..data.cache.prompts import cache_prompts
from ..devices import DTYPES, empty_cache, pick_device
from ..errors import UserError
from ..host import Host, Notice, PhaseProgress, PhaseStarted, PreviewReady
from ..models.family import Family
from ..models.loading.fingerprint import remembering
from ..plots.image_grid import save_png
from ..quant.levels import with_level_to_draw
from ..quant.loading import interruptible, load_base, quantization_problems, text_converter, text_identity
from ..registry import load
from ..runs.layout import PREVIEW, VALIDATION, runs_folder
from ..runs.portable import portable
from ..storage.atomic import sha256_text
from ..storage.stored_names import key_text
from ..storage.tensor_store import Store
from .attention import drawing_problems
from .comparison import Drawn, Version, grids_of, singles_of, versions_of
from .previews import preview_of
from .sample_images import Pictures, draw_pictures, prompts_of
from .scores.clip_scorer import ClipScorer, make_scorer
from .scores.image_scores import describe_scores


class Renderer:
    """A model loaded for sampling. Each part is loaded once. Call `draw` inside torch.no_grad().

    Args:
        model: The model.
        lora: LoRA to apply; it can be used at any strength. A whole model that was trained takes the base's place.
            None: only the base.
        prompts: Every prompt that will be used, negative prompts included.
        host: The host.
        settings: Sampling settings, checked for what this machine can't run. None: torch's own attention kernels.
    Raises:
        UserError: Problems with the model's files, found before anything is loaded.
    """

    def __init__(
        self,
        model: ModelConfig,
        lora: TrainedLora | None,
        prompts: Sequence[str],
        host: Host,
        settings: ValidationConfig | None = None,
    ):
        self.family: Family = load("family", model.family)()
        self.model, self.device = model, pick_device(host.device)
        device = self.device
        problems = [*self.family.problems(model), *quantization_problems(model.quantization, device)]
        problems += drawing_problems(settings, device, DTYPES.get(model.dtype, torch.float32))
        if problems:
            raise UserError(problems)
        self.host = host
        host.free_memory()
        quantize = text_converter(model.quantization, device, model.text_encoder_file)
        convert = interruptible(quantize, host, device, resident=True)
        with remembering(host):
            identity = text_identity(self.family, model)
        self.text = cache_prompts(
            prompts, identity,
            lambda: self.family.load_text_encoder(model, device, convert),
            Store(host.paths.cache / "text"), host,
        )  # fmt: skip
        gc.collect()
        self.transformer: Any = None
        if not (lora and lora.is_model):
            self._load(model)
        if lora:
            self.put_trained(lora)
        self.codec = self.family.load_codec(model, device)
        path = runs_folder(host.paths.output) / VALIDATION / PREVIEW
        self.preview = preview_of(settings, self.codec, path, host) if settings else None

    def put(self, lora: Path) -> None:
        """Apply this LoRA to the model instead of any other."""
        remove_(self.transformer)
        apply_lora_(self.transformer, lora, 1.0)

    def put_trained(self, lora: TrainedLora) -> None:
        """Apply a LoRA, or load a trained model in the base model's place."""
        (self.put_model if lora.is_model else self.put)(Path(lora.path))

    def put_model(self, file: Path) -> None:
        """Load this trained model in the base model's place. Only one of them is in memory at a time."""
        self._load(replace(self.model, transformer_file=str(file)))

    def _load(self, model: ModelConfig) -> None:
        self.transformer = None
        gc.collect()
        empty_cache(self.device)
        with remembering(self.host):
            self.transformer = load_base(self.family, model, self.host, self.device, resident=True).to(self.device)

    def draw(self, settings: ValidationConfig, strength: float, on_picture: Callable[[], None]) -> Pictures:
        """Sample an image of every prompt at every size with the LoRA at this strength."""
        set_strength_(self.transformer, strength)
        return draw_pictures(
            settings, self.family, self.transformer, self.codec, self.text, on_picture, self.host.check_cancelled,
            preview=self.preview,
        )  # fmt: skip


class Counter:
    """Reports the number of sampled images to the host."""

    def __init__(self, host: Host, total: int):
        self.host, self.total, self.done = host, total, 0
        host.emit(PhaseStarted("validate", total, "images"))

    def __call__(self) -> None:
        self.done += 1
        self.host.emit(PhaseProgress("validate", self.done, self.total))


@dataclass(frozen=True)
class Gallery:
    """The result of `draw`, as ComfyUI IMAGE tensors: fp32 in [0, 1], (1, H, W, 3) each.

    Args:
        grids: Labeled grids, which are also saved.
        pictures: Every image separately.
        labels: The label of each of `pictures`.
    """

    grids: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def draw(settings: ValidationConfig, model: ModelConfig, lora: TrainedLora | None, host: Host) -> Gallery:
    """Sample the base model, and the LoRA at its strengths and checkpoints.

    Saves grids in output/chroma_trainer/validation.

    Args:
        settings: Sampling settings.
        model: The model.
        lora: The LoRA; None: only the base.
        host: The host.
    Returns:
        Grids and single images.
    Raises:
        UserError: Problems with the model's files, the LoRA or the selected checkpoints.
    """
    family: Family = load("family", model.family)()
    settings = family.resolve_sampling(model, settings)
    if settings.reference and not family.takes_references(model):
        raise UserError.at(
            "reference", f"is set, but {model.family} {model.flavour} takes no reference image; leave it empty"
        )
    if warning := family.warning(model, settings):
        host.emit(Notice(warning, "warning"))
    model = with_level_to_draw(model, family, pick_device(host.device), lora.model if lora else None)
    versions = versions_of(lora, settings) if lora else []
    # ComfyUI runs nodes in inference mode. Tensors created in it can't be used for training later.
    with torch.inference_mode(False), torch.no_grad():
        scorer = make_scorer(settings, (), pick_device(host.device), host)
        results = _draw_all(settings, Renderer(model, None, prompts_of(settings), host, settings), versions, host)
        if scorer:
            _report_scores(scorer, results, host)
    name = lora.name.rsplit(".", 1)[0] if lora else f"{model.family}-{model.flavour}"
    grids = []
    for number, grid in enumerate(grids_of(results, settings, name)):
        width, height = grid.size
        key = sha256_text(key_text(settings.of_the_images()), name)[:8] + (f"-{number + 1}" if grid.label else "")
        path = runs_folder(host.paths.output) / VALIDATION / f"{name}-{width}x{height}-{key}.png"
        save_png(grid.page, path, prompt=portable(dict(host.prompt), host.paths))
        host.emit(PreviewReady(-1, path))
        grids.append(_image(np.asarray(grid.page)))
    singles = singles_of(results, settings)
    return Gallery(grids, [_image(picture) for _, picture in singles], [label for label, _ in singles])


def _report_scores(scorer: ClipScorer, results: Sequence[Drawn], host: Host) -> None:
    """Log the CLIP scores of the images of each version. The likeness needs a dataset, which only a run has."""
    host.emit(PhaseStarted("score"))
    base, *others = scorer.score([item.pictures for item in results])
    host.emit(Notice(f"{results[0].label}: {describe_scores(base)}"))
    for item, scores in zip(results[1:], others, strict=True):
        host.emit(Notice(f"{item.label}: {describe_scores(scores, base)}"))


def _draw_all(settings: ValidationConfig, renderer: Renderer, versions: Sequence[Version], host: Host) -> list[Drawn]:
    strengths = settings.strengths() if versions else []
    num_columns = 1 + len(versions) * len(strengths)
    count = Counter(host, num_columns * len(settings.sizes()) * len(settings.library()))
    results = [Drawn(None, 0.0, renderer.draw(settings, 0.0, count))]
    for version in versions:
        if version.is_model:
            renderer.put_model(version.path)
        else:
            renderer.put(version.path)
        results += [Drawn(version, strength, renderer.draw(settings, strength, count)) for strength in strengths]
    return results


def _image(pixels: Any) -> Tensor:
    return torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 255)[None]
