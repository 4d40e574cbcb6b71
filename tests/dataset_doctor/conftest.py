"""Images with sharp edges, textures and letters, different for every seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.host import Paths, SinkHost
from PIL import Image, ImageDraw


def scene(seed: int, width: int = 128, height: int = 128) -> Image.Image:
    """An image with detail of every size, as a photo or a drawing has."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(0, 1, (height, width, 3))
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    waves[0, 0] = 1.0
    texture = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / waves[..., None], axes=(0, 1)).real
    texture = 128 + 40 * (texture - texture.mean()) / texture.std()
    image = Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = int(draw.integers(0, width)), int(draw.integers(0, height))
        box = (x, y, x + int(draw.integers(8, width // 2)), y + int(draw.integers(8, height // 2)))
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape(box, fill=tuple(draw.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "cats"
    path.mkdir()
    return path


@pytest.fixture
def save(folder) -> Callable[..., Path]:
    """Write an image and its caption."""

    def write(name: str, image: Image.Image, caption: str | None = "") -> Path:
        path = folder / name
        image.save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption or f"a picture of {name}", "utf-8")
        return path

    return write


@pytest.fixture
def host(tmp_path) -> SinkHost:
    return SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache"), device="cpu")


def dataset(folder: Path, *more: FolderConfig, **fields) -> DatasetConfig:
    parts = more or (FolderConfig(folder=folder.name, **{"resolution": 128, **fields}),)
    return DatasetConfig(parts=parts, roots=(str(folder),) * len(parts))
