"""How the runs of a sweep compare, and when one has lost. Needs no model."""

from __future__ import annotations

import json
import random

from chroma_trainer.trainer_core.sweep.results import RunResult, as_json, rows_of, table, why_lost
from chroma_trainer.trainer_core.train.figures.leak import Leak
from chroma_trainer.trainer_core.train.figures.paired_evals import Evaluation


def evaluation(level: float, seed: int = 0, noise: float = 0.01) -> Evaluation:
    """Eight images that differ by far more than two runs do."""
    draw = random.Random(seed)
    return Evaluation({f"{i}": [1.0 + i + level + draw.gauss(0, noise)] * 4 for i in range(8)})


def result(rank: str, losses: dict[int, Evaluation], **values) -> RunResult:
    leaks = {str(step): Leak([1.0], [2.0], [1.0]).as_json() for step in losses if step}
    stored = {str(step): e.as_json() for step, e in losses.items()}
    return RunResult(
        {"rank": rank}, f"run-{rank}", f"tiny/rank-{rank}", 20, 0.5, evaluations=stored, leaks=leaks, **values
    )


GOOD = result("8", {0: evaluation(0.5), 10: evaluation(0.1), 20: evaluation(0.2, 1)})
BAD = result("16", {0: evaluation(0.5), 10: evaluation(0.3, 2), 20: evaluation(0.25, 3)})
SAME = result("4", {0: evaluation(0.5), 20: evaluation(0.1, 4)})


def test_rows_are_compared_image_by_image():
    best, bad, same = rows_of([GOOD, BAD, SAME])
    assert best.is_best and best.difference is None and best.result.best_step == 10
    assert bad.difference and abs(bad.difference[0] - 0.15) < 0.02 and bad.difference[1] < 0.01 and bad.is_worse
    assert same.difference and abs(same.difference[0]) < 0.02 and not same.is_worse
    text = table([best, bad, same])
    assert (
        "best" in text.splitlines()[1] and "+0.1" in text.splitlines()[2] and "not told apart" in text.splitlines()[3]
    )
    assert "0.50 +- 0.00" in text  # the leak
    assert as_json([bad])[0]["difference"]["standard_error"] == bad.difference[1]


def test_results_come_back_from_their_file():
    again = RunResult.from_json(json.loads(json.dumps(GOOD.as_json())))
    assert again == GOOD and again.evals == GOOD.evals and again.leak == (0.5, 0.0)


def test_a_run_without_evaluations_has_a_row():
    (row,) = rows_of([result("8", {})])
    assert row.loss is None and not row.is_best and table([row]).count("\n") == 1
    assert rows_of([]) == []


def test_a_loser_is_found_at_the_same_step_by_two_evaluations():
    bad = {10: evaluation(0.3, 5), 20: evaluation(0.4, 6)}
    assert "above that of rank=4" in why_lost(bad, 20, 40, [GOOD, SAME])  # the best one at step 20
    assert why_lost(bad, 20, 100, [GOOD]) == ""  # too early
    assert why_lost({20: bad[20]}, 20, 40, [GOOD]) == ""  # one evaluation
    assert why_lost(bad, 20, 40, []) == ""
    assert why_lost(bad, 20, 40, [SAME]) == ""  # nothing to compare with at step 10
    close = {10: evaluation(0.1, 7), 20: evaluation(0.4, 6)}
    assert why_lost(close, 20, 40, [GOOD]) == ""


def test_good_runs_are_seldom_stopped():
    """Two runs that are equally good, by 30 seeds: at most a few are taken for losers, of 5 % at each of two looks."""
    stopped = 0
    for seed in range(30):
        own = {step: evaluation(0.1, 100 * seed + step, noise=0.05) for step in (10, 20)}
        rival = result("8", {step: evaluation(0.1, 7000 + 100 * seed + step, noise=0.05) for step in (10, 20)})
        stopped += bool(why_lost(own, 20, 40, [rival]))
    assert stopped <= 1
