"""What a person at a terminal reads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.console import Console, LineLog
from chroma_trainer.trainer_core.host import Notice, PhaseStarted, PreviewReady, StepReport
from chroma_trainer.trainer_core.smoothed import Smoothed


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "  levels ▁▃█\n"), ("cp1252", "  levels .-#\n"), ("ascii", "  levels .-#\n")]
)
def test_a_console_gets_what_its_encoding_can_show(encoding, shown):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    Console(stream)(Notice("levels ▁▃█", ascii="levels .-#"))
    stream.flush()
    assert raw.getvalue().decode(encoding) == shown


@pytest.mark.parametrize("event", [Notice("é猫.png", "info"), PreviewReady(1, Path("é猫.png"))])
def test_what_has_no_ascii_form_is_escaped(event):
    """A strict stream raises for one character, and the console would print nothing more."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252", errors="strict", newline="\n")
    Console(stream)(event)
    stream.flush()
    assert raw.getvalue().decode("cp1252").strip().removeprefix("images: ") == "é\\u732b.png"


def test_a_log_that_cannot_be_written_is_left_out_after_its_first_fault(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252", errors="strict", newline="\n")
    monkeypatch.setattr("sys.stderr", stream)
    log = LineLog("[it] ")
    log("猫\x1b[31m")
    assert raw.getvalue() == b"[it] \\u732b\\u001b[31m\n" and log.faults == []
    stream.close()
    log("one")
    log("two")
    assert log.faults == ["log: I/O operation on closed file."]


def test_the_printed_loss_is_that_of_the_live_page():
    """One first step out of line is soon forgotten, as in trackers and on the page."""
    stream, smoothed, losses = io.StringIO(), Smoothed(20), [9.0, *[1.0] * 19]
    console = Console(stream)
    for step, loss in enumerate(losses, start=1):
        console(StepReport(step, 20, loss, 1e-4, grad_norm=1.0, seconds=0.1))
    shown = [smoothed(step, loss) for step, loss in enumerate(losses, start=1)]
    assert f"  20/20  loss {shown[-1]:.4f}  lr" in stream.getvalue() and shown[-1] < 2.3


def test_one_unit_is_in_the_singular():
    stream = io.StringIO()
    for total in (1, 2):
        Console(stream)(PhaseStarted("latents", total, "images"))
    assert stream.getvalue() == "- encoding images: 1 image\n- encoding images: 2 images\n"
