"""Progress and cancellation of tools that go through a LoRA layer by layer."""

from __future__ import annotations

from collections.abc import Callable

from ..host import Host, PhaseProgress, PhaseStarted

Progress = Callable[[int, int], None]  # progress(done, total)


def progress_of(host: Host, phase: str, unit: str = "layers") -> Progress:
    """Return a function progress(done, total) that reports to the host, and raises if the user canceled.

    Args:
        host: Environment.
        phase: What is being done, in words.
        unit: Name of what is counted.
    """

    def progress(done: int, total: int) -> None:
        if done == 1:
            host.emit(PhaseStarted(phase, total, unit))
        host.emit(PhaseProgress(phase, done, total))
        host.check_cancelled()

    return progress
