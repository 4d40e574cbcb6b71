"""Freed RAM goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import threading
import psutil
import torch
from chroma_trainer.trainer_core.devices import trim_heap

def fill():  # in the arena of a thread: small tensors, and one that stays behind them
    tensors = [torch.ones(16_000) for _ in range(4000)]
    stay.append(torch.ones(16_000))

stay = []
resident = psutil.Process().memory_info
before = resident().rss
thread = threading.Thread(target=fill)
thread.start()
thread.join()
freed = resident().rss - before
trim_heap()
print(freed, resident().rss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems return freed memory themselves")
def test_freed_ram_is_given_back():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 200_000_000 and after < 50_000_000  # of 256 MB


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_memory_is_that_of_this_process_alone():
    """What started it, as ComfyUI or a launcher may, can have been far larger: getrusage counts that."""
    child = "from chroma_trainer.trainer_core.devices import peak_ram_bytes; print(peak_ram_bytes())"
    parent = f"import subprocess, sys\nlarge = bytearray(b'x') * (1 << 30)\nsubprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 1 << 24 < int(done.stdout) < 1 << 30
