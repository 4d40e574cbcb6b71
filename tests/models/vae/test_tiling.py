"""Tiles: the whole where it fits, the same where neighbours don't matter, and near where they do."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from chroma_trainer.trainer_core.models.vae.codec import load_vae
from chroma_trainer.trainer_core.models.vae.tiling import in_tiles, starts

CPU = torch.device("cpu")


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("length", "edge"), [(64, 64), (65, 64), (112, 64), (200, 64), (1000, 512)])
def test_tiles_cover_everything_and_end_with_it(length, edge):
    tiles = [range(start, min(length, start + edge)) for start in starts(length, edge)]
    assert set().union(*tiles) == set(range(length)) and tiles[-1].stop == length


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (168, 96), (24, 200)])
def test_where_neighbours_do_not_matter_it_is_the_same(shape):
    x = picture(*shape)
    halved = in_tiles(lambda tile: F.avg_pool2d(tile, 8), x, 64, Fraction(1, 8))
    torch.testing.assert_close(halved, F.avg_pool2d(x, 8), rtol=0, atol=1e-6)
    doubled = in_tiles(lambda tile: F.interpolate(tile, scale_factor=2.0), x, 64, Fraction(2))
    torch.testing.assert_close(doubled, F.interpolate(x, scale_factor=2.0), rtol=0, atol=1e-6)


def test_no_tile_is_larger_than_asked():
    seen = []
    in_tiles(lambda tile: seen.append(tile.shape[2:]) or tile, picture(200, 130), 64, Fraction(1))
    assert max(max(shape) for shape in seen) == 64 and len(seen) == 4 * 3


def test_the_codec_in_tiles_and_slices(tiny_model):
    whole, tiled, sliced = (load_vae(tiny_model, CPU) for _ in range(3))
    tiled.economise_(tiling=True, slicing=False)
    sliced.economise_(tiling=False, slicing=True)
    small, large = torch.cat([picture(64, 32)] * 2), picture(64, 1024)
    assert torch.equal(tiled.encode(small), whole.encode(small))
    latents = whole.encode(large)
    # A random VAE's norms see the whole picture: tiles differ, yet mean the same picture.
    assert F.cosine_similarity(tiled.encode(large).flatten(), latents.flatten(), dim=0) > 0.99
    assert tiled.decode(latents).shape == large.shape
    torch.testing.assert_close(sliced.encode(small), whole.encode(small), rtol=0, atol=1e-5)
    torch.testing.assert_close(sliced.decode(latents), whole.decode(latents), rtol=0, atol=1e-5)
