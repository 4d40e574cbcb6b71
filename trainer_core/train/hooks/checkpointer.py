"""When a checkpoint is saved, and which ones stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...host import EvalReport, Host, Notice
from ..phase_timer import PhaseTimer
from ..step.state import TrainState
from .checkpoint import prune, save_checkpoint
from .eval_loss import best_step, eval_loss


def save_and_prune(folder: Path, state: TrainState, host: Host, evaluate: bool = True) -> None:
    """Save the run's state. Older ones go, but for those the settings keep.

    Args:
        evaluate: with held-out images, their loss is taken and is part of the state. Not where a run ends by chance:
            its history must not differ from that of a run that nobody ended.
    """
    if evaluate and state.held and state.step not in state.eval_losses:
        mean, error = state.eval_losses[state.step] = eval_loss(state)
        host.emit(EvalReport(state.step, mean, error, held_out=True))
        host.emit(Notice(f"step {state.step}: loss on held-out images {mean:.4f} +- {error:.4f}"))
    newest = save_checkpoint(folder, state, host)
    prune(folder, newest, state.config.keep_checkpoints, state.config.keep_every, best_step(state))


def checkpoint_hook(folder: Path, host: Host, phases: PhaseTimer) -> Callable[[TrainState], None]:
    """Saves every `checkpoint_every` steps; 0: never. The last step is saved by the run itself."""

    def save(state: TrainState) -> None:
        every = state.config.checkpoint_every
        if every and state.step % every == 0 and state.step < state.num_steps:
            with phases("save"):
                save_and_prune(folder, state, host)

    return save
