"""Cache the latents of images, keyed by the image's bytes, its placement and the codec."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...distributed.ranks import ALONE, Ranks
from ...host import Host, PhaseProgress, PhaseStarted
from ...storage.atomic import sha256_text
from ...storage.digest_table import digests
from ...storage.stored_names import key_text
from ...storage.tensor_store import Store, fill
from ..buckets import Placement
from ..dataset import Index, Unreadable
from ..sample_table import Sample, columns
from ..source.decode import BrokenImage, decode
from .changed import Changed, check_unchanged, refuse_changed

BATCH_PIXELS = 1 << 20  # pixels encoded at once: one image of 1024 px, or 256 of 64 px
LARGEST_BATCH = 8
LARGEST_RESIZE = 8  # an image is resized as a whole if the result has at most 8 times its bucket's pixels
LANCZOS_RADIUS = 3  # pixels that Pillow's widest filter reads on each side, at the output's scale if that is smaller
WORKERS = max(2, min(6, (os.cpu_count() or 2) - 1))  # decode images while the codec runs; a GPU is faster than 1 or 2


class Change(Protocol):
    """What is made of images: see reference_images.py."""

    def change(self, image: Image.Image, start: Sample, /) -> Image.Image: ...

    def identify(self, digest: str, start: Sample, /) -> str: ...


class Codec(Protocol):
    """See models/family.py: ImageCodec."""

    def encode(self, pixels: Tensor) -> Tensor: ...


class LatentCache:
    """The latent of every sample, read from the store."""

    def __init__(self, store: Store, identity: str):
        self._store, self._identity = store, identity

    def get(self, sample: Sample) -> Tensor:
        """Return the latent, (channels, height / factor, width / factor), fp32, normalized."""
        latent = self._store.get(latent_key(sample, self._identity))
        return latent.float() / 127.5 - 1 if latent.dtype == torch.uint8 else latent


def latent_key(sample: Sample, identity: str) -> str:
    """Return the key of a sample's latent in the store."""
    mirrored = ("mirrored",) if sample.is_mirrored else ()
    return sha256_text("latent", sample.sha256, key_text(sample.placement), identity, *mirrored)


def cache_latents(
    index: Index,
    identity: str,
    load: Callable[[], Codec],
    store: Store,
    host: Host,
    largest_batch: int = LARGEST_BATCH,
    change: Change | None = None,
    ranks: Ranks = ALONE,
    are_pixels: bool = False,
) -> LatentCache:
    """Encode the images whose latents are missing. The codec is loaded only if there are any.

    Args:
        index: The dataset.
        identity: Identity of the codec: Family.identity(model, "codec").
        load: Loads the codec.
        store: Where latents are stored.
        host: Receives progress.
        largest_batch: Images encoded at once. 1 is best on a CPU, where a batch of 8 takes 1.3 times as long.
        change: Its `change` is applied to each image after it is resized and cropped. The sample's sha256 must be the one
            that `identify` returns for that of the image.
        ranks: Processes that share out the batches. A batch has the same images, whoever encodes it.
        are_pixels: The codec returns the pixels of the images, which are stored in 8 bits: exactly, in a quarter of the
            space.
    Raises:
        Cancelled: Between two batches; latents encoded so far are stored.
        Unreadable: All images that can't be decoded; the others are encoded and stored.
        UserError: Images were replaced since the index was made; the others are encoded and stored.
    """

    faults: dict[str, str] = {}

    def make(absent: np.ndarray) -> Iterator[Mapping[str, Tensor]]:
        host.emit(PhaseStarted("latents", len(absent), "images"))
        codec = load()
        done = 0
        batches = ranks.deal(_batches(index.samples, absent, largest_batch))
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting = [pool.submit(_pixels, index, batch, change) for batch in islice(batches, WORKERS)]
            while waiting:
                host.check_cancelled()
                batch, pixels, broken = waiting.pop(0).result()
                faults.update(broken)
                waiting += [pool.submit(_pixels, index, batch, change) for batch in islice(batches, 1)]
                done += len(batch) + len(broken)
                if batch:
                    size = images_per_batch(batch[0].placement.bucket, largest_batch)
                    with torch.no_grad():
                        latents = codec.encode(_pad_batch(torch.stack(pixels), size)).float()
                    if are_pixels:
                        latents = ((latents + 1) * 127.5).round().byte()
                    yield {
                        latent_key(sample, identity): latent.clone()
                        for sample, latent in zip(batch, latents, strict=False)  # without the padding
                    }
                host.emit(PhaseProgress("latents", min(done * ranks.local_size, len(absent)), len(absent)))

    keys = digests(latent_key(sample, identity) for sample in index.samples)
    fill(store, keys, make, workers=ranks.as_workers)
    if faults := ranks.merge(faults):
        refuse_changed(faults)
        raise Unreadable(faults)
    return LatentCache(store, identity)


def _batches(samples: Sequence[Sample], numbers: np.ndarray, largest: int) -> Iterator[list[Sample]]:
    """Yield batches of the samples with these indices, each from one bucket and of at most BATCH_PIXELS pixels."""
    buckets = columns(samples)["bucket"][numbers]
    kinds, kind_of = np.unique(buckets, axis=0, return_inverse=True)  # sorted in the order of Python tuples
    for kind, (width, height) in enumerate(kinds.tolist()):
        same = numbers[kind_of.reshape(-1) == kind]
        size = images_per_batch((width, height), largest)
        for start in range(0, len(same), size):
            yield [samples[i] for i in same[start : start + size].tolist()]


def images_per_batch(bucket: tuple[int, int], largest: int = LARGEST_BATCH) -> int:
    """Return how many images of a bucket are encoded at once."""
    return min(largest, max(1, BATCH_PIXELS // (bucket[0] * bucket[1])))


def _pad_batch(pixels: Tensor, size: int) -> Tensor:
    """Pad the batch to a fixed size by repeating the last image.

    The last bits of a latent depend on the batch size (2e-6 at 64 px). Without padding the LoRA's bytes would depend on
    which other latents happened to be missing from the cache.
    """
    return torch.cat([pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)])


def _pixels(
    index: Index, batch: Sequence[Sample], change: Change | None
) -> tuple[list[Sample], list[Tensor], dict[str, str]]:
    """Return the samples that can be decoded, (3, H, W) in [-1, 1] of each, and why the others can't."""
    decoded: list[Sample] = []
    pixels: list[Tensor] = []
    faults: dict[str, str] = {}
    for sample in batch:
        try:
            raw = index.read(sample)
            whole = decode(raw)
            check_unchanged(raw, sample, change.identify if change else None)
            image = place_image(whole, sample)
            image = change.change(image, sample) if change else image
            pixels.append(to_tensor(ImageOps.mirror(image) if sample.is_mirrored else image))
            decoded.append(sample)
        except Changed as error:
            faults[sample.key] = str(error)
        except (OSError, BrokenImage) as error:
            faults[sample.key] = f"can't be decoded: {error}"
    return decoded, pixels, faults


def place_image(
    image: Image.Image, sample: Sample, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return the image resized and cropped to its bucket.

    If the image is many times longer than its bucket, only the part that is used is computed: resized as a whole,
    10000 x 10 pixels at 1024 would take 790 MB.
    """
    placement = sample.placement
    (left, top), (width, height) = placement.crop, placement.bucket
    if placement.resize[0] * placement.resize[1] > LARGEST_RESIZE * width * height:
        return _resize_part(image, placement, resample)
    resized = image if image.size == placement.resize else image.resize(placement.resize, resample)
    return resized.crop((left, top, left + width, top + height))


def _resize_part(image: Image.Image, placement: Placement, resample: Image.Resampling) -> Image.Image:
    """Resize only the bucket's part of the image, accurate to 1 of 255 levels.

    The image is first cropped to that part plus the margin that the filter reads.
    """
    spans = []
    for edge, resize, start, length in zip(image.size, placement.resize, placement.crop, placement.bucket, strict=True):
        scale = edge / resize
        around = LANCZOS_RADIUS * max(1.0, scale) + 1
        low, high = start * scale, min(edge, (start + length) * scale)
        first, last = max(0, math.floor(low - around)), min(edge, math.ceil(high + around))
        spans.append((first, last, low - first, min(high, last) - first))
    (left, right, x0, x1), (top, bottom, y0, y1) = spans
    part = image.crop((left, top, right, bottom))
    return part.resize(placement.bucket, resample, (x0, y0, x1, y1))


def to_tensor(image: Image.Image) -> Tensor:
    """Return the image as (3, H, W) in [-1, 1], fp32."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
