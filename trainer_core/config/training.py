"""How a LoRA is trained: the widgets of LoRATrainer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem, UserError
from ..spec import Advanced, Choice, Doc, Range, Seed, Text

SIGMA_DENSITIES = (
    "chroma",
    "uniform",
    "logit-normal",
    "sigmoid",
    "beta",
    "mode",
    "cosmap",
    "quadratic_tail",
    "quadratic_tail_legacy",
)
TRACKERS = ("none", "tensorboard", "wandb", "tensorboard+wandb")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")


@dataclass(frozen=True)
class LrSchedule:
    """A course of the learning rate (optim/lr_schedule.py has the formulas).

    Args:
        uses: the fields of OptimizerConfig that shape it.
        endless: its steps are the same however long the run is, so that a run may be made longer and gone on with.
    """

    uses: tuple[str, ...] = ()
    endless: bool = False


LR_SCHEDULES = {
    "constant": LrSchedule(endless=True),
    "cosine": LrSchedule(("lr_min_ratio",)),
    "linear": LrSchedule(("lr_min_ratio",)),
    "constant_with_warmup": LrSchedule(endless=True),
    "cosine_with_restarts": LrSchedule(("lr_num_cycles", "lr_min_ratio")),
    "polynomial": LrSchedule(("lr_power", "lr_min_ratio")),
    "wsd": LrSchedule(("lr_decay_share", "lr_min_ratio")),
}
NAME_PATTERN = re.compile(r"[^<>:\"/\\|?*\x00-\x1f]+")
RESERVED_NAMES = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything about the training itself that a person sets. Defaults: a sound first LoRA (docs/first-lora.md)."""

    LATER: ClassVar = (
        ("rollout_probability", "rollout_steps"),
        ("routed_share", "route_first", "route_last"),
        ("trackers",),
    )

    name: Annotated[
        str,
        Text(),
        Doc(
            "Name of the LoRA's file, without its ending. A finished LoRA of that name is replaced; another request of that name gets a run folder of its own."
        ),
    ] = "my-lora"
    rank: Annotated[
        int, Range(1, 512), Doc("Inner dimension of the update B A. 16 suits most styles and subjects.")
    ] = 16
    alpha: Annotated[float, Range(0.01, 1024, 0.01), Doc("Scale of the update is alpha / rank. Equal to rank: 1.")] = (
        16.0
    )
    targets: Annotated[
        str,
        Text(),
        Doc(
            "Which layers learn: mmdit, all, context, context+ffs, all+ffs, all+ffs+embedder, tiny, nano, or a comma list of module patterns such as single_transformer_blocks.*.proj_out."
        ),
    ] = "all"
    init: Annotated[
        str,
        Choice(*INITS),
        Advanced(),
        Doc(
            "Start of the update. default: A Kaiming-uniform, B 0; gaussian: A normal with deviation 1 / rank. orthogonal: neither is 0, but their product. "
            "pissa, olora: the weight's own main directions learn; the file has twice the rank. eva: A lies along the main directions of the data's activations. "
            "loftq: mends what quantisation lost; needs a quantised model (docs/lora-files.md)."
        ),
    ] = "default"
    steps: Annotated[int, Range(0, 1_000_000), Doc("Optimiser steps to train. 0: train for `epochs` instead.")] = 1000
    epochs: Annotated[int, Range(0, 100_000), Doc("Passes over the dataset when steps is 0.")] = 0
    batch_size: Annotated[int, Range(1, 1024), Doc("Images in one forward pass.")] = 1
    accumulation: Annotated[
        int,
        Range(1, 1024),
        Doc("Forward passes whose gradients are averaged into one step. Images a step: batch_size x accumulation."),
    ] = 1
    learning_rate: Annotated[
        float, Range(0.0, 10.0, 0.000001), Doc("Peak learning rate. 1e-4 to 3e-4 at rank 16 are usual.")
    ] = 1e-4
    lr_schedule: Annotated[
        str,
        Choice(*LR_SCHEDULES),
        Doc(
            "Course of the learning rate after warmup_steps, which come first in all of them (constant_with_warmup is constant by its other name): constant; cosine, down to 0 along a half cosine; linear, straight down; cosine_with_restarts; polynomial; wsd, constant and down in the last share of the run. Their numbers are in OptimizerSettings."
        ),
    ] = "constant"
    warmup_steps: Annotated[
        int, Range(0, 1_000_000), Doc("Steps over which the learning rate climbs from 0 to its peak.")
    ] = 20
    weight_decay: Annotated[
        float,
        Range(0.0, 10.0, 0.0001),
        Advanced(),
        Doc("Every step takes away learning rate x this of each weight (decoupled weight decay)."),
    ] = 0.01
    max_grad_norm: Annotated[
        float, Range(0.0, 1000.0, 0.01), Advanced(), Doc("The gradient is scaled down to this norm; 0 leaves it.")
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool,
        Doc(
            "Compute blocks again in the backward pass: same gradients, less memory, up to a third more time. Which blocks: see MemorySettings; without one, as few as memory allows."
        ),
    ] = True
    sigma_density: Annotated[
        str,
        Choice(*SIGMA_DENSITIES),
        Doc("How often each noise level is trained. chroma: the density Chroma itself was trained with."),
    ] = "chroma"
    shift: Annotated[
        float,
        Range(0.0, 100.0, 0.01),
        Advanced(),
        Doc(
            "Moves noise levels towards noise (> 1) or towards the picture (< 1): s' = a s / (1 + (a - 1) s). 1 leaves them. "
            "0: by each picture's size, as Flux was trained: 1.9 at 512 px, 3.2 at 1024 px."
        ),
    ] = 1.0
    caption_dropout: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Doc("Share of samples that are trained with an empty caption, which keeps CFG working."),
    ] = 0.05
    seed: Annotated[int, Range(0, 2**53 - 1), Seed(), Doc("All randomness comes from this number.")] = 0
    checkpoint_every: Annotated[
        int, Range(0, 1_000_000), Doc("Save a state to resume from every n steps; 0: only at the end.")
    ] = 250
    keep_checkpoints: Annotated[
        int, Range(1, 1000), Advanced(), Doc("How many of the newest checkpoints are kept.")
    ] = 2
    resume: Annotated[bool, Doc("Go on from the newest checkpoint of the same request, if there is one.")] = True
    validate_every: Annotated[
        int,
        Range(0, 1_000_000),
        Doc(
            "Draw the validation pictures every n steps, when a ValidateSampler is connected; 0: only before and after the training."
        ),
    ] = 250
    keep_every: Annotated[
        int,
        Range(0, 1_000_000),
        Advanced(),
        Doc("Checkpoints of steps divisible by this are never removed; 0: only the newest ones stay."),
    ] = 0
    holdout: Annotated[
        float,
        Range(0.0, 0.5, 0.01),
        Advanced(),
        Doc(
            "Share of the images kept out of training. Their loss is taken at every checkpoint; the best one is kept, and saved as NAME-best."
        ),
    ] = 0.0
    skip_bad_steps: Annotated[
        int,
        Range(0, 1000),
        Advanced(),
        Doc(
            "How many steps with a loss or gradient that is not finite are skipped before the run ends; 0: it ends at the first."
        ),
    ] = 0
    on_change: Annotated[
        str,
        Choice("ask", "anew", "adopt"),
        Advanced(),
        Doc(
            "What to do when an unfinished run of this name had other settings, images, captions or weights. ask: say what changed and stop; anew: leave it and begin a new run; adopt: go on from its newest checkpoint with the present settings."
        ),
    ] = "ask"
    rollout_probability: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Advanced(),
        Doc(
            "Scheduled sampling, against exposure bias: share of batches that are trained not on a picture with noise but on what the model itself makes of one with more noise. Each costs 1 to rollout_steps forward passes more. 0: none (docs/runs.md)."
        ),
    ] = 0.0
    rollout_steps: Annotated[
        int,
        Range(1, 20),
        Advanced(),
        Doc(
            "Most Euler steps of a rollout; each draws from 1 to this. A step is 0.04 of the noise level, as in a picture drawn in 25."
        ),
    ] = 3
    routed_share: Annotated[
        float,
        Range(0.0, 0.9, 0.05),
        Advanced(),
        Doc(
            "Share of each picture's tokens, drawn anew in every step, that skip the middle blocks in training (TREAD). At 0.5 a step is about half the work; 0: none do. It changes what is learnt (docs/performance.md)."
        ),
    ] = 0.0
    route_first: Annotated[
        int,
        Range(-100, 100),
        Advanced(),
        Doc("First block that routed tokens skip, counted from 0 over double, then single blocks; -1 is the last one."),
    ] = 2
    route_last: Annotated[
        int,
        Range(-100, 100),
        Advanced(),
        Doc("Last block that routed tokens skip, counted as route_first."),
    ] = -2
    trackers: Annotated[
        str,
        Choice(*TRACKERS),
        Advanced(),
        Doc("Where else to follow the run: TensorBoard, Weights & Biases (wandb), or both. See docs/trackers.md."),
    ] = "none"

    def routed_blocks(self, num_blocks: int) -> range:
        """Places of the blocks that routed tokens skip, of so many; empty without any.

        Raises:
            UserError: the model has no such blocks.
        """
        if not self.routed_share:
            return range(0)
        first, last = (place + num_blocks if place < 0 else place for place in (self.route_first, self.route_last))
        for name, given, place in (("route_first", self.route_first, first), ("route_last", self.route_last, last)):
            if not 0 <= place < num_blocks:
                reach = f"use 0 to {num_blocks - 1}, or -1 (the last) to {-num_blocks}"
                raise UserError.at(name, f"is {given}, and the model has {num_blocks} blocks; {reach}")
        if first > last:
            asked = f"is {self.route_last}, which is block {last} of {num_blocks}, before route_first ({self.route_first}, block {first})"
            raise UserError.at("route_last", f"{asked}; use {first} or more, or a lower route_first")
        return range(first, last + 1)

    def problems(self) -> list[Problem]:
        found = []
        if (
            not NAME_PATTERN.fullmatch(self.name)
            or self.name != self.name.strip(" .")
            or self.name.lower() in RESERVED_NAMES
        ):
            found.append(
                Problem(
                    "name",
                    f"{self.name!r} can't be a file's name on every system; use letters, digits, spaces, - and _",
                )
            )
        if len(self.name.encode("utf-8")) > 120:
            found.append(Problem("name", f"is {len(self.name.encode('utf-8'))} bytes long; use at most 120"))
        if self.steps == 0 and self.epochs == 0:
            found.append(Problem("steps", "steps and epochs are both 0; set one of them"))
        if not self.targets.strip():
            found.append(Problem("targets", "is empty; use 'all', or a comma list of module patterns"))
        if self.learning_rate == 0:
            found.append(Problem("learning_rate", "is 0, so nothing would be learnt; 1e-4 is usual"))
        return found
