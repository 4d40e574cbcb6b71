"""An embedding layer for models that are created on the meta device."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """torch's nn.Embedding without initialization on the meta device.

    There is nothing to initialize there, but torch would load its compiler for it: 1.5 to 2 s of startup time.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
