"""What is known of a run before it begins: of its pictures, its captions, its text encoder and its VAE. No weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.request import TrainRequest
from ..config.training import TrainingConfig
from ..data.dataset import Index
from ..data.sample_table import Sample, columns
from ..devices import DTYPES
from ..models.codec import empty_vae
from ..models.family import Family
from ..quant.loading import text_converter
from ..storage.digest_table import digests, first_of_each
from .cost_model import Shape
from .meta_counter import FlashShapes, MemoryTracker, bytes_of

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
class CodecCost:
    """weights: bytes of the VAE, which computes in fp32. width: its features at full size as a share of the released one's."""

    weights: int
    width: float


@dataclass(frozen=True)
class RunFacts:
    """What is known of the data and the files. largest: the bucket of most pixels.

    latent_pixels: pixels of all pictures, and of those they start from. prompts: number of distinct prompts. element_bytes: of an embedding's number.
    validation_pixels: of the largest picture that is drawn.
    prior: micro-batches with pictures that keep the model as it is.
    """

    largest: Shape
    latent_pixels: int
    prompts: int
    encoder: EncoderCost
    element_bytes: int
    validation_pixels: int
    num_steps: int
    codec: CodecCost
    prior: PriorShares


@dataclass(frozen=True)
class CaptionFacts:
    """longest: characters. distinct: how many are not the same."""

    longest: int
    distinct: int


def caption_facts(samples: Sequence[Sample]) -> CaptionFacts:
    """One look at every caption; none is kept."""
    longest = 0

    def keys() -> Iterator[str]:
        nonlocal longest
        for sample in samples:
            longest = max(longest, *map(len, sample.captions))
            yield from sample.captions

    distinct = len(first_of_each(digests(keys())))
    return CaptionFacts(longest, distinct)


def facts_of(
    request: TrainRequest,
    family: Family,
    index: Index,
    resolution: float,
    encoder: EncoderCost,
    codec: CodecCost,
    captions: CaptionFacts,
) -> RunFacts:
    """What the dataset and the settings say.

    Args:
        resolution: that the index's pictures were placed at; a lower one makes them smaller in proportion.
    """
    samples, training = index.samples, request.training
    ratio = request.dataset.parts[0].resolution / resolution
    rows = columns(samples)
    areas = rows["bucket"].prod(axis=1, dtype=np.int64)
    width, height = rows["bucket"][areas.argmax()].tolist()
    step = family.pixel_step
    size = [max(step, round(edge * ratio / step) * step) for edge in (width, height)]
    tokens = min(MAX_TOKENS, captions.longest // CHARACTERS_A_TOKEN + 2)
    repeats = np.array([part.repeats for part in request.dataset.parts])
    keeps = np.array([part.prior_preservation for part in request.dataset.parts])
    passes = int(repeats[rows["part"]].sum()) / training.batch_size
    return RunFacts(
        largest=Shape(size[0], size[1], training.batch_size, family.text_rows(request.model, tokens)),
        latent_pixels=int(int(areas.sum()) * ratio * ratio) * (2 if family.takes_references(request.model) else 1),
        prompts=captions.distinct + 1, encoder=encoder, element_bytes=DTYPES[request.model.dtype].itemsize,
        validation_pixels=max(map(math.prod, request.validation.sizes())) if request.validation else 0,
        num_steps=training.steps or math.ceil(training.epochs * passes / training.accumulation),
        codec=codec, prior=prior_shares(rows["bucket"], keeps[rows["part"]], repeats[rows["part"]], training.batch_size),
    )  # fmt: skip


def encoder_cost(request: TrainRequest, family: Family) -> EncoderCost:
    """Counted on the meta device, quantised as the request asks, over the longest prompt there can be."""
    convert = text_converter(request.model.quantization, torch.device("meta"))
    encoder: Any = family.empty_text_encoder(request.model, convert).requires_grad_(False)
    blocks = max((part for part in encoder.modules() if isinstance(part, nn.ModuleList)), key=len)
    ids = torch.zeros(1, MAX_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlashShapes(), MemoryTracker() as counter:
        width = encoder(ids)[0].shape[-1]  # a prompt that long has no pads to mask
    sizes = [bytes_of(*block.parameters(), *block.buffers()) for block in blocks]
    whole = bytes_of(*encoder.parameters(), *encoder.buffers())
    return EncoderCost(whole, sum(sizes), max(sizes), counter.peak, width, is_quantized=convert is not None)


def codec_cost(request: TrainRequest) -> CodecCost:
    """Counted on the meta device."""
    vae: Any = empty_vae(request.model)
    return CodecCost(bytes_of(*vae.parameters()), vae.decoder.conv_out.in_channels / 128)


@dataclass(frozen=True)
class PriorShares:
    """Of all micro-batches, those with any picture that keeps the model as it is, and those of such pictures alone."""

    some: float = 0.0
    only: float = 0.0


def prior_shares(buckets: np.ndarray, is_prior: np.ndarray, repeats: np.ndarray, batch_size: int) -> PriorShares:
    """Expected over the orders that data/batch_sampler.py draws: each bucket's samples shuffled and cut into batches, the last one smaller.

    Args:
        buckets: (samples, 2), width and height. is_prior: (samples,), bool. repeats: (samples,).
    """
    if not is_prior.any():
        return PriorShares()
    _, kind = np.unique(buckets, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    total = np.bincount(kind, repeats).astype(np.int64)
    kept = np.bincount(kind, repeats * is_prior).astype(np.int64)
    batches = some = only = 0.0
    for members, prior in zip(total.tolist(), kept.tolist(), strict=True):
        full, rest = divmod(members, batch_size)
        for count, size in ((full, batch_size), (int(rest > 0), rest)):
            if count:
                batches += count
                some += count * (1 - _chance(members - prior, members, size))
                only += count * _chance(prior, members, size)
    return PriorShares(some / batches, only / batches)


def _chance(wanted: int, members: int, size: int) -> float:
    """That so many different members are all wanted ones: prod (wanted - i) / (members - i)."""
    return float(np.prod((wanted - np.arange(size)).clip(0) / (members - np.arange(size))))


def rollout_passes(training: TrainingConfig, shares: PriorShares) -> float:
    """Of one micro-batch, on average. A batch of nothing but pictures that keep the model as it is has no rollout."""
    return (1 - shares.only) * training.rollout_probability * (1 + training.rollout_steps) / 2
