"""The VAE: 64x64 pictures <-> 16 channels of 8x8.

    loss = |x - y| + |grad x - grad y| + 1/2 (x - y)^2 + w KL(N(mean, std^2) || N(0, 1)),   y = decode(mean + std noise)

The difference of gradients stands in for a perceptual loss: it keeps outlines sharp on pictures that are mostly plain
areas. Besides emoji on white it sees other backgrounds and neon drawings of *training* pictures, as any VAE has seen
more than the model on top of it; the transformer never does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from .neon import neon
from .pictures import Emoji, composite
from .styles import STYLES
from .training import Average, Budget, Checkpoint, generator, say

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}
BATCH = 8
LEARNING_RATE = 2.5e-3
KL_WEIGHT = 4e-4
DECODER_LEARNING_RATE = 1.5e-3
LATENT_NOISE = 0.05  # deviations of a latent: the decoder must bear what a sampler is off by
PLAIN, RECOLOURED, NEON = 0.5, 0.15, 0.15  # shares of a batch; the rest is in the styles that the base knows


def train(
    emoji: list[Emoji], held_out: list[Emoji], work: Path, budget: Budget, start: Path | None = None, seed: int = 1
) -> AutoencoderKL:
    """The trained VAE (averaged weights), with shift and scale so that latents have mean 0 and deviation 1.

    Args:
        start: a published model whose VAE this training continues from.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(start, subfolder="vae").float() if start else AutoencoderKL(**CONFIG)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    average = Average(vae, 0.998)
    checkpoint = Checkpoint(work / "vae.safetensors", vae, average, optimizer)
    step, budget.spent_s, log = checkpoint.load()
    drawings = Drawings(emoji)
    while budget.fraction(step) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * budget.rate(step)
        g = generator(seed, "vae", step)
        loss, error = _loss(vae, drawings.batch(g), g)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_(step)
        step += 1
        if step % 100 == 0:
            say(f"vae step {step} loss {loss.item():.4f} l1 {error:.4f} {budget.fraction(step):.0%}")
        if checkpoint.due():
            log.append({"step": step, "seconds": round(budget.seconds()), "loss": loss.item(), "l1": error})
            checkpoint.save(step, budget.seconds(), log)
    log.append({"step": step, "seconds": round(budget.seconds())})
    checkpoint.save(step, budget.seconds(), log)
    vae.load_state_dict(average.values, strict=False)
    vae.eval().requires_grad_(False)
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in to_tensor(plain(emoji)).split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    psnr = (
        reconstruction_psnr(vae, plain(held_out)),
        reconstruction_psnr(vae, np.stack([neon(e.rgba) for e in held_out[:32]])),
    )
    say(
        f"vae done: {step} steps, held-out PSNR plain {psnr[0]:.1f} dB, neon {psnr[1]:.1f} dB, channel std {latents.std((0, 2, 3))}"
    )
    return vae


def refine_decoder_(
    vae: AutoencoderKL, emoji: list[Emoji], held_out: list[Emoji], work: Path, budget: Budget, seed: int = 3
) -> None:
    """More steps for the decoder alone: latents stay as they are, so this may run while the transformer learns them."""
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    decoder = vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=DECODER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    average = Average(decoder, 0.998)
    checkpoint = Checkpoint(work / "decoder.safetensors", decoder, average, optimizer)
    step, budget.spent_s, log = checkpoint.load()
    drawings = Drawings(emoji)
    while budget.fraction(step) < 1:
        for group in optimizer.param_groups:
            group["lr"] = DECODER_LEARNING_RATE * budget.rate(step)
        g = generator(seed, "decoder", step)
        x = drawings.batch(g)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
            z = z + LATENT_NOISE / vae.config.scaling_factor * torch.randn(z.shape, generator=g)
        loss = _difference(x, vae.decode(z).sample)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update_(step)
        step += 1
        if step % 200 == 0:
            say(f"decoder step {step} loss {loss.item():.4f} {budget.fraction(step):.0%}")
        if checkpoint.due():
            log.append({"step": step, "seconds": round(budget.seconds()), "loss": loss.item()})
            checkpoint.save(step, budget.seconds(), log)
    log.append({"step": step, "seconds": round(budget.seconds())})
    checkpoint.save(step, budget.seconds(), log)
    decoder.load_state_dict(average.values, strict=False)
    vae.eval().requires_grad_(False)
    psnr = (
        reconstruction_psnr(vae, plain(held_out)),
        reconstruction_psnr(vae, np.stack([neon(e.rgba) for e in held_out[:32]])),
    )
    say(f"decoder done: {step} steps, held-out PSNR plain {psnr[0]:.1f} dB, neon {psnr[1]:.1f} dB")


class Drawings:
    """Batches of plain, recoloured and neon pictures."""

    def __init__(self, emoji: list[Emoji]):
        self.rgba = [e.rgba for e in emoji]
        self.plain = plain(emoji)
        self.neon = np.stack([neon(e.rgba) for e in emoji])
        self.styled: dict[tuple[str, int], np.ndarray] = {}

    def batch(self, g: torch.Generator) -> Tensor:
        """(BATCH, 3, 64, 64) in [-1, 1], half of them mirrored."""
        rows = torch.randint(len(self.rgba), (BATCH,), generator=g).tolist()
        choices = torch.rand(BATCH, 5, generator=g).numpy()
        pictures = [self._draw(row, *choice) for row, choice in zip(rows, choices, strict=True)]
        return to_tensor(np.stack(pictures)).contiguous(memory_format=torch.channels_last)

    def _draw(self, row: int, kind: float, mirror: float, *rgb: float) -> np.ndarray:
        if kind < PLAIN:
            picture = self.plain[row]
        elif kind < PLAIN + RECOLOURED:
            picture = composite(self.rgba[row], tuple(int(255 * c) for c in rgb))  # pyright: ignore[reportArgumentType]
        elif kind < PLAIN + RECOLOURED + NEON:
            picture = self.neon[row]
        else:
            picture = self._in_style(row, rgb[0])
        return picture[:, ::-1] if mirror < 0.5 else picture

    def _in_style(self, row: int, u: float) -> np.ndarray:
        style = list(STYLES)[int(u * len(STYLES))]
        if (style, row) not in self.styled:
            self.styled[style, row] = STYLES[style](self.rgba[row])
        return self.styled[style, row]


def _loss(vae: AutoencoderKL, x: Tensor, g: torch.Generator) -> tuple[Tensor, float]:
    z = vae.encode(x).latent_dist
    y = vae.decode(z.mean + z.std * torch.randn(z.mean.shape, generator=g)).sample
    kl = 0.5 * (z.mean.square() + z.var - 1 - z.logvar).mean()
    return _difference(x, y) + KL_WEIGHT * kl, (x - y).abs().mean().item()


def _difference(x: Tensor, y: Tensor) -> Tensor:
    d = x - y
    gradients = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return d.abs().mean() + gradients + 0.5 * d.square().mean()


def plain(emoji: list[Emoji]) -> np.ndarray:
    return np.stack([composite(e.rgba) for e in emoji])


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    return to_pictures(
        torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in to_tensor(pictures).split(32)])
    )


def reconstruction_psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    error = np.square(reconstruct(vae, pictures).astype(np.float32) - pictures).mean()
    return float(10 * np.log10(255**2 / error))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Normalised latents, (B, 16, 8, 8)."""
    mean = torch.cat([vae.encode(x).latent_dist.mean for x in to_tensor(pictures).split(64)])
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    return to_pictures(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)


def sheet(pictures: np.ndarray, columns: int, scale: int = 1) -> Image.Image:
    """Pictures side by side."""
    blank = np.full_like(pictures[0], 255)
    tiles = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    image = Image.fromarray(np.vstack(rows))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image
