"""Full-rank training: a layer's own parameters are trained, in the model's precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..adapters.layer import AdapterLayer, Start, Update


class Moved(Protocol):
    """The product of a layer whose parameters are in RAM, see offloaded_layer.py.

    Attributes:
        homes: The parameters in RAM, by name.
        stepper: The StepInBackward that steps them.
    """

    homes: dict[str, nn.Parameter]
    stepper: Any

    def __call__(self, x: Tensor) -> Tensor: ...


class TrainedLayer(AdapterLayer):
    """A layer whose own parameters are trained. There is no copy of the original ones.

    It takes the place of a Linear. Beside a norm or a convolution, which stays where it is, it only names the parameters.
    `strength` has no effect: setup/full_rank_check.py refuses what needs the base model beside the trained one. Images and
    losses of the base model are measured before the first step.

    Args:
        base: The layer. Its parameters get memory of their own, because they may be mapped from a file, or be rows of a
            fused weight there.
    """

    inits = ("default",)
    is_copied: ClassVar[bool] = True
    moved: Moved | None = None  # where its parameters are in RAM

    def __init__(self, base: Any, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        for part, value in [*base.named_parameters(recurse=False)]:
            setattr(base, part, nn.Parameter(value.detach().clone() if self.is_copied else value.detach()))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.moved.homes.items()) if self.moved else self.base.named_parameters(recurse=False)

    def parts_of_base(self) -> frozenset[str]:
        """Biases and the scales of norms, which are not decayed (docs/decisions/0091)."""
        return frozenset(name for name, parameter in self.trainable() if parameter.ndim < 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.moved(x) if self.moved else self.base(x)

    @property
    def summed_base(self) -> nn.Linear | None:
        """None: the gradient of the weight reads the layer's input, so a recomputed block computes the layer too."""
        return None

    def start_(self, start: Start) -> None:
        """Do nothing: the training starts from the model as it is."""

    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        raise NotImplementedError("a trained weight is no update; setup/full_rank_check.py refuses init_lora")

    def update(self) -> Update:
        raise NotImplementedError("a trained weight is no update; lora_tools/extract.py makes one")


def give_stepper_(layers: Iterable[AdapterLayer], stepper: Any) -> None:
    """Let layers whose parameters are in RAM step there. stepper: a StepInBackward."""
    for layer in layers:
        if isinstance(layer, TrainedLayer) and layer.moved:
            layer.moved.stepper = stepper


class ShardedLayer(TrainedLayer):
    """A trained layer whose parameters are shared out over several devices, see sharding.py.

    Attributes:
        shards: The slices that this device owns, by the parameter's name. Its base has whole parameters, which the forward
            and the backward pass gather.
    """

    is_copied = False  # each slice gets memory of its own when the parameters are shared out

    def __init__(self, base: Any, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        self.shards: dict[str, nn.Parameter] = {}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.shards.items()) if self.shards else super().trainable()
