"""The factor of gradients that are clipped while the norm of all of them is not known yet."""

from __future__ import annotations

import math

from ....config.optimizer import STEP_BEFORE
from ..state import TrainState

CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_


def clip_factor(state: TrainState) -> float:
    """Return the factor of this step's gradients: it clips as if their norm were that of the step before."""
    limit = state.config.max_grad_norm
    if not limit or state.optimizer_config.clip_by != STEP_BEFORE or math.isnan(state.grad_norm):
        return 1.0
    return min(1.0, limit / (state.grad_norm + CLIP_EPS))
