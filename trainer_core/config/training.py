"""Training settings: the widgets of LoRATrainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from ..errors import Problem, UserError
from ..spec import Advanced, Choice, Doc, Initial, Last, Range, Seed, Text
from ..storage.lora_name import faults_of_name

AUTO = "auto"  # sigma_density: the model family's usual density
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
TRACKERS = (
    "none", "tensorboard", "wandb", "tensorboard+wandb", "webhook", "tensorboard+webhook", "wandb+webhook",
    "tensorboard+wandb+webhook",
)  # fmt: skip
LOSSES = ("mse", "mae", "huber")
LOSS_WEIGHTINGS = ("none", "sigma", "sigma_sqrt", "cosmap", "bell")
HUBER_C = 0.1
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")


@dataclass(frozen=True)
class LrSchedule:
    """A learning rate schedule. optim/lr_schedule.py has the formulas.

    Args:
        uses: the OptimizerConfig fields that are its parameters.
        endless: the learning rate of a step does not depend on the length of the run, so a finished run can be
            extended.
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
SHARD = WHOLE, IN_BF16, IN_FP32 = ("off", "bf16", "fp32")
NEVER, NO_LONGER_BETTER = "never", "no longer better"
MIN_HELD_OUT = 4  # images, for stop_when: with fewer, the uncertainty of the loss is itself too uncertain
EVAL_SIGMAS = (0.125, 0.375, 0.625, 0.875)  # of the loss on fixed noise
LEAK_SIGMAS = (1.0, 0.95, 0.9, 0.8)  # of the leak without the trigger: there the prompt decides about the image
LEAK_PROBES = 8  # captions that the leak is measured for, 2 at each of LEAK_SIGMAS


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training itself. The defaults suit a first LoRA (docs/first-lora.md)."""

    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("rollout_probability", "rollout_steps"),
        ("routed_share", "route_first", "route_last"),
        ("trackers",),
        ("eval_images",),
        ("preservation",),
        ("loss",),
        ("huber_c",),
        ("loss_weighting",),
        ("noise_choice",),
        ("stop_when", "patience"),
        ("shard",),
    )
    UNRECORDED: ClassVar[tuple[str, ...]] = (
        "devices",
        "background",
        "detached",
    )  # they decide who computes and when, not what

    name: Annotated[
        str,
        Text(),
        Doc(
            "File name of the LoRA. It may have subfolders (styles/my-lora) and a date (%date%, or as in SaveImage "
            "%date:yyyy-MM-dd%, %year% ...). A LoRA of the same name that another run saved is kept under the name of "
            "its run. A run with the same name but different settings gets its own run folder."
        ),
    ] = "my-lora"
    rank: Annotated[
        int,
        Range(1, 512),
        Doc("Rank of the LoRA: inner dimension of the update B A. 16 suits most styles and subjects."),
    ] = 16
    alpha: Annotated[
        float,
        Range(0, 1024, 0.01),
        Initial(0.0),
        Doc("The update is scaled by alpha / rank. 0: equal to rank, for a scale of 1."),
    ] = 16.0
    targets: Annotated[
        str,
        Text(),
        Doc(
            "Layers to train: mmdit, all, context, context+ffs, all+ffs, all+ffs+embedder, tiny, nano, or a "
            "comma-separated list of module patterns such as single_transformer_blocks.*.proj_out. Kind full also: "
            "norms, embedders, approximator, or * for everything."
        ),
    ] = "all"
    init: Annotated[
        str,
        Choice(*INITS),
        Advanced(),
        Doc(
            "Initialization of the LoRA matrices A and B. default: A Kaiming uniform, B zero. gaussian: A normal with "
            "standard deviation 1 / rank, B zero. orthogonal: both nonzero, with B A = 0. pissa, olora: train the "
            "principal directions of the weight itself; the saved file has twice the rank. eva: A along the principal "
            "directions of the training data's activations. loftq: also compensates the quantization error; needs a "
            "quantized model (docs/lora-files.md)."
        ),
    ] = "default"
    steps: Annotated[int, Range(0, 1_000_000), Doc("Optimizer steps to train. 0: use `epochs` instead.")] = 1000
    epochs: Annotated[int, Range(0, 100_000), Doc("Passes over the dataset. Used when steps is 0.")] = 0
    batch_size: Annotated[int, Range(1, 1024), Doc("Images per forward pass.")] = 1
    accumulation: Annotated[
        int,
        Range(1, 1024),
        Doc(
            "Forward passes whose gradients are averaged into one optimizer step. Images per step: "
            "batch_size x accumulation."
        ),
    ] = 1
    learning_rate: Annotated[
        float, Range(0.0, 10.0, 0.000001), Doc("Peak learning rate. 1e-4 to 3e-4 is usual at rank 16.")
    ] = 1e-4
    lr_schedule: Annotated[
        str,
        Choice(*LR_SCHEDULES),
        Doc(
            "Learning rate schedule after the warmup_steps, which come first in every schedule. constant (also named "
            "constant_with_warmup): stays at the peak. cosine: falls along a half cosine. linear: falls in a straight "
            "line. cosine_with_restarts: several half cosines. polynomial: falls as a power of the remaining share. "
            "wsd: constant, then falls over the last part of the run. OptimizerSettings has the parameters of the "
            "schedules."
        ),
    ] = "constant"
    warmup_steps: Annotated[
        int, Range(0, 1_000_000), Doc("Steps over which the learning rate rises from 0 to its peak.")
    ] = 20
    weight_decay: Annotated[
        float,
        Range(0.0, 10.0, 0.0001),
        Advanced(),
        Doc(
            "Decoupled weight decay: every step shrinks each weight by learning rate x this value. Weights that hold "
            "parts of the base model are not decayed: magnitudes of dora, and matrices of init pissa, olora and loftq. "
            "Kind full: matrices are decayed, biases and norms are not."
        ),
    ] = 0.01
    max_grad_norm: Annotated[
        float, Range(0.0, 1000.0, 0.01), Advanced(), Doc("Clip the gradient to this norm. 0: no clipping.")
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool,
        Doc(
            "Recompute blocks in the backward pass instead of storing their activations: same gradients, less memory, "
            "up to a third more time. MemorySettings sets which blocks. Without MemorySettings, as few blocks are "
            "recomputed as the memory allows."
        ),
    ] = True
    sigma_density: Annotated[
        str,
        Choice(AUTO, *SIGMA_DENSITIES),
        Initial(AUTO),
        Doc(
            "Distribution of the noise levels (sigmas) that are trained. auto: chroma for Chroma, logit-normal for "
            "Flux. chroma: the distribution that Chroma itself was trained with. logit-normal: a bell around the "
            "middle. quadratic_tail: trains the lowest and highest sigmas more often; guides to Chroma call it "
            "automatic."
        ),
    ] = "chroma"
    shift: Annotated[
        float,
        Range(0.0, 100.0, 0.01),
        Advanced(),
        Doc(
            "Shifts the sigmas towards noise (> 1) or towards the image (< 1): s' = a s / (1 + (a - 1) s). 1: no "
            "shift. 0: depends on the image size, as in the training of Flux: 1.9 at 512 px, 3.2 at 1024 px."
        ),
    ] = 1.0
    caption_dropout: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Doc("Share of samples that are trained with an empty caption. This keeps CFG working."),
    ] = 0.05
    seed: Annotated[int, Range(0, 2**53 - 1), Seed(), Doc("Seed of all random numbers in the run.")] = 0
    checkpoint_every: Annotated[
        int,
        Range(0, 1_000_000),
        Doc("Save a checkpoint, which a run can resume from, every n steps. 0: only at the end."),
    ] = 250
    keep_checkpoints: Annotated[int, Range(1, 1000), Advanced(), Doc("Number of most recent checkpoints to keep.")] = 2
    resume: Annotated[
        bool, Doc("Resume from the newest checkpoint of a run with the same settings, if there is one.")
    ] = True
    validate_every: Annotated[
        int,
        Range(0, 1_000_000),
        Doc(
            "Sample the validation images every n steps, if a ValidateSampler is connected. 0: only before and after "
            "training."
        ),
    ] = 250
    keep_every: Annotated[
        int,
        Range(0, 1_000_000),
        Advanced(),
        Doc("Never delete checkpoints whose step is divisible by this. 0: keep only the most recent ones."),
    ] = 0
    holdout: Annotated[
        float,
        Range(0.0, 0.5, 0.01),
        Advanced(),
        Doc(
            "Share of the images held out of training. Their loss is measured at every checkpoint. The checkpoint with "
            "the lowest loss is kept, and saved as NAME-best."
        ),
    ] = 0.0
    skip_bad_steps: Annotated[
        int,
        Range(0, 1000),
        Advanced(),
        Doc("Number of steps with a non-finite loss or gradient to skip before the run stops. 0: stop at the first."),
    ] = 0
    on_change: Annotated[
        str,
        Choice("ask", "anew", "adopt"),
        Advanced(),
        Doc(
            "What to do when an unfinished run with this name has different settings, images, captions or weights. "
            "ask: report the changes and stop. anew: leave that run as it is and start a new one. adopt: resume from "
            "its newest checkpoint with the current settings."
        ),
    ] = "ask"
    rollout_probability: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Advanced(),
        Doc(
            "Scheduled sampling, against exposure bias: share of batches that are trained on the model's own output, "
            "denoised from a higher sigma, instead of a noised image. Each of these batches takes 1 to rollout_steps "
            "extra forward passes. 0: off (docs/runs.md)."
        ),
    ] = 0.0
    rollout_steps: Annotated[
        int,
        Range(1, 20),
        Advanced(),
        Doc(
            "Maximum number of Euler steps in a rollout; each rollout picks a random number from 1 to this. A step is "
            "0.04 in sigma, the step size of sampling an image in 25 steps."
        ),
    ] = 3
    routed_share: Annotated[
        float,
        Range(0.0, 0.9, 0.05),
        Advanced(),
        Doc(
            "Token routing (TREAD): share of each image's tokens, picked at random in every step, that skip the middle "
            "blocks in training. At 0.5 a step takes about half the compute. 0: off. It changes the result of the "
            "training (docs/performance.md)."
        ),
    ] = 0.0
    route_first: Annotated[
        int,
        Range(-100, 100),
        Advanced(),
        Doc(
            "First block that routed tokens skip. Blocks are counted from 0: first the double blocks, then the single "
            "ones. -1 is the last block."
        ),
    ] = 2
    route_last: Annotated[
        int,
        Range(-100, 100),
        Advanced(),
        Doc("Last block that routed tokens skip, counted as in route_first."),
    ] = -2
    trackers: Annotated[
        str,
        Choice(*TRACKERS),
        Advanced(),
        Doc(
            "Where else the run is shown: TensorBoard, Weights & Biases (wandb), messages to a webhook such as "
            "Discord's or Slack's, or several of them. The webhook's address is set in the environment only. See "
            "docs/trackers.md."
        ),
    ] = "none"
    eval_images: Annotated[
        int,
        Range(0, 1000),
        Advanced(),
        Last(),
        Doc(
            "Images whose loss is measured on fixed noise before and after training, with 4 forward passes each. The "
            "difference shows what the LoRA has learned. 0: off."
        ),
    ] = 16
    preservation: Annotated[
        float,
        Range(0.0, 2.0, 0.01),
        Advanced(),
        Last(),
        Doc(
            "Differential output preservation: weight of a second loss, which holds the prediction for each caption "
            "without its trigger at that of the base model. class_word of DatasetBackend takes the trigger's place; "
            "without one the empty caption is used (blank prompt preservation). A step takes more than twice the time. "
            "1 is usual. 0: off."
        ),
    ] = 0.0
    loss: Annotated[
        str,
        Choice(*LOSSES),
        Advanced(),
        Last(),
        Doc(
            "What is minimized, with d the error of a value. mse: d^2. mae: the absolute value of d, which follows "
            "outliers least. huber: like mse for errors below huber_c, and like mae above it. The loss on held-out "
            "images is always mse, so that runs can be compared."
        ),
    ] = "mse"
    huber_c: Annotated[
        float,
        Range(0.001, 100.0, 0.001),
        Advanced(),
        Last(),
        Doc(
            "With loss huber: error around which it changes from mse to mae, in 2 c^2 (sqrt(1 + (d / c)^2) - 1). The "
            "smaller it is, the less it follows outliers."
        ),
    ] = HUBER_C
    loss_weighting: Annotated[
        str,
        Choice(*LOSS_WEIGHTINGS),
        Advanced(),
        Last(),
        Doc(
            "Factor of the loss by the noise level s. none: 1. sigma: s. sigma_sqrt: 1 / s^2. cosmap: "
            "2 / (pi (1 - 2 s + 2 s^2)). bell: highest in the middle, 0 at both ends, 1 on average. "
            "Unlike sigma_density, which decides how often a noise level is trained, it scales what is learned there."
        ),
    ] = "none"
    noise_choice: Annotated[
        int,
        Range(1, 16),
        Advanced(),
        Last(),
        Doc(
            "Number of noises to choose from for each image: the one that is nearest to the image is trained, which "
            "straightens the paths. Chroma itself was trained with noises matched to the images of each batch. 1: no "
            "choice."
        ),
    ] = 1
    devices: Annotated[
        str,
        Text(),
        Advanced(),
        Last(),
        Doc(
            "Devices that train, each in a process of its own: 1 (the usual device, outside of ComfyUI's process), a "
            "larger number (2), auto, a list (0,1) or CPU processes (cpu:2). They share out the batches of "
            "accumulation, so the LoRA has the same bytes for any number. Empty: one device, in ComfyUI's process "
            "(docs/devices.md)."
        ),
    ] = ""
    stop_when: Annotated[
        str,
        Choice(NEVER, NO_LONGER_BETTER),
        Advanced(),
        Last(),
        Doc(
            "End the run early. no longer better: once the loss of the held-out images (holdout) has reached no new "
            "low for `patience` checkpoints, and on average is no lower than at as many checkpoints before. never: "
            "train all steps (docs/learned.md)."
        ),
    ] = NEVER
    patience: Annotated[
        int,
        Range(1, 1000),
        Advanced(),
        Last(),
        Doc("Checkpoints without a new low of the held-out loss after which stop_when ends the run."),
    ] = 3
    background: Annotated[
        bool,
        Advanced(),
        Last(),
        Doc(
            "In ComfyUI: give the queue back at once, and train in a process of its own. Runs in the background wait for "
            "each other; the sidebar shows and controls them. Nodes connected to this node's outputs do not run; "
            "LatestCheckpoint gives the LoRA (docs/background-runs.md). `chroma-trainer run` ignores it."
        ),
    ] = False
    detached: Annotated[
        bool,
        Advanced(),
        Last(),
        Doc(
            "With background: train on when ComfyUI is closed or ends unexpectedly. Otherwise the run is saved then, and "
            "continues when ComfyUI is started again."
        ),
    ] = False
    shard: Annotated[
        str,
        Choice(*SHARD),
        Advanced(),
        Last(),
        Doc(
            "Kind full: share out weights, gradients and optimizer states over the devices (FSDP2), so that a model trains "
            "that fits none of them. bf16: stored in bf16 and rounded stochastically. fp32: stored in fp32, which takes "
            "twice the memory; products are in the model's dtype. off: each device holds the whole model "
            "(docs/full-rank.md)."
        ),
    ] = WHOLE

    def with_alpha(self) -> TrainingConfig:
        """Return the settings with the alpha that is applied: 0 stands for the rank."""
        return self if self.alpha else replace(self, alpha=float(self.rank))

    def with_density(self, name: str) -> TrainingConfig:
        """Return the settings with this density where sigma_density is auto."""
        return replace(self, sigma_density=name) if self.sigma_density == AUTO else self

    @property
    def is_sharded(self) -> bool:
        """Whether weights are shared out over the devices."""
        return self.shard != WHOLE

    def routed_blocks(self, num_blocks: int) -> range:
        """Return the indices of the blocks that routed tokens skip.

        Args:
            num_blocks: number of blocks of the model.
        Returns:
            A range of block indices, empty without routing.
        Raises:
            UserError: an index is outside the model, or the range is empty.
        """
        if not self.routed_share:
            return range(0)
        first, last = (index + num_blocks if index < 0 else index for index in (self.route_first, self.route_last))
        for name, setting, index in (("route_first", self.route_first, first), ("route_last", self.route_last, last)):
            if not 0 <= index < num_blocks:
                fix = f"use 0 to {num_blocks - 1}, or -1 (the last) to {-num_blocks}"
                raise UserError.at(name, f"is {setting}, but the model has {num_blocks} blocks; {fix}")
        if first > last:
            message = (
                f"is {self.route_last}, which is block {last} of {num_blocks}, before route_first "
                f"({self.route_first}, block {first}); use {first} or more, or a lower route_first"
            )
            raise UserError.at("route_last", message)
        return range(first, last + 1)

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        problems = [Problem("name", fault) for fault in faults_of_name(self.name)]
        if self.steps == 0 and self.epochs == 0:
            problems.append(Problem("steps", "steps and epochs are both 0; set one of them"))
        if not self.targets.strip():
            problems.append(Problem("targets", "is empty; use 'all', or a comma-separated list of module patterns"))
        if self.holdout and not self.eval_images:
            text = "is 0, but holdout is above 0, and the loss on the held-out images chooses the best checkpoint; "
            problems.append(Problem("eval_images", text + "use 16, or set holdout to 0"))
        problems += self._stop_problems() if self.stop_when != NEVER else []
        if self.detached and not self.background:
            text = "is on, but background is off, and only a run in the background can outlive ComfyUI; switch "
            problems.append(Problem("detached", text + "background on, or detached off"))
        if self.learning_rate == 0:
            problems.append(Problem("learning_rate", "is 0, so nothing would be trained; 1e-4 is usual"))
        return problems

    def _stop_problems(self) -> list[Problem]:
        problems = []
        if not self.holdout:
            text = f"{self.stop_when!r} needs held-out images, but holdout is 0; set holdout to 0.1 or more"
            problems.append(Problem("stop_when", text))
        elif self.eval_images < MIN_HELD_OUT:
            text = f"{self.stop_when!r} needs {MIN_HELD_OUT} or more eval_images, and it is {self.eval_images}; use 16"
            problems.append(Problem("stop_when", text))
        if not self.checkpoint_every:
            text = f"{self.stop_when!r} decides at checkpoints, but checkpoint_every is 0; use a tenth of the steps"
            problems.append(Problem("stop_when", text))
        return problems
