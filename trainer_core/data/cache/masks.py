"""Cache the loss weights of latent positions, keyed by mask bytes, placement and the weight of black."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...config.dataset import DatasetConfig
from ...distributed.ranks import ALONE, Ranks
from ...host import Host, PhaseProgress, PhaseStarted
from ...storage.atomic import sha256_text
from ...storage.digest_table import digests
from ...storage.stored_names import key_text
from ...storage.tensor_store import Store, fill
from ..dataset import Unreadable
from ..masks import Masks
from ..sample_table import Sample
from ..source.decode import BrokenImage, decode_mask
from .changed import Changed, check_unchanged, refuse_changed
from .latents import WORKERS, place_image

SLICE = 64  # masks that are computed between two progress reports


class MaskWeights:
    """The loss weight of every latent position of a sample, read from the store.

    Args:
        masks: The masks.
        config: The dataset's settings, with unmasked_weight for each part.
        factor: Pixels along the edge of a latent position.
        store: Where weights are stored.
    """

    def __init__(self, masks: Masks, config: DatasetConfig, factor: int, store: Store):
        self.masks, self._store, self._factor = masks, store, factor
        self._black = [part.unmasked_weight for part in config.parts]

    def get(self, sample: Sample) -> Tensor:
        """Return the weights, (1, height / factor, width / factor), fp32, in [0, 1].

        They are 1 for a sample without a mask.
        """
        mask = self.masks.of(sample)
        if mask is None:
            width, height = sample.placement.bucket
            return torch.ones(1, height // self._factor, width // self._factor)
        weights = self._store.get(self.key(mask))
        return weights.flip(-1) if sample.is_mirrored else weights

    def key(self, mask: Sample) -> str:
        """Return the key of a mask's weights in the store."""
        return sha256_text(
            "mask", mask.sha256, key_text(mask.placement), str(self._factor), str(float(self._black[mask.part]))
        )

    def make(self, mask: Sample) -> Tensor:
        """Compute weight = black + (1 - black) mask, with the mask in [0, 1] averaged over each latent position.

        Raises:
            OSError: The mask can't be read.
            BrokenImage: It can't be decoded, or all of its weights are 0.
            Changed: It was replaced since it was scanned.
        """
        # Bilinear: Lanczos, which resizes images, rings and would give weight to pixels next to an edge.
        raw = self.masks.read(mask)
        image = decode_mask(raw)
        check_unchanged(raw, mask)
        values = np.asarray(place_image(image, mask, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        height, width = (edge // self._factor for edge in values.shape)
        white = values.reshape(height, self._factor, width, self._factor).mean(axis=(1, 3))
        black = self._black[mask.part]
        weight = torch.from_numpy(black + (1 - black) * white).float()[None]
        if not weight.any():
            where = " in the part of the image that is used" if image.getextrema() != (0, 0) else ""
            raise BrokenImage(f"it is entirely black{where}, so nothing of the image would be trained on")
        return weight


def cache_masks(
    masks: Masks, config: DatasetConfig, factor: int, store: Store, host: Host, ranks: Ranks = ALONE
) -> MaskWeights:
    """Compute the weights that are missing, shared out over the ranks.

    Raises:
        Cancelled: Weights computed so far are stored.
        Unreadable: All images whose masks can't be used; the weights of the others are computed and stored.
        UserError: Masks were replaced since they were scanned.
    """
    weights = MaskWeights(masks, config, factor, store)
    faults: dict[str, str] = {}

    def compute(number: int) -> tuple[str, Tensor | str]:
        mask = masks.samples[number]
        try:
            return weights.key(mask), weights.make(mask)
        except (OSError, BrokenImage, Changed) as error:
            return weights.key(mask), str(error)

    def make(absent: np.ndarray) -> Iterator[Mapping[str, Tensor]]:
        host.emit(PhaseStarted("latents", len(absent), "masks"))
        with ThreadPoolExecutor(WORKERS) as pool:
            for start in ranks.deal(range(0, len(absent), SLICE)):
                host.check_cancelled()
                results = dict(pool.map(compute, absent[start : start + SLICE].tolist()))
                faults.update({key: value for key, value in results.items() if isinstance(value, str)})
                yield {key: value for key, value in results.items() if isinstance(value, Tensor)}
                host.emit(PhaseProgress("latents", min(start + SLICE, len(absent)), len(absent)))

    fill(store, digests(weights.key(mask) for mask in masks.samples), make, workers=ranks.as_workers)
    if faults := ranks.merge(faults):  # report each image: several may have masks of the same bytes
        by_mask = [(mask, fault) for mask in masks.samples if (fault := faults.get(weights.key(mask)))]
        refuse_changed({f"mask {mask.captions[0]}": fault for mask, fault in by_mask})
        raise Unreadable({mask.key: f"its mask {mask.captions[0]}: {fault}" for mask, fault in by_mask})
    return weights
