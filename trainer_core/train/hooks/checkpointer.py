"""Save checkpoints during the training, and delete old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...config.training import MIN_HELD_OUT, NO_LONGER_BETTER
from ...host import Host, Notice, PhaseStarted
from ..figures.paired_evals import Verdict, is_no_longer_better, verdict
from ..phase_timer import PhaseTimer
from ..step.state import TrainState
from .checkpoint import prune, save_checkpoint
from .compare_ranks import require_same_weights
from .eval_loss import best_step, measure, report
from .leak_meter import measure_leak


def save_and_prune(
    folder: Path, state: TrainState, host: Host, evaluate: bool = True, in_background: bool = False
) -> None:
    """Save a checkpoint, and delete those that the settings do not keep.

    Args:
        folder: the run's folder of checkpoints.
        evaluate: measure the loss on the held-out images, where there are any, and the leak as part of the checkpoint.
            False where a run was interrupted: its history must not differ from that of an uninterrupted run.
        in_background: write it while the training continues, where the run can (kind full).
    """
    if state.background_save:
        state.background_save.wait()
    if evaluate:
        require_same_weights(state, folder)
        _evaluate_held(state, host)
        measure_leak(state, host)
    best = best_step(state)
    if state.sharding is not None:
        from .sharded.sharded_checkpoint import save_sharded as save  # imports torch.distributed.checkpoint
    elif state.ranks.is_main:
        save = save_checkpoint
    else:
        return

    def delete_older(newest: Path) -> None:
        if state.ranks.is_main:
            prune(folder, newest, state.config.keep_checkpoints, state.config.keep_every, best)

    if not (in_background and state.background_save and state.background_save.start(folder, state, delete_older)):
        delete_older(save(folder, state, host))


def catch_up(state: TrainState, host: Host) -> None:
    """Measure the loss on the held-out images that a run interrupted at a checkpoint's step did not.

    The next checkpoint holds it, and the step can be the best one, as in an uninterrupted run.
    """
    if _is_due(state):
        _evaluate_held(state, host)
        measure_leak(state, host)
    decide_stop_(state, host)


def _evaluate_held(state: TrainState, host: Host) -> None:
    if state.held and state.step not in state.eval_losses:
        evaluation = state.evaluations[state.step] = measure(state, host)
        mean, error = state.eval_losses[state.step] = evaluation.loss
        change = _change(state, report(state, evaluation, host))
        host.emit(Notice(f"step {state.step}: loss on held-out images {mean:.4f} +- {error:.4f}{change}"))


def _change(state: TrainState, result: Verdict | None) -> str:
    if result is None:
        return ""
    since = result.best if result.waiting else min(state.evaluations)
    mean, error = result.change if result.waiting else result.improvement
    return f", {mean:+.4f} +- {error:.4f} since step {since}"


def decide_stop_(state: TrainState, host: Host) -> None:
    """Let the run end here where `stop_when` or the judge says so. It follows from the evaluations, also after a resume."""
    if state.judge and state.step in state.evaluations and 0 < state.step < state.num_steps:
        state.stop_reason = state.judge(state.step, state.evaluations)
        if state.stop_reason:
            host.emit(Notice(f"the run ends at step {state.step} of {state.num_steps}: {state.stop_reason}"))
            return
    asked, patience = state.config.stop_when == NO_LONGER_BETTER, state.config.patience
    if not asked or state.step not in state.evaluations or not 0 < state.step < state.num_steps:
        return
    if len(state.evaluations[state.step].judged) < MIN_HELD_OUT:  # the other held-out images preserve the prior
        host.emit(
            Notice(f"stop_when needs {MIN_HELD_OUT} held-out images that are trained on; it is ignored", "warning")
        )
    elif is_no_longer_better(state.evaluations, patience):
        result = verdict(state.evaluations, state.step)
        best = result.best if result else 0
        state.stop_reason = f"the loss of held-out images no longer falls; it was lowest at step {best}"
        host.emit(Notice(f"the run ends at step {state.step} of {state.num_steps}: {state.stop_reason} (stop_when)"))


def _is_due(state: TrainState) -> bool:
    every = state.config.checkpoint_every
    return bool(every) and state.step % every == 0 and state.step < state.num_steps


def checkpoint_hook(folder: Path, host: Host, phases: PhaseTimer) -> Callable[[TrainState], None]:
    """Return a hook that saves every `checkpoint_every` steps; 0: never. The run itself saves the last step."""

    def save(state: TrainState) -> None:
        if state.background_save:
            state.background_save.poll()
        if _is_due(state):
            with phases("save"):
                save_and_prune(folder, state, host, in_background=True)
                decide_stop_(state, host)
            if (state.held or state.leaks) and not state.is_over:
                host.emit(PhaseStarted("train", state.num_steps, "steps"))

    return save
