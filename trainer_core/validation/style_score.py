"""The learning score: whether a LoRA generates the trained style, and only when the trigger asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters.inject import set_strength_
from ..config.model import ModelConfig
from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..flow.sigmas import sampling_sigmas
from ..host import Host
from .euler import starting_noise
from .render import Counter, Renderer
from .sample_images import pixels_of
from .style_metrics import fraction_in_style

PROMPTS, STYLE = "prompts.json", "style.json"
ASKED, PLAIN = "known_to_the_base", "without_trigger"
SEEDS = (0, 1)  # noise seeds; each prompt is sampled from every one


def learning_score(
    model: ModelConfig,
    lora: TrainedLora,
    dataset: Path,
    settings: ValidationConfig,
    host: Host,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Measure the share of images in the dataset's style, for prompts whose subjects are not in the dataset.

    Args:
        model: The model.
        lora: The LoRA, or the model of a full-rank run.
        dataset: Folder with prompts.json (prompts with and without the trigger) and style.json (the threshold,
            determined on held-out images).
        settings: Steps, cfg, negative prompt, scheduler and shift. Its prompts, seed and strengths are not used.
        host: The host.
        seeds: Seeds of the starting noise. Each prompt is sampled from every one.
    Returns:
        A dictionary with the shares `base` (trigger, without the LoRA), `lora` (trigger and LoRA) and `without_trigger`
        (LoRA only), each from 0 to 1, the number of `prompts` and `pictures` (images), and the `threshold`. The
        standard error of a share p of n images is about sqrt(p (1 - p) / n).
    """
    prompts = json.loads((dataset / PROMPTS).read_text("utf-8"))
    threshold = json.loads((dataset / STYLE).read_text("utf-8"))["threshold"]
    asked, plain = (list(prompts[group].values()) for group in (ASKED, PLAIN))
    with torch.inference_mode(False), torch.no_grad():
        renderer = Renderer(model, None, [*asked, *plain, settings.negative_prompt], host)
        count = Counter(host, len(seeds) * (2 * len(asked) + len(plain)) * len(settings.sizes()))

        def share(texts: Sequence[str], strength: float) -> float:
            set_strength_(renderer.transformer, strength)
            pictures = [p for seed in seeds for p in draw_together(renderer, settings, texts, seed, count)]
            return round(fraction_in_style(pictures, threshold), 4)

        base = share(asked, 0.0)
        renderer.put_trained(lora)
        return {
            "base": base,
            "lora": share(asked, 1.0),
            "without_trigger": share(plain, 1.0),
            "prompts": len(asked),
            "pictures": len(asked) * len(seeds) * len(settings.sizes()),
            "threshold": threshold,
        }


def draw_together(
    renderer: Renderer, settings: ValidationConfig, prompts: Sequence[str], seed: int, count: Counter
) -> list[np.ndarray]:
    """Sample one (H, W, 3) uint8 image per prompt and size in one batch, all from the same noise.

    The images equal those of euler.py up to the rounding of batched operations. On chroma-nano a batch of 16 takes a
    third of the time.
    """
    family, transformer, codec = renderer.family, renderer.transformer, renderer.codec
    device = next(transformer.parameters()).device
    positive, negative = (
        [renderer.text.get(prompt).to(device) for prompt in texts]
        for texts in (prompts, [settings.negative_prompt] * len(prompts))
    )
    num_levels = family.num_noise_levels(transformer)
    sigmas = sampling_sigmas(settings.scheduler, settings.steps, settings.shift, num_levels).to(device)
    images: list[np.ndarray] = []
    for width, height in settings.sizes():
        noise = starting_noise(width, height, seed=seed, channels=codec.channels, factor=codec.factor)
        x = (sigmas[0] * noise.to(device)).expand(len(prompts), -1, -1, -1)
        with family.drawing(transformer):
            for now, following in pairwise(sigmas):
                renderer.host.check_cancelled()
                sigma = now.expand(len(prompts))
                velocity = family.predict(transformer, x, sigma, positive).float()
                if settings.cfg > 1:
                    unconditional = family.predict(transformer, x, sigma, negative).float()
                    velocity = unconditional + settings.cfg * (velocity - unconditional)
                x = x + (following - now) * velocity
        images.extend(pixels_of(codec.decode(x)))
        for _ in prompts:
            count()
    return images
