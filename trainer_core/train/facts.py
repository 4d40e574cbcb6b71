"""What is known of a run before it begins: of its pictures, its captions, its text encoder and its VAE. No weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.request import TrainRequest
from ..data.index import Index
from ..families.codec import empty_vae
from ..families.contract import Family
from ..families.weights import DTYPES
from ..quant.loading import text_converter
from .costs import Shape
from .counting import FlashShapes, LiveBytes, bytes_of

CHARACTERS_A_TOKEN = 3  # of T5, on captions; English has four or more, so that this is on the safe side
MAX_TOKENS = 512


@dataclass(frozen=True)
class EncoderCost:
    """Bytes of a text encoder, as it is quantised.

    Args:
        weights: all. blocks: those of its repeated blocks; largest_block: of one.
        work: for the longest prompt. width: features of a token.
    """

    weights: int
    blocks: int
    largest_block: int
    work: int
    width: int
    is_quantized: bool


@dataclass(frozen=True)
class RunFacts:
    """What is known of the data and the files. largest: the bucket of most pixels.

    latent_pixels: pixels of all pictures. prompts: number of distinct prompts. element_bytes: of an embedding's number.
    validation_pixels: of the largest picture that is drawn. codec_width: the VAE's, as a share of the released one's.
    """

    largest: Shape
    latent_pixels: int
    prompts: int
    encoder: EncoderCost
    element_bytes: int
    validation_pixels: int
    num_steps: int
    codec_bytes: int
    codec_width: float


def facts_of(
    request: TrainRequest,
    family: Family,
    index: Index,
    resolution: float,
    encoder: EncoderCost,
    codec: tuple[int, float],
) -> RunFacts:
    """What the dataset and the settings say.

    Args:
        resolution: that the index's pictures were placed at; a lower one makes them smaller in proportion.
    """
    samples, training = index.samples, request.training
    ratio = request.dataset.parts[0].resolution / resolution
    width, height = max((sample.placement.bucket for sample in samples), key=math.prod)
    step = family.pixel_step
    size = [max(step, round(edge * ratio / step) * step) for edge in (width, height)]
    captions = {caption for sample in samples for caption in sample.captions}
    tokens = min(MAX_TOKENS, max(map(len, captions)) // CHARACTERS_A_TOKEN + 2)
    passes = sum(request.dataset.parts[sample.part].repeats for sample in samples) / training.batch_size
    return RunFacts(
        largest=Shape(size[0], size[1], training.batch_size, family.text_rows(request.model, tokens)),
        latent_pixels=int(sum(math.prod(sample.placement.bucket) for sample in samples) * ratio * ratio),
        prompts=len(captions) + 1, encoder=encoder, element_bytes=DTYPES[request.model.dtype].itemsize,
        validation_pixels=max(map(math.prod, request.validation.sizes())) if request.validation else 0,
        num_steps=training.steps or math.ceil(training.epochs * passes / training.accumulation),
        codec_bytes=codec[0], codec_width=codec[1],
    )  # fmt: skip


def encoder_cost(request: TrainRequest, family: Family) -> EncoderCost:
    """Counted on the meta device, quantised as the request asks, over the longest prompt there can be."""
    convert = text_converter(request.model.quantization, torch.device("meta"))
    encoder: Any = family.empty_text_encoder(request.model, convert).requires_grad_(False)
    blocks = max((part for part in encoder.modules() if isinstance(part, nn.ModuleList)), key=len)
    ids = torch.zeros(1, MAX_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlashShapes(), LiveBytes() as counter:
        width = encoder(ids, ids > 0).shape[-1]
    sizes = [bytes_of(*block.parameters(), *block.buffers()) for block in blocks]
    whole = bytes_of(*encoder.parameters(), *encoder.buffers())
    return EncoderCost(whole, sum(sizes), max(sizes), counter.peak, width, is_quantized=convert is not None)


def codec_cost(request: TrainRequest) -> tuple[int, float]:
    """Bytes of the VAE, which computes in fp32, and its width at full size as a share of the released one's."""
    vae: Any = empty_vae(request.model)
    return bytes_of(*vae.parameters()), vae.decoder.conv_out.in_channels / 128
