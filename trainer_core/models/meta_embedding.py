"""A table of embeddings for models that are built without memory."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """torch's own, but on the meta device it begins with nothing.

    There are no numbers to draw there, and asked for them torch would load its compiler: 1.5 to 2 s of a start.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
