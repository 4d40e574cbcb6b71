"""The learning score: does a LoRA draw what it was taught, and does the model stay itself where it is not asked for?"""

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
SEEDS = (0, 1)  # noises that each prompt is drawn from


def learning_score(
    model: ModelConfig,
    lora: TrainedLora,
    dataset: Path,
    settings: ValidationConfig,
    host: Host,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Share of pictures in the dataset's style, over prompts whose subjects the dataset does not hold.

    Args:
        dataset: folder with prompts.json (the prompts, with and without the trigger) and style.json (the threshold, fixed on
            held-out pictures).
        settings: steps, cfg, negative prompt, scheduler and shift; its prompts, seed and strengths are replaced.
        seeds: of the noises that each prompt is drawn from.
    Returns:
        base: with the trigger, without the LoRA. lora: with both. without_trigger: with the LoRA alone. Each 0 to 1, of
        `pictures` pictures: a share p of n pictures is known to about sqrt(p (1 - p) / n).
    """
    prompts = json.loads((dataset / PROMPTS).read_text("utf-8"))
    threshold = json.loads((dataset / STYLE).read_text("utf-8"))["threshold"]
    asked, plain = (list(prompts[group].values()) for group in (ASKED, PLAIN))
    with torch.inference_mode(False), torch.no_grad():
        studio = Renderer(model, lora, [*asked, *plain, settings.negative_prompt], host)
        count = Counter(host, len(seeds) * (2 * len(asked) + len(plain)) * len(settings.sizes()))

        def share(texts: Sequence[str], strength: float) -> float:
            set_strength_(studio.transformer, strength)
            pictures = [p for seed in seeds for p in draw_together(studio, settings, texts, seed, count)]
            return round(fraction_in_style(pictures, threshold), 4)

        return {
            "base": share(asked, 0.0),
            "lora": share(asked, 1.0),
            "without_trigger": share(plain, 1.0),
            "prompts": len(asked),
            "pictures": len(asked) * len(seeds) * len(settings.sizes()),
            "threshold": threshold,
        }


def draw_together(
    studio: Renderer, settings: ValidationConfig, prompts: Sequence[str], seed: int, count: Counter
) -> list[np.ndarray]:
    """One (H, W, 3) uint8 picture a prompt and size, all from one noise: those of sampler.py, to the rounding of a batch.

    On chroma-nano a batch of 16 takes a third of the time.
    """
    family, transformer, codec = studio.family, studio.transformer, studio.codec
    device = next(transformer.parameters()).device
    wanted, unwanted = (
        [studio.text.get(prompt).to(device) for prompt in texts]
        for texts in (prompts, [settings.negative_prompt] * len(prompts))
    )
    sigmas = sampling_sigmas(settings.scheduler, settings.steps, settings.shift).to(device)
    drawn: list[np.ndarray] = []
    for width, height in settings.sizes():
        noise = starting_noise(width, height, seed=seed, channels=codec.channels, factor=codec.factor)
        x = (sigmas[0] * noise.to(device)).expand(len(prompts), -1, -1, -1)
        for now, then in pairwise(sigmas):
            studio.host.check_cancelled()
            sigma = now.expand(len(prompts))
            velocity = family.predict(transformer, x, sigma, wanted).float()
            if settings.cfg > 1:
                away = family.predict(transformer, x, sigma, unwanted).float()
                velocity = away + settings.cfg * (velocity - away)
            x = x + (then - now) * velocity
        drawn.extend(pixels_of(codec.decode(x)))
        for _ in prompts:
            count()
    return drawn
