"""When a checkpoint is saved, and which ones stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...host import EvalReport, Host, Notice
from ..phase_timer import Phases
from ..step.state import TrainState
from .checkpoint import prune, save_checkpoint
from .eval_loss import best_step, eval_loss


def save_and_prune(folder: Path, run: TrainState, host: Host, evaluate: bool = True) -> None:
    """Save the run's state. Older ones go, but for those the settings keep.

    Args:
        evaluate: with held-out images, their loss is taken and is part of the state. Not where a run ends by chance:
            its history must not differ from that of a run that nobody ended.
    """
    if evaluate and run.held and run.step not in run.eval_losses:
        mean, error = run.eval_losses[run.step] = eval_loss(run)
        host.emit(EvalReport(run.step, mean, error, held_out=True))
        host.emit(Notice(f"step {run.step}: loss on held-out images {mean:.4f} +- {error:.4f}"))
    newest = save_checkpoint(folder, run, host)
    prune(folder, newest, run.config.keep_checkpoints, run.config.keep_every, best_step(run))


def checkpoint_hook(folder: Path, host: Host, phases: Phases) -> Callable[[TrainState], None]:
    """Saves every `checkpoint_every` steps; 0: never. The last step is saved by the run itself."""

    def save(run: TrainState) -> None:
        every = run.config.checkpoint_every
        if every and run.step % every == 0 and run.step < run.num_steps:
            with phases("save"):
                save_and_prune(folder, run, host)

    return save
