"""Save checkpoints during the training, and delete old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...host import EvalReport, Host, Notice, PhaseStarted
from ..phase_timer import PhaseTimer
from ..step.state import TrainState
from .checkpoint import prune, save_checkpoint
from .compare_ranks import require_same_weights
from .eval_loss import best_step, eval_loss


def save_and_prune(folder: Path, state: TrainState, host: Host, evaluate: bool = True) -> None:
    """Save a checkpoint, and delete those that the settings do not keep.

    Args:
        folder: the run's folder of checkpoints.
        evaluate: measure the loss on the held-out images, where there are any, as part of the checkpoint. False where a
            run was interrupted: its history must not differ from that of an uninterrupted run.
    """
    if evaluate:
        require_same_weights(state, folder)
        _evaluate_held(state, host)
    if not state.ranks.is_main:
        return
    newest = save_checkpoint(folder, state, host)
    prune(folder, newest, state.config.keep_checkpoints, state.config.keep_every, best_step(state))


def catch_up(state: TrainState, host: Host) -> None:
    """Measure the loss on the held-out images that a run interrupted at a checkpoint's step did not.

    The next checkpoint holds it, and the step can be the best one, as in an uninterrupted run.
    """
    if _is_due(state):
        _evaluate_held(state, host)


def _evaluate_held(state: TrainState, host: Host) -> None:
    if state.held and state.step not in state.eval_losses:
        mean, error = state.eval_losses[state.step] = eval_loss(state, host)
        host.emit(EvalReport(state.step, mean, error, held_out=True))
        host.emit(Notice(f"step {state.step}: loss on held-out images {mean:.4f} +- {error:.4f}"))


def _is_due(state: TrainState) -> bool:
    every = state.config.checkpoint_every
    return bool(every) and state.step % every == 0 and state.step < state.num_steps


def checkpoint_hook(folder: Path, host: Host, phases: PhaseTimer) -> Callable[[TrainState], None]:
    """Return a hook that saves every `checkpoint_every` steps; 0: never. The run itself saves the last step."""

    def save(state: TrainState) -> None:
        if _is_due(state):
            with phases("save"):
                save_and_prune(folder, state, host)
            if state.held:
                host.emit(PhaseStarted("train", state.num_steps, "steps"))

    return save
