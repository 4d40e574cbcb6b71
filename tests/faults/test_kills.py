"""Kill it anywhere, and the finished LoRA is the same to the last bit: with real processes and real signals."""

from __future__ import annotations

import os
import signal
import time

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs are forked; Windows can't")


@pytest.mark.slow
def test_sigkill_at_random_instants(home, kills, tmp_path, capsys):
    count = kills.kill_many(home, tmp_path, kills=10, inside=5, seed=2026)
    with capsys.disabled():
        print(f"\n{count}")
    assert count.lost == []
    assert count.tried >= 10 and count.inside_a_save >= 4 and count.survived == count.tried


@pytest.mark.slow
def test_sigterm_ends_with_a_checkpoint_and_a_lora_and_the_next_start_goes_on(home, kills, tmp_path, capsys):
    ended = 0
    with kills.Nursery(home) as nursery:
        assert nursery.run(tmp_path / "whole") == 0
        wanted = kills.finished(tmp_path / "whole")
        for trial in range(3):
            output = tmp_path / f"trial-{trial}"
            pid = nursery.start(output)
            until = time.monotonic() + 60
            while not list(output.glob("chroma_trainer/*/checkpoints/step-*")):
                assert time.monotonic() < until
                time.sleep(0.005)
            time.sleep(0.01 * trial)
            os.kill(pid, signal.SIGTERM)
            status = nursery.wait()
            assert status in (0, 130)
            ended += status == 130
            assert list((output / "loras").iterdir())
            assert nursery.run(output) == 0 and kills.finished(output) == wanted
    with capsys.disabled():
        print(f"\nSIGTERM: 3 tried, {ended} ended early, 3 survived, 0 lost")
    assert ended >= 1


@pytest.mark.slow
@pytest.mark.parametrize("closed_terminal", [False, True])
def test_a_console_that_is_gone_ends_a_run_as_any_cancel(home, kills, tmp_path, closed_terminal):
    """Ctrl-C under `| tee`, where tee ends first; a closed terminal, whose every write fails."""
    count = kills.interrupt_many(home, tmp_path, 3, closed_terminal, seed=2027)
    assert not count.lost, count.lost[0]
    assert count.survived == count.tried == 3
    assert count.canceled >= 1
