"""The weights that are saved and drawn, where they are not those that learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ...optim.optimizer import evaluating
from ..step.state import TrainState


@contextmanager
def final_weights(state: TrainState) -> Iterator[None]:
    """While it is open the layers hold the average, of the run's own or of an optimiser that averages; then those that learn, to the bit.

    May be nested.
    """
    with evaluating(state.optimizer), state.ema.applied(state.layers) if state.ema is not None else nullcontext():
        yield
