"""The name of a LoRA: with its ending, in a subfolder and with a date, as people type it in SaveImage."""

from __future__ import annotations

from datetime import datetime

import pytest
from chroma_trainer.trainer_core.storage.lora_name import faults_of_name, resolve_name

NOW = datetime(2031, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("mine", "mine"),
        ("mine.safetensors", "mine"),
        ("Mine.SafeTensors", "Mine"),
        ("mine v1.5", "mine v1.5"),
        ("styles\\neon/mine.safetensors", "styles/neon/mine"),
        ("mine-%date%", "mine-2031-02-03"),
        ("%date:yyyy-MM-dd%/mine_%date:hhmmss%", "2031-02-03/mine_040506"),
        ("%date:d.M.yy h-m-s%", "3.2.31 4-5-6"),
        ("%year%%month%%day%-%hour%%minute%%second%", "20310203-040506"),
        ("50% neon 50%", "50% neon 50%"),
    ],
)
def test_what_people_type(typed, name):
    assert resolve_name(typed, NOW) == name and faults_of_name(typed) == []


@pytest.mark.parametrize(
    "typed",
    [
        "../mine", "styles/../../mine", "..\\mine", "/mine", "\\\\server\\share\\mine", "C:\\mine", "C:mine", "a//b", "a/",
        ".safetensors", "./mine", "a/.", "%width%", "%date:yyyy/../MM%/../..", "%Node.title%", "COM1", "com¹.x", "aux.mine",
        "NUL/mine", "styles/con.safetensors", "conin$", "mine ", "mine\x07", "mine?",
    ],
)  # fmt: skip
def test_what_is_refused_on_every_system(typed):
    assert len(faults_of_name(typed)) == 1
