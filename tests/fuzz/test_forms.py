"""Random forms of files and arguments: exit status 0 or 2, lines without control characters, and never a traceback.

CHROMA_TRAINER_FUZZ is the number of forms (default: 300), CHROMA_TRAINER_FUZZ_SEED the first seed. CI tries 5,000:

    CHROMA_TRAINER_FUZZ=5000 python -m pytest tests/fuzz

A failure names its kind and seed; `python -m pytest tests/fuzz -k "KIND"` with that seed and one form repeats it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.errors import UNPRINTABLE
from PIL import Image

from tests.fuzz.forms import KINDS, Form, Kind

NUM_FORMS = int(os.environ.get("CHROMA_TRAINER_FUZZ", "300"))
FIRST_SEED = int(os.environ.get("CHROMA_TRAINER_FUZZ_SEED", "0"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "cats" / "a.png")
    (tmp_path / "cats" / "a.txt").write_text("a cat", "utf-8")
    return tmp_path


def run_form(form: Form) -> int:
    """The exit status. Nothing is trained: what would pass is only checked."""
    if not isinstance(form, list):
        form()
        return 0
    form = ["check" if word == "resume" and place == 0 else word for place, word in enumerate(form)]
    try:
        return main(form)
    except SystemExit as error:  # argparse
        return int(error.code or 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_form_ends_in_a_traceback(home: Path, capsys: pytest.CaptureFixture, kind: Kind):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    statuses = []
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_FORMS // len(KINDS)):
        folder = home / f"form-{seed}"
        folder.mkdir()
        form: Form | None = None
        try:
            form = kind(random.Random(f"{kind.__name__} {seed}"), folder)
            status = run_form(form)
        except Exception as error:
            raise AssertionError(f"{kind.__name__} {seed}: {str(form)[:300]}") from error
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status in (0, 2), f"{kind.__name__} {seed}: {status}"
        assert status == 0 or lines or "usage:" in err, f"{kind.__name__} {seed}: exit status 2 without a line"
        assert not UNPRINTABLE.search((out + err).replace("\n", "")), f"{kind.__name__} {seed}: control characters"
        assert all(len(line) < 5000 for line in lines) and "Traceback" not in err, f"{kind.__name__} {seed}"
        statuses.append(status)
        shutil.rmtree(folder, ignore_errors=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert len(set(statuses)) > 1 or kind.__name__ in ONE_ENDING or len(statuses) < 10, (
        "these forms try only one ending"
    )


ONE_ENDING = {"config", "argument"}  # without weights no model is sound; most texts are no paths
