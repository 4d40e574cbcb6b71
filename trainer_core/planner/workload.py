"""Facts about a run before it starts: its images, captions, text encoder and VAE. No weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.request import TrainRequest
from ..config.training import TrainingConfig
from ..data.batch_sampler import BatchPlan
from ..data.dataset import Index
from ..data.holdout import num_held, split
from ..data.sample_table import Sample, columns
from ..devices import DTYPES
from ..models.family import Family
from ..quant.loading import text_converter
from ..storage.digest_table import digests, first_of_each
from ..validation.scores.score_model import ScoreCost, score_cost
from .cost_model import Shape
from .meta_counter import FlashShapes, MemoryTracker, bytes_of

CHARACTERS_A_TOKEN = 3  # of T5 on captions; English has four or more, so this overestimates the tokens
CHARACTERS_A_WORD = 5  # with a space: a lower bound of the tokens
MAX_TOKENS = 512


@dataclass(frozen=True)
class EncoderCost:
    """Cost of a text encoder after its quantization, in bytes."""

    weights: int  # all weights
    blocks: int  # weights of its repeated blocks
    largest_block: int  # weights of the largest block
    work: int  # temporary memory for the longest prompt
    width: int  # features of a token
    is_quantized: bool
    flops: int = 0  # of the longest prompt


@dataclass(frozen=True)
class CodecCost:
    """Cost of the VAE."""

    weights: int  # bytes, in fp32
    width: float  # width at full size as a share of the released one's


@dataclass(frozen=True)
class RunFacts:
    """Facts about the data and the models of a run."""

    largest: Shape  # the bucket with the most pixels
    encoded_pixels: int  # of all images at training size, and of their reference images
    latent_bytes: int  # of their latents in the cache: fp32, or pixels in 8 bits
    prompts: int  # number of distinct prompts
    encoder: EncoderCost
    element_bytes: int  # bytes of an element of a text embedding
    validation_pixels: int  # pixels of the largest validation image
    num_steps: int
    codec: CodecCost
    prior: PriorShares  # micro-batches with prior preservation
    image_sizes: int = 1  # distinct sizes of the buckets and of the validation images
    eval_images: int = 0  # images whose loss is measured before and after training, or at a checkpoint
    text_tokens: int = 0  # of all distinct prompts together, estimated
    validation_passes: int = 0  # forward passes of all validation images of the run
    score: ScoreCost = field(default_factory=ScoreCost)  # of the model that scores validation images


@dataclass(frozen=True)
class CaptionFacts:
    """Facts about all captions of a dataset."""

    longest: int  # characters of the longest caption
    distinct: int  # number of distinct captions
    mean: float = 0.0  # characters of a caption


def caption_facts(samples: Sequence[Sample]) -> CaptionFacts:
    """Read every caption once. None stays in memory."""
    longest = count = total = 0

    def keys() -> Iterator[str]:
        nonlocal longest, count, total
        for sample in samples:
            lengths = [*map(len, sample.captions)]
            longest, count, total = max(longest, *lengths), count + len(lengths), total + sum(lengths)
            yield from sample.captions

    distinct = len(first_of_each(digests(keys())))
    return CaptionFacts(longest, distinct, total / max(1, count))


def facts_of(
    request: TrainRequest,
    family: Family,
    index: Index,
    resolution: float,
    encoder: EncoderCost,
    codec: CodecCost,
    captions: CaptionFacts,
) -> RunFacts:
    """Return the facts about the dataset and the settings.

    Args:
        resolution: resolution at which the index assigned the images to buckets. If the request has a lower one, the
            images are assumed to be smaller in proportion.
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
    preserves_prior = np.array([part.prior_preservation for part in request.dataset.parts])
    num_prompts = captions.distinct * (2 if training.preservation else 1) + 1
    is_flipped = np.array([part.flip > 0 for part in request.dataset.parts])[rows["part"]]
    encoded_area = int(areas.sum()) + int(areas[is_flipped].sum())  # mirrored images have latents of their own
    pixels = int(encoded_area * ratio * ratio) * (2 if family.takes_references(request.model) else 1)
    num_steps = training.steps or -(
        -training.epochs * batches_per_epoch(samples, repeats, training) // training.accumulation
    )
    validation_sizes = request.validation.sizes() if request.validation else []
    return RunFacts(
        largest=Shape(size[0], size[1], training.batch_size, family.text_rows(request.model, tokens)),
        encoded_pixels=pixels, latent_bytes=pixels // family.latent_factor**2 * family.latent_channels * (1 if family.latent_factor == 1 else 4),
        prompts=num_prompts, encoder=encoder, element_bytes=DTYPES[request.model.dtype].itemsize,
        validation_pixels=max(map(math.prod, validation_sizes), default=0),
        num_steps=num_steps,
        codec=codec,
        prior=prior_shares(
            rows["bucket"], preserves_prior[rows["part"]], repeats[rows["part"]], training.batch_size
        ),
        image_sizes=len({*map(tuple, rows["bucket"].tolist()), *validation_sizes}),
        eval_images=evaluated_images(training, samples),
        text_tokens=num_prompts * family.text_rows(request.model, int(captions.mean) // CHARACTERS_A_WORD + 1),
        validation_passes=validation_passes(request, num_steps),
        score=score_cost(request.validation),
    )  # fmt: skip


def batches_per_epoch(samples: Sequence[Sample], repeats: np.ndarray, training: TrainingConfig) -> int:
    """Return the micro-batches of an epoch. Each bucket's last one may be smaller, and held-out images are in none.

    Args:
        repeats: of each part.
    """
    rows = columns(split(samples, training.holdout)[0])
    return BatchPlan(rows["bucket"], repeats[rows["part"]], training.batch_size, training.seed).batches_per_epoch


def evaluated_images(training: TrainingConfig, samples: Sequence[Sample]) -> int:
    """Return the images of an evaluation: held-out ones and trained ones, or trained ones alone."""
    num_held_out = num_held(samples, training.holdout)
    trained = min(training.eval_images, len(samples) - num_held_out)
    return min(training.eval_images, num_held_out) + trained


def validation_passes(request: TrainRequest, num_steps: int) -> int:
    """Return the forward passes of all validation images: before, during and after the training."""
    settings, every = request.validation, request.training.validate_every
    if settings is None:
        return 0
    times = (num_steps - 1) // every if every else 0
    grids = 1 + (times + 1) * len(settings.strengths())
    images = len(settings.library()) * len(settings.sizes())
    return grids * images * settings.steps * (2 if settings.cfg > 1 else 1)


def encoder_cost(request: TrainRequest, family: Family) -> EncoderCost:
    """Count the text encoder on the meta device, quantized as requested, for the longest possible prompt."""
    convert = text_converter(request.model.quantization, torch.device("meta"), request.model.text_encoder_file)
    encoder: Any = family.empty_text_encoder(request.model, convert).requires_grad_(False)
    blocks = max((part for part in encoder.modules() if isinstance(part, nn.ModuleList)), key=len)
    ids = torch.zeros(1, MAX_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlashShapes(), MemoryTracker() as counter:
        width = encoder(ids)[0].shape[-1]  # a prompt that long has no pads to mask
    sizes = [bytes_of(*block.parameters(), *block.buffers()) for block in blocks]
    whole = bytes_of(*encoder.parameters(), *encoder.buffers())
    return EncoderCost(whole, sum(sizes), max(sizes), counter.peak, width, convert is not None, counter.flops)


def codec_cost(request: TrainRequest, family: Family) -> CodecCost:
    """Count the VAE on the meta device. A model that works on pixels has none, which costs nothing."""
    vae: Any = family.empty_codec(request.model)
    if vae is None:
        return CodecCost(0, 0.0)
    return CodecCost(bytes_of(*vae.parameters()), vae.decoder.conv_out.in_channels / 128)


@dataclass(frozen=True)
class PriorShares:
    """Shares of all micro-batches, by their images with prior preservation."""

    some: float = 0.0  # with at least one such image
    only: float = 0.0  # with such images alone


def prior_shares(buckets: np.ndarray, is_prior: np.ndarray, repeats: np.ndarray, batch_size: int) -> PriorShares:
    """Return the expected shares over the orders of data/batch_sampler.py.

    It shuffles each bucket's samples and cuts them into batches, of which the last one may be smaller.

    Args:
        buckets: width and height of each sample's bucket, (samples, 2).
        is_prior: which samples have prior preservation, (samples,), bool.
        repeats: repeats of each sample, (samples,).
    """
    if not is_prior.any():
        return PriorShares()
    _, kind = np.unique(buckets, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    total = np.bincount(kind, repeats).astype(np.int64)
    num_prior = np.bincount(kind, repeats * is_prior).astype(np.int64)
    batches = some = only = 0.0
    for members, prior in zip(total.tolist(), num_prior.tolist(), strict=True):
        full, rest = divmod(members, batch_size)
        for count, size in ((full, batch_size), (int(rest > 0), rest)):
            if count:
                batches += count
                some += count * (1 - _chance_of_all(members - prior, members, size))
                only += count * _chance_of_all(prior, members, size)
    return PriorShares(some / batches, only / batches)


def _chance_of_all(matching: int, members: int, size: int) -> float:
    """Return the probability that `size` distinct members are all matching: prod (matching - i) / (members - i)."""
    return float(np.prod((matching - np.arange(size)).clip(0) / (members - np.arange(size))))


def rollout_passes(training: TrainingConfig, shares: PriorShares) -> float:
    """Return the average rollout passes of a micro-batch. A batch of prior-preservation images alone has no rollout."""
    return (1 - shares.only) * training.rollout_probability * (1 + training.rollout_steps) / 2
