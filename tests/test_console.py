"""What a person at a terminal reads."""

from __future__ import annotations

import io

import pytest
from chroma_trainer.trainer_core.console import Console
from chroma_trainer.trainer_core.host import Notice


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "  levels ▁▃█\n"), ("cp1252", "  levels .-#\n"), ("ascii", "  levels .-#\n")]
)
def test_a_console_gets_what_its_encoding_can_show(encoding, shown):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    Console(stream)(Notice("levels ▁▃█", ascii="levels .-#"))
    stream.flush()
    assert raw.getvalue().decode(encoding) == shown


def test_a_text_without_an_ascii_form_is_left_to_the_stream():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252", errors="replace", newline="\n")
    Console(stream)(Notice("猫.png is broken", "warning"))
    stream.flush()
    assert raw.getvalue() == b"! ?.png is broken\n"
