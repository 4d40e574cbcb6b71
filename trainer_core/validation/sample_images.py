"""Sample validation images: every prompt at every size, and labeled grids of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..config.validation import ValidationConfig
from ..data.cache.latents import to_tensor
from ..data.source.decode import BrokenImage, decode
from ..distributed.ranks import ALONE, Ranks
from ..errors import UserError
from ..flow.adaptive_guidance import AdaptiveGuidance
from ..models.family import Family, ImageCodec
from ..plots.image_grid import draw_grid
from ..storage.lora_name import is_portable
from .attention import use_attention
from .euler import OnStep, sample

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # in file names of some system
MAX_NAME = 60  # characters of a prompt's name in a file name

Size = tuple[int, int]
Pictures = dict[Size, list[np.ndarray]]  # (width, height) -> a (H, W, 3) uint8 image per prompt, in the library's order


class Embeddings(Protocol):
    """Source of prompt embeddings: a text cache."""

    def get(self, prompt: str) -> Tensor:
        """Return the embedding of a prompt."""
        ...


def prompts_of(settings: ValidationConfig) -> list[str]:
    """Return every prompt whose embedding is needed."""
    negative = [settings.negative_prompt] if settings.cfg > 1 else []
    return [*settings.library().values(), *negative]


def guidance_of(settings: ValidationConfig) -> AdaptiveGuidance | None:
    """Return the adaptive guidance of the settings. None: CFG at every step."""
    if settings.guidance == "cfg":
        return None
    return AdaptiveGuidance(
        cfg=settings.cfg,
        threshold=settings.threshold,
        uncond_zero_scale=settings.uncond_zero_scale,
        cfg_start_pct=settings.cfg_start_pct,
        initial_disabled_steps=settings.initial_disabled_steps,
    )


def draw_pictures(
    settings: ValidationConfig,
    family: Family,
    transformer: nn.Module,
    codec: ImageCodec,
    text: Embeddings,
    on_picture: Callable[[], None] = lambda: None,
    on_step: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    preview: OnStep | None = None,
) -> Pictures:
    """Sample and decode an image for every prompt at every size.

    Args:
        settings: Sampling settings.
        family: The model family.
        transformer: The model.
        codec: The VAE.
        text: Embeddings of the prompts.
        on_picture: Called after every image.
        on_step: Called after every sampling step. May raise to stop.
        ranks: Processes that share out the images.
        preview: Called after every sampling step with its number, the number of steps and the denoised latents.
    Returns:
        The images by size.
    """

    def after_step(step: int, num_steps: int, denoised: Tensor) -> None:
        on_step()
        if preview is not None:
            preview(step, num_steps, denoised)

    device = next(transformer.parameters()).device
    negative = text.get(settings.negative_prompt).to(device) if settings.cfg > 1 else None
    guidance = guidance_of(settings)
    items = [(size, prompt) for size in settings.sizes() for prompt in settings.library().values()]
    references: dict[Size, Tensor] = {}

    def draw(number: int) -> np.ndarray:
        (width, height), prompt = items[number]
        if settings.reference and (width, height) not in references:
            references[width, height] = start_of(settings.reference, (width, height), codec)
        with use_attention(transformer, settings.attention):
            latents = sample(
                family, transformer, text.get(prompt).to(device), negative,
                width=width, height=height, steps=settings.steps, cfg=settings.cfg, seed=settings.seed,
                channels=codec.channels, factor=codec.factor, scheduler=settings.scheduler, shift=settings.shift,
                guidance=guidance, on_step=after_step, reference=references.get((width, height)),
            )  # fmt: skip
        pixels = pixels_of(codec.decode(latents))[0]
        on_picture()
        return pixels

    pictures: Pictures = {}
    for (size, _), pixels in zip(items, _share_out(ranks, [size for size, _ in items], draw), strict=True):
        pictures.setdefault(size, []).append(pixels)
    return pictures


def _share_out(ranks: Ranks, sizes: Sequence[Size], draw: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """Return the images of these sizes, each drawn by one rank."""
    if ranks.size == 1:
        return [draw(number) for number in range(len(sizes))]
    parts = ranks.gather_bytes(lambda: b"".join(draw(number).tobytes() for number in ranks.numbers(len(sizes))))
    starts = [0] * ranks.size
    images: list[np.ndarray] = []
    for number, (width, height) in enumerate(sizes):
        rank, length = number % ranks.size, 3 * width * height
        pixels = np.frombuffer(parts[rank], np.uint8, length, starts[rank])
        starts[rank] += length
        images.append(pixels.reshape(height, width, 3))
    return images


def start_of(path: str, size: Size, codec: ImageCodec) -> Tensor:
    """Return the latents of a reference image, resized and center-cropped to this size: (1, channels, h, w).

    Raises:
        UserError: The image can't be read.
    """
    try:
        image = decode(Path(path).read_bytes())
    except (OSError, BrokenImage) as error:
        raise UserError.at("reference", f"can't be read: {error} ({path})") from error
    return codec.encode(to_tensor(ImageOps.fit(image, size, Image.Resampling.LANCZOS))[None])


def pixels_of(decoded: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_grids(
    columns: Sequence[tuple[str, Pictures]], settings: ValidationConfig, title: str
) -> dict[Size, Image.Image]:
    """Draw one grid per size, as a PIL image: one row per prompt, one column per model."""
    labels = list(settings.library())
    names = [name for name, _ in columns]
    return {
        size: draw_grid(
            [[pictures[size][row] for _, pictures in columns] for row in range(len(labels))], labels, names, title
        )
        for size in columns[0][1]
    }


def draw_named(
    columns: Sequence[tuple[str, Pictures]], settings: ValidationConfig, title: str
) -> dict[tuple[str, Size], Image.Image]:
    """Draw one row per prompt and size, as a PIL image, by the prompt's name in the library."""
    names = [name for name, _ in columns]
    return {
        (label, size): draw_grid([[pictures[size][row] for _, pictures in columns]], [label], names, title)
        for size in columns[0][1]
        for row, label in enumerate(settings.library())
    }


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """Return a file name for each label, without extension: valid on every system, and different for each label."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for label in labels:
        stem = FORBIDDEN.sub("_", label).strip(" .")[:MAX_NAME].rstrip(" .") or "prompt"
        stem = stem if is_portable(stem) else f"_{stem}"  # CON, which is a device of Windows
        name, number = stem, 2
        while name.lower() in used:  # Windows and macOS do not distinguish case
            name, number = f"{stem}-{number}", number + 1
        used.add(name.lower())
        names[label] = name
    return names
