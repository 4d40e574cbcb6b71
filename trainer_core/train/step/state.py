"""The state of a training run and the batch of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...config.dataset import FolderConfig
from ...config.optimizer import OptimizerConfig
from ...config.training import TrainingConfig
from ...data.batch_sampler import BatchPlan
from ...data.cache.latents import LatentCache
from ...data.cache.masks import MaskWeights
from ...data.cache.prompts import TextCache
from ...data.dataset import Sample
from ...data.reference_images import ReferenceLatents
from ...devices import works_beside
from ...distributed.ranks import ALONE, Ranks
from ...flow.loss_scale import LossScale
from ...flow.sigma_density import Density
from ...full_rank.sharding import Sharding
from ...full_rank.step_in_backward import StepInBackward
from ...host import Host
from ...models.family import Family
from ...models.token_routing import Route
from ..figures.leak import Leak
from ..figures.paired_evals import Evaluation
from .oom_recovery import OomRecovery
from .working_copies import WorkingCopies

T = TypeVar("T")
# Called at a checkpoint with its step and the evaluations so far: returns why the run ends there, or "".
Judge = Callable[[int, Mapping[int, Evaluation]], str]


@dataclass
class TrainState:
    """Everything that a training step needs, in memory.

    step, losses, eval_losses, evaluations, leaks, learning_rates and step_seconds grow during the run; the other fields stay
    as they are.
    """

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
    dtype: str = "fp32"  # of the model's computation, as in ModelConfig
    attention: str = "native"  # name of the attention kernel, see attention_choice.py
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: int = 0
    steps_before: int = 0  # of the run that this one continues: batches are counted on from there
    drawn_text: TextCache | None = None  # validation prompts, where the model that samples has another text encoder
    held: Sequence[Sample] = ()  # held-out samples: their loss selects the best checkpoint
    references: ReferenceLatents | None = None  # latents of the reference images
    masks: MaskWeights | None = None
    oom_recovery: OomRecovery | None = None  # where the plan chose to store activations: the fallback on out of memory
    working: WorkingCopies | None = None  # of the adapter, in the model's precision; None: computes with its masters
    loss_scale: LossScale | None = None  # where the model computes in fp16
    ema: Any = None  # adapters.ema.Ema, where the run averages its weights
    parts: Sequence[FolderConfig] = ()  # settings of the dataset's folders; (): as the defaults
    ranks: Ranks = ALONE  # the processes that train together
    in_backward: StepInBackward | None = None  # kind full: steps the weights inside of the backward pass
    sharding: Sharding | None = None  # kind full: the weights are shared out over the ranks
    grad_norm: float = math.nan  # of the last step, where in_backward scales the next one by it
    background_save: Any = None  # hooks.background_save.BackgroundSave, with kind full
    losses: list[float] = field(default_factory=list)  # one per step; NaN: the step was skipped
    eval_losses: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> mean, standard error
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # step -> losses of each image; 0: of the start
    leak_meter: Any = None  # hooks.leak_meter.LeakMeter
    leaks: dict[int, Leak] = field(default_factory=dict)  # step -> the leak without the trigger
    judge: Judge | None = None
    stop_reason: str = ""  # why the run ends before its last step; "" while it does not
    learning_rates: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of each step since this process started the run
    # Whether weights, optimizer, average and history are those of one and the same step. Only then is the state saved.
    is_consistent: bool = True

    @property
    def prior_parts(self) -> frozenset[int]:
        """The indices of the dataset's folders with prior preservation."""
        return prior_parts_of(self.parts)

    @property
    def is_full(self) -> bool:
        """Whether the model's own weights are trained, and not an adapter."""
        return self.in_backward is not None

    @property
    def is_over(self) -> bool:
        """Whether the training ends here."""
        return self.step >= self.num_steps or bool(self.stop_reason)

    @property
    def forward_ranks(self) -> Ranks:
        """Who shares out forward passes without gradients.

        Ranks that share out the weights compute each of them together, and all get its outputs.
        """
        return self.ranks if self.sharding is None else ALONE

    def share_out(self, count: int, compute: Callable[[int], T]) -> list[T]:
        """Return `count` JSON values that need forward passes, the same on all ranks. See Ranks.share_out."""
        if self.sharding is None:
            return self.ranks.share_out(count, compute)
        values = [compute(number) for number in range(count)]
        return self.ranks.from_main(lambda: values)

    def check_cancelled(self, host: Host) -> None:
        """Raise if the run shall stop, between two forward passes. All ranks stop together where they compute together."""
        if self.sharding is None:
            host.check_cancelled()
        else:
            self.ranks.agree(host.check_cancelled)

    @property
    def first_micro(self) -> int:
        """The number of the next step's first micro-batch."""
        return (self.steps_before + self.step) * self.config.accumulation

    @property
    def end_micro(self) -> int:
        """The number of the last micro-batch of the run, plus one."""
        return (self.steps_before + self.num_steps) * self.config.accumulation

    def next_micro(self, micro: int) -> int:
        """Return the micro-batch that this process computes after this one."""
        return self.ranks.next_micro(micro, self.config.accumulation)

    def finish_step_(self, loss: float, learning_rate: float, seconds: float) -> None:
        """Record a step whose weights are in place. An interrupt within leaves the state marked as inconsistent."""
        self.is_consistent = False
        self.losses.append(loss)
        self.learning_rates.append(learning_rate)
        self.step_seconds.append(seconds)
        self.step += 1
        self.is_consistent = True


def prior_parts_of(parts: Sequence[FolderConfig]) -> frozenset[int]:
    """Return the indices of the folders with prior preservation."""
    return frozenset(index for index, part in enumerate(parts) if part.prior_preservation)


Hook = Callable[[TrainState], None]


@dataclass(frozen=True)
class Batch:
    """The tensors of one micro-batch.

    Args:
        x_sigma: noisy latents, (B, channels, h, w), fp32. In a rollout they start at the first of levels and are
            denoised to the last one, which is sigma.
        velocity: target of the prediction, (B, channels, h, w), fp32.
        sigma: noise level of each sample, (B,), fp32.
        text: B embeddings, (tokens, width).
        beside: further arguments of Family.predict, such as reference latents.
        weight: weight of each position in the loss, (B, 1, h, w), fp32; None where no image has a mask.
        prior: which samples are trained towards the base model's own prediction, (B,), bool; None where none is.
        levels: sigmas of a rollout, (steps + 1, B), see flow/rollout.py; None where the batch has no rollout.
        x0: clean latents of a rollout, (B, channels, h, w).
        share: factor of the predictions in the loss after a rollout, (B, 1, 1, 1).
        route: which tokens skip which blocks; None where none does.
        factor: factor of each sample's loss, (B,), fp32; None where all are 1.
        class_text: embeddings of the captions for which the prediction is held at the base model's, with preservation.
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
    factor: Tensor | None = None
    class_text: Sequence[Tensor] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device.

        Copies to a GPU need no host-device synchronization: the kernels that read them come later in the same stream.
        """
        is_asynchronous = works_beside(device)
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=is_asynchronous))

    def mean_loss(self, losses: Tensor) -> Tensor:
        """Return the mean of the samples' losses, (B,), each multiplied by its factor."""
        return (losses if self.factor is None else self.factor * losses).mean()

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        beside = {name: change(tensor) for name, tensor in self.beside.items()}
        text = [change(tensor) for tensor in self.text]
        rest = (self.weight, self.prior, self.levels, self.x0, self.share)
        changed = [None if tensor is None else change(tensor) for tensor in rest]
        route = None if self.route is None else replace(self.route, kept=change(self.route.kept))
        return Batch(
            change(self.x_sigma), change(self.velocity), change(self.sigma), text, beside, *changed, route=route,
            factor=None if self.factor is None else change(self.factor),
            class_text=[change(tensor) for tensor in self.class_text],
        )  # fmt: skip


Fetch = Callable[[int], Batch]  # returns a micro-batch by its number
