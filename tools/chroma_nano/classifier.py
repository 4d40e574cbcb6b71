"""The yardstick: which of the 200 subjects is on an image? `python -m tools.chroma_nano.classifier score|train`

    score   share of images that the base model samples (and, with --lora, a LoRA) whose subject is among the classifier's
            five first guesses
    train   makes classifier.safetensors: about 10 minutes on one CPU core

A small convolutional network, trained on the emoji of subjects.py under rotation, scale, shift, changed colors, blur and
noise, plain and as neon drawings. classifier.json says how often it is right on renderings that it was not trained on:
other random changes, and the same emoji as another vendor (Twemoji) draws them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import plain, sheet, to_tensor
from .dataset import TRIGGER
from .neon import neon
from .pictures import Emoji, composite, fetch_package, load_emoji, split
from .sampler import Sampler
from .subjects import NAMES, subjects
from .training import generator, say

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS, FIGURES = Path(__file__).with_name("classifier.safetensors"), Path(__file__).with_name("classifier.json")
OTHER_VENDOR = "emoji-datasource-twitter@16.0.0"  # Twemoji, CC-BY 4.0: measured against, never trained on
CHANNELS = (24, 48, 96, 128)
BATCH, STEPS, LEARNING_RATE = 64, 2500, 2e-3
NEON_SHARE = 0.3


class Classifier(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> (B, 200) logits, in the order of NAMES."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels in CHANNELS:
            layers += [nn.Conv2d(width, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            width = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(NAMES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        """(B, 128): what the last layer reads, to compare images of one subject by."""
        return self.body(x).mean((2, 3))


def load() -> Classifier:
    """The committed classifier, in fp32."""
    classifier = Classifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def named(classifier: Classifier, images: np.ndarray, wanted: Sequence[int], k: int = 5) -> Tensor:
    """(B,) bool: whether the wanted subject is among the k first guesses. images: (B, 64, 64, 3) uint8."""
    logits = torch.cat([classifier(x) for x in to_tensor(images).split(256)])
    return (logits.topk(k).indices == torch.tensor(wanted)[:, None]).any(1)


def train(emoji: Sequence[Emoji], seed: int = 4) -> Classifier:
    """A new classifier; the same steps, the same bytes on one machine."""
    torch.manual_seed(seed)
    classifier = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    renderings = Renderings(emoji)
    for step in range(STEPS):
        x, labels = renderings.batch(BATCH, generator(seed, "classifier", step))
        loss = F.cross_entropy(classifier(x), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        if (step + 1) % 250 == 0:
            say(f"classifier step {step + 1} loss {loss.item():.3f}")
    return classifier.eval().requires_grad_(False)


class Renderings:
    """Randomly changed images of the subjects, plain and neon."""

    def __init__(self, emoji: Sequence[Emoji]):
        self.plain = to_tensor(plain(list(emoji)))
        self.neon = to_tensor(np.stack([neon(e.rgba) for e in emoji]))

    def batch(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(n, 3, 64, 64) images and (n,) labels."""
        labels = torch.randint(len(self.plain), (n,), generator=g)
        is_neon = torch.rand(n, generator=g) < NEON_SHARE
        x = torch.where(is_neon[:, None, None, None], self.neon[labels], self.plain[labels])
        return changed(x, g), labels


def changed(x: Tensor, g: torch.Generator) -> Tensor:
    """Rotated by up to 15 degrees, scaled by 0.75 to 1.15, shifted by up to 6 pixels, and with other colors, blur and noise."""
    n = len(x)
    u = torch.rand(n, 9, generator=g) * 2 - 1
    angle, scale = u[:, 0] * 0.26, 0.95 + 0.2 * u[:, 1]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [torch.stack([cos, -sin, u[:, 2] * 0.19], 1), torch.stack([sin, cos, u[:, 3] * 0.19], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + 0.2 * u[:, 4:5], 0.12 * u[:, 5:8]
    x = x * gain[:, :, None, None] + offset[:, :, None, None]
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    amount = u[:, 8].clamp(min=0)[:, None, None, None]
    x = torch.lerp(x, blurred, amount)
    return (x + 0.05 * torch.randn(x.shape, generator=g)).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def measure(classifier: Classifier, emoji: Sequence[Emoji], work: Path) -> dict[str, float]:
    """Shares of held-out renderings that it names first, and among five."""
    x, labels = Renderings(emoji).batch(4000, generator(0, "held out"))
    with torch.no_grad():
        first = torch.cat([classifier(part) for part in x.split(256)]).topk(5).indices
    hits = first == labels[:, None]
    images, wanted = other_vendor(emoji, work)
    rows = {"changed_top1": hits[:, 0].float().mean(), "changed_top5": hits.any(1).float().mean()}
    rows |= {f"other_vendor_top{k}": named(classifier, images, wanted, k).float().mean() for k in (1, 5)}
    return {name: round(float(value), 3) for name, value in rows.items()}


def other_vendor(emoji: Sequence[Emoji], work: Path) -> tuple[np.ndarray, list[int]]:
    """Images of the same emoji as Twemoji draws them, and their labels."""
    folder = work / "other-vendor"
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or "npm"
        subprocess.run([npm, "pack", OTHER_VENDOR], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, [m for m in archive if "/img/twitter/64/" in m.name], filter="data")
    images, labels = [], []
    for label, e in enumerate(emoji):
        file = folder / "package" / "img" / "twitter" / "64" / f"{e.code}.png"
        if file.is_file():
            images.append(composite(np.asarray(Image.open(file).convert("RGBA").resize((64, 64)))))
            labels.append(label)
    return np.stack(images), labels


def score(
    classifier: Classifier, sampler: Sampler, prefix: str = "", seeds: int = 1, cfg: float = 3.0
) -> tuple[dict[str, float], np.ndarray]:
    """Shares of sampled images that are named first and among five, and the images of the last seed."""
    wanted = list(range(len(NAMES)))
    hits, images = [], np.empty(0)
    for seed in range(seeds):
        prompts = [prefix + name for name in NAMES]
        images = np.concatenate([
            sampler.images(prompts[i : i + 50], cfg=cfg, seed=1000 * seed + i) for i in range(0, len(prompts), 50)
        ])  # fmt: skip
        hits.append([named(classifier, images, wanted, k).float().mean().item() for k in (1, 5)])
    top1, top5 = np.mean(hits, 0)
    return {"top1": round(float(top1), 3), "top5": round(float(top5), 3)}, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("score", "train"))
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "chroma-nano")
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "chroma-nano")
    parser.add_argument("--lora", type=Path, help="a LoRA; the prompts then begin with its trigger")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--grid", type=Path, help="PNG of the 200 images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "train":
        emoji = subjects(split(load_emoji(fetch_package(options.work)))[0])
        classifier = train(emoji)
        save_file({k: v.half().contiguous() for k, v in classifier.state_dict().items()}, WEIGHTS)
        figures = measure(load(), emoji, options.work)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(figures)
        return
    _score(options)


def _score(options: argparse.Namespace) -> None:
    prefix = f"{TRIGGER} style, " if options.lora else ""
    sampler = Sampler(options.model, options.lora)
    figures, images = score(load(), sampler, prefix, options.seeds, options.cfg)
    if options.grid:
        sheet(images, 20).save(options.grid)
    print(figures)


if __name__ == "__main__":
    main()
