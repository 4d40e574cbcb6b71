"""What was learnt is known again; a memory that is damaged, locked or can't be made is done without."""

from __future__ import annotations

import sqlite3

import pytest
from chroma_trainer.trainer_core.data.source.scan_cache import ScanMemory

SCANS = {f"{i} 猫.png": (f"stamp{i}", f"{i:064x}", i + 1, 2 * i + 1, "P3" * (i % 2)) for i in range(1200)}


def test_what_was_learnt_is_known(tmp_path):
    ScanMemory(tmp_path, "root").learn(SCANS)
    memory = ScanMemory(tmp_path, "root")
    assert memory.read([*SCANS, "other.png"]) == SCANS
    memory.learn({"0 猫.png": ("new", "f" * 64, 7, 7, "")})
    assert memory.read(["0 猫.png"]) == {"0 猫.png": ("new", "f" * 64, 7, 7, "")}
    assert ScanMemory(tmp_path, "other root").read(list(SCANS)) == {}


def test_names_that_are_no_unicode(tmp_path):
    memory = ScanMemory(tmp_path, "root")
    memory.learn({"\udcff.png": ("s", "0" * 64, 1, 1, "")})
    assert memory.read(["\udcff.png"]) == {}
    memory.learn(SCANS)
    assert memory.read(["1 猫.png"]) != {}


def test_a_damaged_one_is_made_anew(tmp_path):
    path = ScanMemory(tmp_path, "root").path
    path.write_bytes(b"rubbish" * 1000)
    memory = ScanMemory(tmp_path, "root")
    assert memory.read(list(SCANS)) == {}
    memory.learn(SCANS)
    assert memory.read(list(SCANS)) == SCANS


def test_a_locked_one_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr("chroma_trainer.trainer_core.data.source.scan_cache.WAIT_SECONDS", 0.01)
    memory = ScanMemory(tmp_path, "root")
    other = sqlite3.connect(memory.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    memory.learn(SCANS)
    assert memory.read(list(SCANS)) == {}
    other.execute("ROLLBACK")
    memory.learn(SCANS)
    assert memory.read(list(SCANS)) == SCANS


def test_no_place_for_one(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    memory = ScanMemory(tmp_path / "file" / "folder", "root")
    memory.learn(SCANS)
    assert memory.read(list(SCANS)) == {}


@pytest.mark.parametrize("count", [0, 1, 500, 501])
def test_any_number_of_names(tmp_path, count):
    memory = ScanMemory(tmp_path, "root")
    memory.learn(SCANS)
    assert len(memory.read(list(SCANS)[:count])) == count
