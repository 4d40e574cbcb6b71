"""Token routing: in a training step some image tokens skip the middle blocks and rejoin the others after them.

Skipping tokens are unchanged. The remaining tokens go through with the text tokens, each at its own position in the
image. Attention is only computed between them, so these blocks cost as much as for a smaller image.

Source: Krause et al. 2025 (TREAD), arXiv:2501.04765.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which tokens go through which blocks.

    Args:
        first: Index of the first block that only the kept tokens go through. Double blocks are counted before single
            ones.
        last: Index of the last such block, included.
        kept: Indices of the kept tokens among the image tokens, (B, kept), int64, ascending in each row.
    """

    first: int
    last: int
    kept: Tensor

    def keeping(self, first: int, count: int) -> Route:
        """Return the route with `count` more kept tokens, from index `first` on: tokens after the image's own."""
        more = torch.arange(first, first + count, device=self.kept.device).expand(len(self.kept), -1)
        return replace(self, kept=torch.cat([self.kept, more], dim=1))


class Detour:
    """Applies a route in a forward pass. Call `at` before every block, and once after the last one.

    Args:
        route: The route. None: all tokens go through all blocks.
        positions: Cosines and sines of all tokens, (text + image tokens, head width) each.
        mask: None, or (B, text + image tokens).
        num_image: Number of image tokens.
    """

    def __init__(self, route: Route | None, positions: tuple[Tensor, Tensor], mask: Tensor | None, num_image: int):
        self.positions, self.mask = positions, mask  # of the tokens that the next block receives
        self._route, self._num_image = route, num_image
        self._all = positions, mask
        self._skipping: Tensor | None = None

    def at(self, place: int, tokens: Tensor) -> Tensor:
        """Return the input tokens of a block.

        Args:
            place: Index of the block.
            tokens: (B, tokens, width): image tokens, or text tokens followed by image tokens.
        """
        if self._route is None:
            return tokens
        if place == self._route.first:
            return self._leave(tokens, self._route.kept)
        if place == self._route.last + 1:
            return self._rejoin(tokens, self._route.kept)
        return tokens

    def _leave(self, tokens: Tensor, kept: Tensor) -> Tensor:
        (cosines, sines), mask = self._all
        indices = self._indices(kept, len(cosines) - self._num_image)
        self.positions = cosines[indices], sines[indices]
        self.mask = None if mask is None else mask.gather(1, indices)
        self._skipping = tokens
        rows = self._rows(kept, tokens.shape[1] - self._num_image)
        return tokens.flatten(0, 1).index_select(0, rows).unflatten(0, (len(kept), -1))

    def _rejoin(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Insert the processed tokens. No row is written twice, so outputs and gradients are deterministic."""
        self.positions, self.mask = self._all
        whole, self._skipping = self._skipping, None
        assert whole is not None
        num_text = tokens.shape[1] - kept.shape[1]
        if whole.shape[1] < num_text + self._num_image:  # the route began in a double block: `whole` has no text
            whole = torch.cat([tokens[:, :num_text], whole], dim=1)
        rows = self._rows(kept, num_text)
        return whole.flatten(0, 1).index_copy(0, rows, tokens.flatten(0, 1)).unflatten(0, (len(kept), -1))

    def _indices(self, kept: Tensor, num_text: int) -> Tensor:
        """Return the indices of text and kept tokens among a sample's tokens, (B, text + kept)."""
        text = torch.arange(num_text, device=kept.device).expand(len(kept), -1)
        return torch.cat([text, kept + num_text], dim=1)

    def _rows(self, kept: Tensor, num_text: int) -> Tensor:
        """Return the same indices among all tokens of the batch, with samples in sequence."""
        offsets = torch.arange(len(kept), device=kept.device)[:, None] * (num_text + self._num_image)
        return (self._indices(kept, num_text) + offsets).flatten()


def num_kept(num_tokens: int, routed_share: float) -> int:
    """Return the number of kept image tokens; at least one."""
    return max(1, round(num_tokens * (1 - routed_share)))
