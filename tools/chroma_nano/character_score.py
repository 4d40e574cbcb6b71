"""How well a LoRA has learned the character: `python -m tools.chroma_nano.character_score my-lora.safetensors [--grid grid.png]`

An image shows the character where the classifier's features are nearer to one of the dataset's twelve images than to any
emoji's. New scenes of the character alone are recognized in 100 of 100 cases, those with something beside it in 63 %; 0.4 % of the
emoji are nearer to the character than to each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import plain, sheet, to_tensor
from .character import SCENES, draw_scene
from .classifier import ROOT, load
from .pictures import Emoji, fetch_package, load_emoji
from .sampler import Sampler

ASKED = ("zibbo", "a small zibbo", "zibbo, looking to the left", "zibbo, tilted", "zibbo on a yellow background",
         "zibbo with a balloon", "zibbo with a heart", "zibbo with a guitar")  # fmt: skip
OTHERS = ("cat face", "red apple", "automobile", "sunflower", "owl", "soccer ball", "ghost", "extraterrestrial alien")


class Recognizer:
    """Tells images of the character from those of emoji."""

    def __init__(self, emoji: Sequence[Emoji]):
        self.classifier = load()
        features = self._features(plain(list(emoji)))
        self.mean, self.deviation = features.mean(0), features.std(0)
        self.others = self._scaled(features)
        by_name = {e.name: e for e in emoji}
        self.character = self._scaled(self._features(np.stack([draw_scene(scene, by_name) for scene in SCENES])))

    def share(self, images: np.ndarray) -> float:
        """Share of (B, 64, 64, 3) uint8 images that show the character."""
        features = self._scaled(self._features(images))
        nearer = (features @ self.character.T).amax(1) > (features @ self.others.T).amax(1)
        return round(nearer.float().mean().item(), 3)

    def _features(self, images: np.ndarray) -> Tensor:
        return torch.cat([self.classifier.features(x) for x in to_tensor(images).split(256)])

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) / self.deviation, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "chroma-nano", help="where the emoji package is")
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "chroma-nano")
    parser.add_argument("--grid", type=Path, help="PNG: rows base, LoRA, other prompts with the LoRA")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--cfg", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(judge(options), indent=1))


def judge(options: argparse.Namespace) -> dict[str, float]:
    """Shares of images that show the character: of the base, with the LoRA, and with the LoRA for other prompts."""
    sampler = Sampler(options.model, options.lora)

    def sampled(prompts: Sequence[str], strength: float) -> np.ndarray:
        seeds = range(options.seeds)
        return np.concatenate([sampler.images(prompts, strength, seed, options.cfg) for seed in seeds])

    rows = {"base": sampled(ASKED, 0.0), "lora": sampled(ASKED, 1.0), "without_trigger": sampled(OTHERS, 1.0)}
    if options.grid:
        sheet(np.concatenate([images[:8] for images in rows.values()]), 8, scale=2).save(options.grid)
    recognizer = Recognizer(load_emoji(fetch_package(options.work)))
    return {name: recognizer.share(images) for name, images in rows.items()}


if __name__ == "__main__":
    main()
