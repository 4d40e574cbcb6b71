"""Masks -> the weight of every place of a latent, once: content-keyed by the mask's bytes, its placement and the weight of black."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...config.dataset import DatasetConfig
from ...host import Host, PhaseProgress, PhaseStarted
from ...storage.atomic import sha256_text
from ...storage.digest_table import digests
from ...storage.tensor_store import Store, fill
from ..dataset import Unreadable
from ..masks import Masks
from ..sample_table import Sample
from ..source.decode import BrokenImage, decode_mask
from .latents import WORKERS, place_image

SLICE = 64  # masks that are made together; then progress is told


class MaskWeights:
    """The weight of every place of a sample, read from the store.

    Args:
        factor: pixels of an edge of a latent's place.
    """

    def __init__(self, masks: Masks, config: DatasetConfig, factor: int, store: Store):
        self.masks, self._store, self._factor = masks, store, factor
        self._black = [part.unmasked_weight for part in config.parts]

    def get(self, sample: Sample) -> Tensor:
        """(1, height / factor, width / factor), fp32, in [0, 1]; 1 all over for a sample without a mask."""
        mask = self.masks.of(sample)
        if mask is None:
            width, height = sample.placement.bucket
            return torch.ones(1, height // self._factor, width // self._factor)
        return self._store.get(self.key(mask))

    def key(self, mask: Sample) -> str:
        return sha256_text(
            "mask", mask.sha256, repr(mask.placement), str(self._factor), str(float(self._black[mask.part]))
        )

    def make(self, mask: Sample) -> Tensor:
        """weight = black + (1 - black) mask, with the mask in [0, 1] averaged over each place.

        Raises:
            OSError, BrokenImage: it can't be read, or gives every place the weight 0.
        """
        # Linear: the filter that pictures are resized by rings, and would give weight to places beside an edge.
        image = decode_mask(self.masks.read(mask))
        places = np.asarray(place_image(image, mask, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        height, width = (edge // self._factor for edge in places.shape)
        white = places.reshape(height, self._factor, width, self._factor).mean(axis=(1, 3))
        black = self._black[mask.part]
        weight = torch.from_numpy(black + (1 - black) * white).float()[None]
        if not weight.any():
            kept = " where the picture is kept" if image.getextrema() != (0, 0) else ""
            raise BrokenImage(f"it is black all over{kept}, so that nothing of the picture would be learnt")
        return weight


def cache_masks(masks: Masks, config: DatasetConfig, factor: int, store: Store, host: Host) -> MaskWeights:
    """Make what is missing.

    Raises:
        Cancelled: what was made is kept.
        Unreadable: pictures whose masks can't be used, all of them; the other masks are made and kept.
    """
    weights = MaskWeights(masks, config, factor, store)

    def made(number: int) -> tuple[str, Tensor | str]:
        mask = masks.samples[number]
        try:
            return weights.key(mask), weights.make(mask)
        except (OSError, BrokenImage) as error:
            return weights.key(mask), str(error)

    def make(absent: np.ndarray) -> Iterator[Mapping[str, Tensor]]:
        host.emit(PhaseStarted("latents", len(absent), "masks"))
        faults: dict[str, str] = {}
        with ThreadPoolExecutor(WORKERS) as pool:
            for start in range(0, len(absent), SLICE):
                host.check_cancelled()
                found = dict(pool.map(made, absent[start : start + SLICE].tolist()))
                faults |= {key: value for key, value in found.items() if isinstance(value, str)}
                yield {key: value for key, value in found.items() if isinstance(value, Tensor)}
                host.emit(PhaseProgress("latents", min(start + SLICE, len(absent)), len(absent)))
        if faults:  # of each picture: many may have masks of the same bytes
            told = ((mask, faults.get(weights.key(mask))) for mask in masks.samples)
            raise Unreadable({mask.key: f"its mask {mask.captions[0]}: {fault}" for mask, fault in told if fault})

    fill(store, digests(weights.key(mask) for mask in masks.samples), make)
    return weights
