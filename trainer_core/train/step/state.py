"""What a training step needs, ready in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.working_copies import WorkingCopies
from ...config.optimizer import OptimizerConfig
from ...config.training import TrainingConfig
from ...data.batch_sampler import BatchPlan
from ...data.cache.latents import LatentCache
from ...data.cache.masks import MaskWeights
from ...data.cache.prompts import TextCache
from ...data.dataset import Sample
from ...data.reference_images import ReferenceLatents
from ...devices import works_beside
from ...flow.sigma_density import Density
from ...models.family import Family
from ...models.token_routing import Route
from .oom_recovery import OomRecovery


@dataclass
class TrainState:
    """What a step needs, ready in memory. losses and step grow as the run goes on; the rest stays."""

    config: TrainingConfig
    family: Family
    transformer: nn.Module
    layers: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    density: Density
    samples: Sequence[Sample]
    plan: BatchPlan
    latents: LatentCache
    text: TextCache
    device: torch.device
    num_steps: int
    dtype: str = "fp32"  # that the model computes in, as in ModelConfig
    attention: str = "native"  # the kernel that computes it, see attention.py
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: int = 0
    held: Sequence[Sample] = ()  # kept out of training: their loss picks the best checkpoint
    references: ReferenceLatents | None = None  # pictures to start from
    masks: MaskWeights | None = None
    prior_parts: frozenset[int] = frozenset()  # of the dataset: what is trained towards the base's own prediction
    relief: OomRecovery | None = None  # where the plan chose to store activations: what to do if that was too much
    working: WorkingCopies | None = None  # of the adapter in the model's precision; None: it computes with its masters
    ema: Any = None  # lora.ema.Ema, where the run keeps an average of its weights
    losses: list[float] = field(default_factory=list)  # NaN: the step was skipped
    eval_losses: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> mean, standard error
    learning_rates: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of each step since this start


Hook = Callable[[TrainState], None]


@dataclass(frozen=True)
class Batch:
    """What a micro-batch trains on.

    Args:
        x_sigma, velocity: (B, channels, h, w), fp32. sigma: (B,), fp32.
        text: B embeddings (tokens, width).
        beside: what else predict takes, such as pictures to start from.
        weight: of every place in the loss, (B, 1, h, w), fp32, where pictures have masks.
        prior: (B,), bool, where samples are trained towards the base's own prediction; None where none is.
        levels, x0: of a rollout, (steps + 1, B) and (B, channels, h, w), see rollout.py; x_sigma is at the first level then, and comes
            down to the last, which is sigma. share: (B, 1, 1, 1), of predictions in the loss, once it has come down.
        route: which tokens skip which blocks; None where none does.
    """

    x_sigma: Tensor
    velocity: Tensor
    sigma: Tensor
    text: Sequence[Tensor]
    beside: Mapping[str, Any]
    weight: Tensor | None = None
    prior: Tensor | None = None
    levels: Tensor | None = None
    x0: Tensor | None = None
    share: Tensor | None = None
    route: Route | None = None

    def to(self, device: torch.device) -> Batch:
        """The host does not wait for a GPU's copies: the kernels that read them do, being later in the same stream."""
        runs_on = works_beside(device)
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=runs_on))

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        beside = {name: change(tensor) for name, tensor in self.beside.items()}
        text = [change(tensor) for tensor in self.text]
        rest = (self.weight, self.prior, self.levels, self.x0, self.share)
        changed = [None if tensor is None else change(tensor) for tensor in rest]
        route = None if self.route is None else replace(self.route, kept=change(self.route.kept))
        return Batch(
            change(self.x_sigma), change(self.velocity), change(self.sigma), text, beside, *changed, route=route
        )


Fetch = Callable[[int], Batch]  # a micro-batch by its number
