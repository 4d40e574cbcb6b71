"""Packing, places and masks against diffusers' pipeline."""

from __future__ import annotations

import torch
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from diffusers import ChromaPipeline

LATENTS = torch.arange(2 * 16 * 6 * 10, dtype=torch.float32).reshape(2, 16, 6, 10)


def test_round_trip():
    assert torch.equal(unpack(pack(LATENTS), 6, 10), LATENTS)


def test_order_is_channel_row_column():
    tokens = pack(LATENTS)
    assert tokens.shape == (2, 15, 64)
    assert torch.equal(tokens[1, 7], LATENTS[1, :, 2:4, 4:6].reshape(64))  # the token at row 1, column 2


def test_as_the_pipeline_packs():
    assert torch.equal(pack(LATENTS), ChromaPipeline._pack_latents(LATENTS, 2, 16, 6, 10))


def test_places_as_the_pipeline_gives_them():
    theirs = ChromaPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(6, 10), theirs)
