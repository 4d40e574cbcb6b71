"""Which optimiser moves the weights, and the shape of its learning rate: the widgets of OptimizerSettings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import Problem
from ..registry import names
from ..spec import Advanced, Choice, Doc, Range

OWN = "0: the optimiser's own"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser by name, its numbers, and those of the learning rate's schedule.

    Learning rate, name of its schedule, warm-up and weight decay are the trainer's own widgets. Which optimiser uses
    which field is said by each optimiser's `uses`; a run warns of a field that is set and not used.
    """

    optimizer: Annotated[
        str,
        Choice(*names("optimizer")),
        Doc(
            "adamw is a sound first choice; prodigy finds its own learning rate (set learning_rate to 1); schedulefree-adamw needs no schedule. All of them are compared in docs/optimizers.md."
        ),
    ] = "adamw"
    beta1: Annotated[
        float,
        Range(0.0, 0.9999, 0.0001),
        Advanced(),
        Doc(
            f"Memory of the direction; a higher one is smoother and slower. {OWN}, 0.9 for most; adafactor: none. Used by all."
        ),
    ] = 0.0
    beta2: Annotated[
        float,
        Range(0.0, 0.999999, 0.000001),
        Advanced(),
        Doc(f"Memory of the gradient's size (lion: of its direction). {OWN}. Not used by: adafactor."),
    ] = 0.0
    beta3: Annotated[
        float,
        Range(0.0, 0.999999, 0.000001),
        Advanced(),
        Doc(
            f"ademamix: memory of the slow direction. came: memory of its confidence. {OWN}, 0.9999. Used by: bnb-ademamix8bit, came."
        ),
    ] = 0.0
    eps: Annotated[
        float,
        Range(0.0, 0.01, 1e-10),
        Advanced(),
        Doc(
            f"Added to the root of the gradient's size before the division. {OWN}. Not used by: optimi-lion, bnb-lion8bit-paged, adafactor, came."
        ),
    ] = 0.0
    kahan: Annotated[
        bool,
        Advanced(),
        Doc(
            "Keep each weight's rounding error in two more bytes rather than round at random: nearly fp32 weights. Used by: adamw_bf16."
        ),
    ] = False
    prodigy_d0: Annotated[
        float,
        Range(1e-12, 1.0, 1e-12),
        Advanced(),
        Doc(
            "First guess of the learning rate; too low costs some steps, too high can't be taken back. Used by: prodigy."
        ),
    ] = 1e-6
    prodigy_d_coef: Annotated[
        float,
        Range(0.01, 100.0, 0.01),
        Advanced(),
        Doc("Its estimates of the learning rate are multiplied by this; 0.5 is more careful. Used by: prodigy."),
    ] = 1.0
    prodigy_growth: Annotated[
        float,
        Range(0.0, 1000.0, 0.001),
        Advanced(),
        Doc(
            "By what factor its learning rate may grow in one step, such as 1.02 for a slow start; 0: by any. Used by: prodigy."
        ),
    ] = 0.0
    ademamix_alpha: Annotated[
        float,
        Range(0.0, 100.0, 0.1),
        Advanced(),
        Doc("Weight of the slow direction beside the fast one. Used by: bnb-ademamix8bit."),
    ] = 5.0
    adafactor_scale_parameter: Annotated[
        bool,
        Advanced(),
        Doc(
            "Multiply the learning rate by each matrix's own size, at least 0.001. A LoRA begins at 0, so this starts slowly; learning_rate is then about 0.01 to 1. Used by: adafactor."
        ),
    ] = False
    lr_num_cycles: Annotated[
        int, Range(1, 1000), Doc("How many half cosines the run has. Used by the schedule: cosine_with_restarts.")
    ] = 3
    lr_power: Annotated[
        float,
        Range(0.1, 10.0, 0.1),
        Doc("Rate (1 - p)^power at share p of the run; 1 is linear. Used by the schedule: polynomial."),
    ] = 2.0
    lr_decay_share: Annotated[
        float,
        Range(0.01, 1.0, 0.01),
        Doc("Last share of the steps after warm-up, in which the rate falls. Used by the schedule: wsd."),
    ] = 0.2
    lr_min_ratio: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Doc("The lowest rate after warm-up, as a share of the peak. Used by all schedules that fall."),
    ] = 0.0

    def problems(self) -> list[Problem]:
        if self.prodigy_growth and self.prodigy_growth <= 1:
            text = (
                f"{self.prodigy_growth:g} would keep the rate from growing; use more than 1, such as 1.02, or 0 for any"
            )
            return [Problem("prodigy_growth", text)]
        return []
