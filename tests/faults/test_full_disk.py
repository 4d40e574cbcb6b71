"""A disk that is full from any write on: one clear error, everything before it intact, and the next start goes on to the same bytes."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs are forked; Windows can't")
SETTINGS = ("5.steps=3", "5.warmup_steps=1", "5.checkpoint_every=1", "5.validate_every=0", "5.holdout=0")
NUM_TRIALS = 8  # of the operations, evenly spread; benchmarks/faults.py takes every one


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on(home, kills, tmp_path, capsys):
    tried, ended, lost = fill_disk(kills, home, tmp_path, NUM_TRIALS)
    with capsys.disabled():
        print(
            f"\nfull disk: {tried} tried, {ended} ended with an error, {tried - len(lost)} survived, {len(lost)} lost"
        )
    assert lost == [] and ended > tried / 2


def fill_disk(kills, home, results, num_trials: int) -> tuple[int, int, list[str]]:
    """Trials at evenly spread operations: how many, how many ended with an error, and what was lost by each that lost."""
    ended, lost = 0, []
    with kills.Nursery(home) as nursery:
        within = (results.name,)
        assert nursery.run(results / "whole", within=within, count=results / "operations", settings=SETTINGS) == 0
        wanted = kills.finished(results / "whole")
        operations = int((results / "operations").read_text())
        trials = sorted({1 + i * operations // num_trials for i in range(num_trials)})
        for at in trials:
            output, log = results / f"full-{at}", home / "log.txt"
            log.unlink(missing_ok=True)
            status = nursery.run(output, full_at=at, within=within, settings=SETTINGS)
            told = log.read_text("utf-8")
            if status == 0:  # only files that a run can do without were left to write
                assert "can't be written: No space left on device; the run continues" in told or "! " in told, (
                    at,
                    told,
                )
            else:
                ended += 1
                errors = [line for line in told.splitlines() if line.startswith("error: ")]
                if status != 2 or len(errors) != 1 or "No space left on device" not in errors[0] or "Traceback" in told:
                    lost.append(f"operation {at} of {operations}: status {status}, no clear error: {told[-800:]}")
                    continue
            again = nursery.run(output, settings=SETTINGS)
            if again != 0 or kills.finished(output) != wanted:
                lost.append(f"operation {at} of {operations}: the next start gave {again} or other bytes")
    return len(trials), ended, lost
