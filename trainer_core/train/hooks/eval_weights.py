"""The weights for export and validation, where they differ from the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ...optim.optimizer import evaluating
from ..step.state import TrainState


@contextmanager
def final_weights(state: TrainState) -> Iterator[None]:
    """Within the context, the layers hold the averaged weights, of the run's EMA or of an optimizer that averages.

    After it they hold the trained weights again, bit by bit. May be nested.
    """
    with evaluating(state.optimizer), state.ema.applied(state.layers) if state.ema is not None else nullcontext():
        yield
