"""Exponential moving average (EMA) of the trained weights, which is less noisy than the weights themselves.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + n) / (10 + n)) after n updates

The warm-up reduces the influence of the first, untrained weights. Source: TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .inject import trainable_parameters
from .layer import AdapterLayer

COUNT = "num_updates"


class Ema:
    """Averages in fp32, on the parameters' device.

    Args:
        layers: Layers whose trainable weights are averaged. The average starts at their current values.
        decay: In (0, 1). The average spans about 1 / (1 - decay) steps.
        on_host: The averages are in RAM, for the weights of a whole model. Each step copies the weights there, one by
            one.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], decay: float, on_host: bool = False):
        assert 0 < decay < 1, decay
        self.decay, self.on_host = decay, on_host
        self.begin_(layers)

    def begin_(self, layers: Mapping[str, AdapterLayer]) -> None:
        """Restart the average at the layers' current values."""
        self.num_updates = 0
        self.averages = {
            name: p.detach().to("cpu" if self.on_host else p.device, torch.float32, copy=True)
            for name, p in trainable_parameters(layers)
        }

    def decay_now(self) -> float:
        """Return d of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update_(self, layers: Mapping[str, AdapterLayer]) -> None:
        """Update the average with the weights after a step."""
        decay = self.decay_now()
        parameters = dict(trainable_parameters(layers))
        averages = list(self.averages.values())
        if self.on_host:
            for name, average in self.averages.items():
                average.lerp_(parameters[name].detach().cpu().float(), 1 - decay)
        else:
            weights = [parameters[name].detach().float() for name in self.averages]
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.num_updates += 1

    @contextmanager
    def applied(self, layers: Mapping[str, AdapterLayer]) -> Iterator[None]:
        """Context manager that copies the averages into the layers, then restores the trained weights bit for bit."""
        parameters = dict(trainable_parameters(layers))
        trained = {
            name: parameter.detach().to("cpu" if self.on_host else parameter.device, copy=True)
            for name, parameter in parameters.items()
        }
        _copy_(parameters, self.averages)
        try:
            yield
        finally:
            _copy_(parameters, trained)

    def ema_state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: the averages by parameter name and the number of updates, on the CPU.

        They are copies, but with on_host the averages themselves, which change with the next step.
        """
        averages = {name: average.to("cpu", copy=not self.on_host) for name, average in self.averages.items()}
        return {**averages, COUNT: torch.tensor(self.num_updates)}

    def load_ema_state_(self, state: Mapping[str, Tensor]) -> None:
        """Load what ema_state returned."""
        assert state.keys() == {*self.averages, COUNT}, (
            f"other layers: {sorted(state.keys() ^ {*self.averages, COUNT})[:3]}"
        )
        self.num_updates = int(state[COUNT])
        for name, average in self.averages.items():
            average.copy_(state[name])


@torch.no_grad()
def _copy_(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
