"""README's first image: what the demo's LoRA does. `python -m tools.chroma_nano.showcase demo-output/loras/neonglow.safetensors`

Rows: images of the base model, of the LoRA with the same prompts and noise, and images that the LoRA was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .classifier import ROOT
from .dataset import TRIGGER
from .sampler import Sampler

TRAINED_ON = ("fox-face", "pineapple", "airplane", "european-castle", "octopus", "palm-tree", "taxi", "penguin")
SUBJECTS = (
    "smiling face with sunglasses",
    "heart",
    "cactus",
    "automobile",
    "guitar",
    "red apple",
    "owl",
    "soccer ball",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "chroma-nano")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "neonglow.png")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    page(options.lora, options.model, options.seed).save(options.output, optimize=True)


def page(lora: Path, model: Path, seed: int) -> Image.Image:
    """The grid, with labels."""
    from chroma_trainer.trainer_core.plots.image_grid import draw_grid

    sampler = Sampler(model, lora)

    def sampled(strength: float) -> list[np.ndarray]:
        return list(sampler.images([f"{TRIGGER} style, {name}" for name in SUBJECTS], strength, seed))

    data = ROOT / "assets" / "neon-emoji"
    trained_on = [np.asarray(Image.open(data / f"{name}.png").convert("RGB")) for name in TRAINED_ON]
    labels = ["Base model", "With the LoRA", "Eight of the 28 images that the LoRA was trained on"]
    return draw_grid([sampled(0.0), sampled(1.0), trained_on], labels, list(SUBJECTS))


if __name__ == "__main__":
    main()
