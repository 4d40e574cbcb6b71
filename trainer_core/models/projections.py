"""Linear layers that read the same input: queries, keys and values, and a single block's feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

# (input) -> each layer's output, or None where the layers have to be called one by one.
Together = Callable[[Tensor], "list[Tensor] | None"]


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return each layer's output for the same input x, (..., in).

    Layers whose products are joined (train/step/joined_lora.py) are computed together: fewer kernels to launch.
    """
    together: Together | None = getattr(layers[0], "together", None)
    outputs = together(x) if together is not None else None
    if outputs is not None:
        return outputs
    if x.ndim == 2 or not x.is_contiguous():
        return [layer(x) for layer in layers]
    rows = x.flatten(0, -2)  # once: layers flatten their input
    return [part.view(*x.shape[:-1], part.shape[-1]) for part in (layer(rows) for layer in layers)]


def projection_groups(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return the layers that each call of `project` in these blocks computes."""
    return [group for block in blocks for group in block.projections()]  # pyright: ignore[reportCallIssue]
