"""The learning score: does a LoRA draw what it was taught, and does the model stay itself where it is not asked for?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.model import ModelConfig
from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..host import Host
from .pictures import prompts_of
from .scores import fraction_in_style
from .studio import Counter, Studio

PROMPTS, STYLE = "prompts.json", "style.json"
ASKED, PLAIN = "known_to_the_base", "without_trigger"


def learning_score(
    model: ModelConfig, lora: TrainedLora, dataset: Path, settings: ValidationConfig, host: Host
) -> dict[str, Any]:
    """Share of pictures in the dataset's style, over prompts whose subjects the dataset does not hold.

    Args:
        dataset: folder with prompts.json (the prompts, with and without the trigger) and style.json (the threshold, fixed on
            held-out pictures).
        settings: sampling; its prompts are replaced.
    Returns:
        base: with the trigger, without the LoRA. lora: with both. without_trigger: with the LoRA alone. Each 0 to 1.
    """
    prompts = json.loads((dataset / PROMPTS).read_text("utf-8"))
    threshold = json.loads((dataset / STYLE).read_text("utf-8"))["threshold"]
    asked, plain = (replace(settings, prompts=json.dumps(prompts[group])) for group in (ASKED, PLAIN))
    with torch.inference_mode(False), torch.no_grad():
        studio = Studio(model, lora, [*prompts_of(asked), *prompts_of(plain)], host)
        count = Counter(host, (2 * len(prompts[ASKED]) + len(prompts[PLAIN])) * len(settings.sizes()))

        def share(which: ValidationConfig, strength: float) -> float:
            pictures = studio.draw(which, strength, count)
            return round(fraction_in_style([p for size in pictures.values() for p in size], threshold), 4)

        return {
            "base": share(asked, 0.0),
            "lora": share(asked, 1.0),
            "without_trigger": share(plain, 1.0),
            "prompts": len(prompts[ASKED]),
            "threshold": threshold,
        }
