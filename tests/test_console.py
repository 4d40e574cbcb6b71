"""What a person at a terminal reads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.console import Console, LineLog
from chroma_trainer.trainer_core.host import Notice, PreviewReady


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
