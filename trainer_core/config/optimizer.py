"""Optimizer settings, and the parameters of the learning rate schedules: the widgets of OptimizerSettings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, Range

CLIP_BY = THIS_STEP, STEP_BEFORE = ("this step", "step before")
# Optimizers whose step of one weight reads others, so that it can't run inside of the backward pass (kind full): why.
TOGETHER = {
    "prodigy": "estimates one learning rate from all weights together",
    "schedulefree-adamw": "averages all weights, and swaps them for each validation",
}
# Optimizers whose step of one element reads no other one, so that a parameter may be shared out by rows (shard).
ELEMENTWISE = ("adamw", "adamw_bf16", "optimi-lion")
DEFAULT = "0: the optimizer's default"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its hyperparameters, and those of the learning rate schedule.

    Learning rate, schedule, warmup and weight decay are widgets of LoRATrainer. OptimizerPart.uses lists the fields
    that an optimizer uses; a run warns about fields that are set but not used.
    """

    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("clip_by",),
        ("prodigy_bias_correction",),
        ("prodigy_safeguard_warmup",),
    )
    KEY: ClassVar[tuple[str, ...]] = (
        "OptimizerConfig", "optimizer", "beta1", "beta2", "beta3", "eps", "kahan", "prodigy_d0", "prodigy_d_coef",
        "prodigy_growth", "ademamix_alpha", "adafactor_scale_parameter", "lr_num_cycles", "lr_power", "lr_decay_share",
        "lr_min_ratio",
    )  # fmt: skip

    optimizer: Annotated[
        str,
        Choice(*names("optimizer")),
        Doc(
            "adamw: start here. prodigy: estimates the learning rate itself (set learning_rate to 1). "
            "schedulefree-adamw: needs no learning rate schedule. docs/optimizers.md compares all of them."
        ),
    ] = "adamw"
    beta1: Annotated[
        float,
        Range(0.0, 0.9999, 0.0001),
        Advanced(),
        Doc(
            f"Decay rate of the first moment (momentum); higher values are smoother and slower. {DEFAULT}, 0.9 for "
            "most; adafactor: no momentum. Used by all."
        ),
    ] = 0.0
    beta2: Annotated[
        float,
        Range(0.0, 0.999999, 0.000001),
        Advanced(),
        Doc(f"Decay rate of the second moment (lion: of the momentum). {DEFAULT}. Not used by: adafactor."),
    ] = 0.0
    beta3: Annotated[
        float,
        Range(0.0, 0.999999, 0.000001),
        Advanced(),
        Doc(
            "ademamix: decay rate of the slow momentum. came: decay rate of the confidence statistics. "
            f"{DEFAULT}, 0.9999. Used by: bnb-ademamix8bit, came."
        ),
    ] = 0.0
    eps: Annotated[
        float,
        Range(0.0, 0.01, 1e-10),
        Advanced(),
        Doc(
            f"Added to the denominator (the square root of the second moment) for numerical stability. {DEFAULT}. Not "
            "used by: optimi-lion, bnb-lion8bit-paged, adafactor, came."
        ),
    ] = 0.0
    kahan: Annotated[
        bool,
        Advanced(),
        Doc(
            "Kahan summation: store the rounding error of each weight in two extra bytes, instead of stochastic "
            "rounding. The weights are nearly as precise as fp32. Used by: adamw_bf16."
        ),
    ] = False
    prodigy_d0: Annotated[
        float,
        Range(1e-12, 1.0, 1e-12),
        Advanced(),
        Doc(
            "Initial estimate of the learning rate. Too low costs some steps; too high is never corrected. Used by: "
            "prodigy."
        ),
    ] = 1e-6
    prodigy_d_coef: Annotated[
        float,
        Range(0.01, 100.0, 0.01),
        Advanced(),
        Doc("Factor on the estimated learning rate; 0.5 is more conservative. Used by: prodigy."),
    ] = 1.0
    prodigy_growth: Annotated[
        float,
        Range(0.0, 1000.0, 0.001),
        Advanced(),
        Doc(
            "Maximum growth factor of the estimated learning rate per step, such as 1.02 for a slow start. 0: no "
            "limit. Used by: prodigy."
        ),
    ] = 0.0
    ademamix_alpha: Annotated[
        float,
        Range(0.0, 100.0, 0.1),
        Advanced(),
        Doc("Weight of the slow momentum, relative to the fast one. Used by: bnb-ademamix8bit."),
    ] = 5.0
    adafactor_scale_parameter: Annotated[
        bool,
        Advanced(),
        Doc(
            "Multiply the learning rate by the root mean square of each matrix, at least 0.001. A LoRA starts at 0, so "
            "training starts slowly; use a learning_rate of about 0.01 to 1. Used by: adafactor."
        ),
    ] = False
    lr_num_cycles: Annotated[
        int, Range(1, 1000), Doc("Number of half cosines in the run. Used by the schedule: cosine_with_restarts.")
    ] = 3
    lr_power: Annotated[
        float,
        Range(0.1, 10.0, 0.1),
        Doc(
            "Exponent: the learning rate is (1 - p)^power at share p of the run. 1: linear. Used by the schedule: "
            "polynomial."
        ),
    ] = 2.0
    lr_decay_share: Annotated[
        float,
        Range(0.01, 1.0, 0.01),
        Doc(
            "Share of the steps after warmup, at the end, in which the learning rate falls. Used by the schedule: wsd."
        ),
    ] = 0.2
    lr_min_ratio: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Doc("Minimum learning rate after warmup, as a share of the peak. Used by all schedules that fall."),
    ] = 0.0
    clip_by: Annotated[
        str,
        Choice(*CLIP_BY),
        Advanced(),
        Doc(
            "Gradient norm that max_grad_norm is compared with. this step: the norm of the gradient that is clipped. "
            "step before: for kind full, whose steps begin before all gradients are known; the first step is not "
            "clipped (docs/full-rank.md)."
        ),
    ] = CLIP_BY[0]
    prodigy_bias_correction: Annotated[
        bool,
        Advanced(),
        Doc(
            "Adam's bias correction. Recommended. Without it the first 1,000 steps are up to 6 times as long as the "
            "learning rate says, and a LoRA may be destroyed. Used by: prodigy."
        ),
    ] = False
    prodigy_safeguard_warmup: Annotated[
        bool,
        Advanced(),
        Doc(
            "Recommended with warmup_steps, and with the schedule cosine_with_restarts: steps with a low learning rate "
            "do not raise the estimate. Used by: prodigy."
        ),
    ] = False

    def clips_by_this_step(self, max_grad_norm: float) -> bool:
        """Return whether gradients are clipped by the norm of all of them, which they have to wait for."""
        return bool(max_grad_norm) and self.clip_by != STEP_BEFORE

    def problems(self) -> list[Problem]:
        """Return a problem if prodigy_growth would keep the learning rate from growing."""
        if self.prodigy_growth and self.prodigy_growth <= 1:
            message = (
                f"{self.prodigy_growth:g} would keep the learning rate from growing; use more than 1, such as 1.02, or "
                "0 for no limit"
            )
            return [Problem("prodigy_growth", message)]
        return []
