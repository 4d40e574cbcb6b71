"""Choose which image tokens skip the middle blocks in a micro-batch (models/token_routing.py).

The route is sampled for each micro-batch, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config.training import TrainingConfig
from ...models.latent_packing import pack, unpack
from ...models.token_routing import Route, num_kept
from ...seeds import generator


def draw_route(
    config: TrainingConfig, num_blocks: int, latents: Tensor, weight: Tensor | None, micro: int, patch: int = 2
) -> Route | None:
    """Return the route of micro-batch number `micro`; None where every token goes through every block.

    Every sample keeps the same number of tokens. Without weights all tokens are equally likely to be kept. With
    weights a token of weight w is w times as likely to be selected next, and a token of weight 0 is selected only after
    all others.

    Source: Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003: an exponential race, won by the earliest.

    Args:
        latents: (B, C, h, w); only the shape is used.
        weight: weight of each position in the loss, (B, 1, h, w), or None.
        patch: edge of a token in latent cells.
    """
    window = config.routed_blocks(num_blocks)
    if not window:
        return None
    batch, _, height, width = latents.shape
    num_tokens = height * width // patch**2
    rng = generator(config.seed, "route", micro)
    arrival = -torch.log1p(-torch.rand(batch, num_tokens, generator=rng, dtype=torch.float64))
    if weight is not None:
        arrival /= pack(weight, patch).mean(2).double().clamp_min(torch.finfo(torch.float32).tiny)
    indices = arrival.argsort(dim=1, stable=True)[:, : num_kept(num_tokens, config.routed_share)]
    return Route(window[0], window[-1], indices.sort(dim=1).values)


def loss_weight_of_kept(route: Route, latents: Tensor, weight: Tensor | None, patch: int = 2) -> Tensor:
    """Return the weight of each position in the loss, (B, 1, h, w): 0 where its token skipped blocks.

    The base model was never trained with routes, and its prediction for a skipped token is far off. A LoRA that has to
    correct it learns less of the images (docs/decisions/0031). The paper, which trains from scratch, takes the loss of
    every position.

    Args:
        route: as `draw_route` returns it.
        latents: (B, C, h, w); only the shape is used.
        weight: weight of each position before routing, (B, 1, h, w), or None.
        patch: edge of a token in latent cells.
    """
    batch, _, height, width = latents.shape
    tokens = torch.zeros(batch, height * width // patch**2).scatter_(1, route.kept, 1.0)
    is_kept = unpack(tokens[:, :, None].expand(-1, -1, patch**2), height, width, patch)
    return is_kept if weight is None else is_kept * weight
