"""Which of the picture's tokens go through the middle blocks in a micro-batch: drawn anew for each, on the CPU (models/token_routing.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config.training import TrainingConfig
from ...models.latent_packing import pack, unpack
from ...models.token_routing import Route, num_kept
from ...seeds import generator


def draw_route(
    config: TrainingConfig, num_blocks: int, latents: Tensor, weight: Tensor | None, micro: int
) -> Route | None:
    """The route of micro-batch number `micro`; None where every token goes through everything.

    Each sample keeps equally many. Without weights all are equally likely; with them a token's chance grows with its weight:
    what counts w times as much is w times as likely to be drawn next, and what counts nothing only follows when all else is kept.

    Args:
        latents: (B, C, h, w): their shape alone counts. weight: of every place in the loss, (B, 1, h, w).
    Source: Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003: an exponential race, won by the earliest.
    """
    window = config.routed_blocks(num_blocks)
    if not window:
        return None
    batch, _, height, width = latents.shape
    num_tokens = height * width // 4
    draws = generator(config.seed, "route", micro)
    arrival = -torch.log1p(-torch.rand(batch, num_tokens, generator=draws, dtype=torch.float64))
    if weight is not None:
        arrival /= pack(weight).mean(2).double().clamp_min(torch.finfo(torch.float32).tiny)
    kept = arrival.argsort(dim=1, stable=True)[:, : num_kept(num_tokens, config.routed_share)]
    return Route(window[0], window[-1], kept.sort(dim=1).values)


def loss_weight_of_kept(route: Route, latents: Tensor, weight: Tensor | None) -> Tensor:
    """(B, 1, h, w): what each place counts in the loss, 0 where its token was skipped.

    A LoRA's base has never seen a route. What it makes of a skipped token is far off, and a LoRA that is to mend that learns less of
    the pictures (docs/decisions/0031; the paper, which trains from nothing, takes the loss of every place).

    Args: see drawn_route.
    """
    batch, _, height, width = latents.shape
    tokens = torch.zeros(batch, height * width // 4).scatter_(1, route.kept, 1.0)
    kept = unpack(tokens[:, :, None].expand(-1, -1, 4), height, width)
    return kept if weight is None else kept * weight
