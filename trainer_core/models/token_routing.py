"""Token routing: in a training step some of the picture's tokens skip the middle blocks, unchanged, and rejoin the others behind them.

What is kept goes through with the text, each token at its own place in the picture. Attention between it is all there is to compute,
so that the blocks cost what a smaller picture's would.

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
        first, last: places of the blocks that only what is kept goes through, both included, double blocks counted before single ones.
        kept: (B, kept), int64, rising in each row: places among the picture's tokens.
    """

    first: int
    last: int
    kept: Tensor

    def keeping(self, first: int, count: int) -> Route:
        """The same, with `count` more tokens kept from place `first` on: those behind a picture's own."""
        more = torch.arange(first, first + count, device=self.kept.device).expand(len(self.kept), -1)
        return replace(self, kept=torch.cat([self.kept, more], dim=1))


class Detour:
    """Where a forward pass is on its route: call `at` before every block, and once behind the last one.

    Args:
        route: None lets every token through everything.
        positions: cosines and sines of all tokens, (text + image tokens, head width) each.
        mask: None, or (B, text + image tokens).
        num_image: of a picture's tokens.
    """

    def __init__(self, route: Route | None, positions: tuple[Tensor, Tensor], mask: Tensor | None, num_image: int):
        self.positions, self.mask = positions, mask  # of the tokens that the next block sees
        self._route, self._num_image = route, num_image
        self._whole = positions, mask
        self._aside: Tensor | None = None

    def at(self, place: int, tokens: Tensor) -> Tensor:
        """The tokens that block `place` gets.

        Args:
            tokens: (B, tokens, width), the picture's or text and the picture's behind it.
        """
        if self._route is None:
            return tokens
        if place == self._route.first:
            return self._left(tokens, self._route.kept)
        if place == self._route.last + 1:
            return self._joined(tokens, self._route.kept)
        return tokens

    def _left(self, tokens: Tensor, kept: Tensor) -> Tensor:
        (cosines, sines), mask = self._whole
        places = self._places(kept, len(cosines) - self._num_image)
        self.positions = cosines[places], sines[places]
        self.mask = None if mask is None else mask.gather(1, places)
        self._aside = tokens
        rows = self._rows(kept, tokens.shape[1] - self._num_image)
        return tokens.flatten(0, 1).index_select(0, rows).unflatten(0, (len(kept), -1))

    def _joined(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """No row is written twice, so that this and its gradients are the same bytes each time."""
        self.positions, self.mask = self._whole
        whole, self._aside = self._aside, None
        assert whole is not None
        num_text = tokens.shape[1] - kept.shape[1]
        if (
            whole.shape[1] < num_text + self._num_image
        ):  # they left in a double block, where the text is not among the tokens
            whole = torch.cat([tokens[:, :num_text], whole], dim=1)
        rows = self._rows(kept, num_text)
        return whole.flatten(0, 1).index_copy(0, rows, tokens.flatten(0, 1)).unflatten(0, (len(kept), -1))

    def _places(self, kept: Tensor, num_text: int) -> Tensor:
        """(B, text + kept): of what goes on, in a sample's tokens."""
        text = torch.arange(num_text, device=kept.device).expand(len(kept), -1)
        return torch.cat([text, kept + num_text], dim=1)

    def _rows(self, kept: Tensor, num_text: int) -> Tensor:
        """The same in all tokens of the batch, one sample's behind the other's."""
        begins = torch.arange(len(kept), device=kept.device)[:, None] * (num_text + self._num_image)
        return (self._places(kept, num_text) + begins).flatten()


def num_kept(num_tokens: int, routed_share: float) -> int:
    """Of a picture's tokens; at least one."""
    return max(1, round(num_tokens * (1 - routed_share)))
