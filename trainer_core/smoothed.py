"""The smoothed loss of a run, while it is trained."""

from __future__ import annotations


class Smoothed:
    """The bias-corrected running mean of the losses that the console, the trackers and the live page (js/run_state.js) show.

    m_t = sum_s k^(t - s) x_s / sum_s k^(t - s),   k = 1 - min(0.1, max(0.005, 20 / steps))
    """

    def __init__(self, num_steps: int):
        self.keep = 1 - min(0.1, max(0.005, 20 / max(1, num_steps)))
        self.total = self.weight = 0.0
        self.last = 0

    def __call__(self, step: int, loss: float) -> float:
        """Return the mean after this loss.

        Args:
            step: Counted from 1, increasing; skipped steps are left out.
            loss: Loss of the step.
        """
        decay = self.keep ** (step - self.last)
        self.total, self.weight = self.total * decay + loss * (1 - decay), self.weight * decay + 1 - decay
        self.last = step
        return self.total / self.weight
