"""Previews of an image while it is sampled, from the denoised latents of a step. They never change what is sampled.

fast: colors that are linear in the latents, at a pixel for each latent cell,

    rgb = z W + b,

with W and b fitted to the VAE of the run, by least squares on the small images that come with the pack and some
synthetic ones. So it works with every VAE, and nothing is downloaded (docs/decisions/0063).

taef1: the tiny autoencoder of Flux's latents (Bohan, github.com/madebyollin/taesd), at the size of the image.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..config.validation import FAST, OFF, ValidationConfig
from ..data.cache.latents import to_tensor
from ..data.source.decode import decode
from ..errors import UserError, reason_of
from ..host import ASSETS, Host, Notice, SamplingPreview
from ..models.family import ImageCodec
from ..paths import find_taef1
from ..seeds import generator
from ..storage.atomic import write_atomic
from ..storage.safetensors_header import header_of
from .sample_images import pixels_of

SECONDS = 0.5  # between two previews
LONGEST_EDGE = 512  # pixels of a preview
FIT_FOLDERS = ("neon-emoji", "plain-emoji")  # in assets: 84 images that the colors are fitted to
NUM_SYNTHETIC = 16  # further images
FIT_CELLS = 8  # edge of these images in latent cells
TAEF1_CHANNELS = 16
TAEF1_KEY = "decoder.layers.0.weight"  # diffusers' name; in ComfyUI's files layers are counted from 1
QUALITY = 85  # of a JPEG


class ToPixels(Protocol):
    """Turns latents (1, channels, h, w) into pixels (1, 3, H, W) in [-1, 1]."""

    def __call__(self, latents: Tensor) -> Tensor: ...


class LinearColors:
    """Colors that are linear in the latents, fitted to a VAE.

    Args:
        codec: the VAE. It encodes 100 images of 8 x 8 latent cells: for Flux's, as many pixels as 640 x 640.
    """

    def __init__(self, codec: ImageCodec):
        edge = FIT_CELLS * codec.factor
        pixels = torch.cat([_pack_images(edge), _synthetic_images(edge)])
        latents = torch.cat([codec.encode(image[None]) for image in pixels]).double()
        colors = functional.avg_pool2d(pixels, codec.factor).double()
        x, y = _rows(latents), _rows(colors)
        # A little ridge, because channels of the latents may be equal or constant.
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()  # (channels + 1, 3)

    def __call__(self, latents: Tensor) -> Tensor:
        z = latents.detach().float().cpu()
        rgb = torch.einsum("bchw,cd->bdhw", z, self.weight[:-1]) + self.weight[-1][:, None, None]
        return rgb.clamp(-1, 1)


def _rows(values: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return values.movedim(1, -1).flatten(0, 2)


def _pack_images(edge: int) -> Tensor:
    """Return the images that come with the pack, (B, 3, edge, edge) in [-1, 1]."""
    paths = [path for folder in FIT_FOLDERS for path in sorted((ASSETS / folder).glob("*.png"))]
    images = [decode(path.read_bytes()).resize((edge, edge), Image.Resampling.LANCZOS) for path in paths]
    return torch.stack([to_tensor(image) for image in images])


def _synthetic_images(edge: int) -> Tensor:
    """Return patches and slopes of any color, (NUM_SYNTHETIC, 3, edge, edge) in [-1, 1]."""
    random, count = generator(0, "preview colors"), NUM_SYNTHETIC
    low = torch.rand(count, 3, 2, 2, generator=random)
    slopes = functional.interpolate(low, size=(edge, edge), mode="bilinear", align_corners=True)
    patches = functional.interpolate(torch.rand(count, 3, 4, 4, generator=random), size=(edge, edge))
    share = torch.rand(count, 1, 1, 1, generator=random)
    return 2 * (share * slopes + (1 - share) * patches) - 1


class TinyDecoder:
    """The decoder of a tiny autoencoder, on the device of the latents.

    Args:
        path: a file with ComfyUI's names (1.weight ...), or diffusers' (decoder.layers.0.weight ...).
    Raises:
        UserError: it is another model, or can't be read.
    """

    def __init__(self, path: Path):
        from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]
        from safetensors.torch import load_file

        try:
            header = header_of(path)[0]
        except (OSError, ValueError) as error:
            raise UserError.at("previews", f"{path.name} can't be read: {reason_of(error)} ({path})") from error
        decoder: Any = AutoencoderTiny(latent_channels=TAEF1_CHANNELS).decoder
        expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
        names = tiny_decoder_names(header)
        tensors = load_file(path) if names else {}
        state = {name: tensors[key].float() for name, key in names.items() if key in tensors}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
            raise UserError.at("previews", f"{path.name} is not the decoder of taef1 ({path}); download it again")
        decoder.load_state_dict(state)
        self.decoder = decoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        self.decoder.to(latents.device)
        return self.decoder(latents.detach().float()).clamp(-1, 1).cpu()


def tiny_decoder_names(header: dict[str, Any]) -> dict[str, str]:
    """Return the keys of a tiny decoder's tensors in a file, by diffusers' names; {} if the file has none."""
    if TAEF1_KEY in header:
        return {key.removeprefix("decoder."): key for key in header if key.startswith("decoder.")}
    numbered = {key: key.partition(".") for key in header if key.partition(".")[0].isdecimal()}
    return {f"layers.{int(number) - 1}.{rest}": key for key, (number, _, rest) in numbered.items()}


class Preview:
    """Writes a JPEG of the image that is being sampled, at most every half second, and reports it to the host.

    A preview that can't be made or written is reported once, and then there are no more.

    Args:
        to_pixels: how latents become pixels.
        path: the file, which is replaced by each preview.
        host: receives the event.
        clock: returns the time in seconds.
    """

    def __init__(self, to_pixels: ToPixels, path: Path, host: Host, clock: Callable[[], float] = time.monotonic):
        self._to_pixels, self._path, self._host, self._clock = to_pixels, path, host, clock
        self._due, self._failed = 0.0, False

    def __call__(self, step: int, num_steps: int, denoised: Tensor) -> None:
        """Take the denoised latents after a step, (1, channels, h, w)."""
        if self._failed or self._clock() < self._due:
            return
        try:
            write_atomic(self._path, _jpeg(self._to_pixels(denoised)))
        except (OSError, RuntimeError) as error:  # a full disk, no memory on the device
            self._failed = True
            text = f"no more previews: {reason_of(error)}; the images themselves are not affected"
            self._host.emit(Notice(text, "warning"))
            return
        self._host.emit(SamplingPreview(step, num_steps, self._path))
        self._due = self._clock() + SECONDS


def _jpeg(pixels: Tensor) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels_of(pixels)[0]))
    factor = LONGEST_EDGE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    kind = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    stream = io.BytesIO()
    image.resize(size, kind).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def preview_of(settings: ValidationConfig, codec: ImageCodec, path: Path, host: Host) -> Preview | None:
    """Return what makes the previews; None where they are off.

    Raises:
        UserError: the tiny autoencoder is missing, damaged, or for another kind of latents.
    """
    if settings.previews == OFF:
        return None
    if settings.previews == FAST:
        with torch.no_grad():
            return Preview(LinearColors(codec), path, host)
    if codec.channels != TAEF1_CHANNELS:
        text = f"taef1 decodes {TAEF1_CHANNELS} latent channels, and this VAE has {codec.channels}; set it to fast"
        raise UserError.at("previews", text)
    return Preview(TinyDecoder(find_taef1(host.paths)), path, host)
