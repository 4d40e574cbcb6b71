"""Stores that fsspec knows, by its store in memory."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.errors import UserError

from .conftest import captions, index_of, png

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    for number in range(3):
        system.pipe(f"/cats/sub/{number}.png", png(number))
        system.pipe(f"/cats/sub/{number}.txt", f"cat {number}".encode())
    yield system
    system.store.clear()


def test_images_and_captions(memory, host):
    index = index_of(host("memory://cats"), "memory://cats")
    assert captions(index) == {f"sub/{number}.png": (f"cat {number}",) for number in range(3)}
    assert index.read(index.samples[2]) == png(2)
    assert len(index_of(host("memory://"), "memory://cats/sub").samples) == 3


def test_errors_are_tried_again(memory, host, monkeypatch):
    tries = []
    opened = type(memory).open

    def fail(self, path, *arguments, **options):
        tries.append(path)
        if len(tries) % 2:
            raise RuntimeError("throttled")
        return opened(self, path, *arguments, **options)

    monkeypatch.setattr(type(memory), "open", fail)
    assert len(index_of(host("memory://"), "memory://cats").samples) == 3 and len(tries) == 12
    monkeypatch.setattr(type(memory), "find", lambda *a, **k: (_ for _ in ()).throw(PermissionError("denied")))
    with pytest.raises(UserError, match=r"denied.*keys"):
        index_of(host("memory://"), "memory://cats")


def test_schemes_without_a_package(host):
    with pytest.raises(UserError, match="fsspec knows"):
        index_of(host("nosuch://"), "nosuch://cats")
