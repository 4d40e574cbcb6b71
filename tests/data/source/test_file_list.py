"""Names of a folder's images, kept without an object for each."""

from __future__ import annotations

import gc
import tracemalloc

from chroma_trainer.trainer_core.data.source.backend import Entry
from chroma_trainer.trainer_core.data.source.file_list import Entries


def test_entries_read_like_a_list_and_take_eight_bytes_each():
    wanted = [Entry(f"folder/ü {i}\udcff.png", f"{i}-{i * 7}") for i in range(20_000)]
    tracemalloc.start()
    entries = Entries((entry.name, entry.stamp) for entry in wanted)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 12 * len(wanted)  # the array grows by an eighth more than it needs
    assert list(entries) == wanted and entries[3:9] == wanted[3:9] and entries[-1] == wanted[-1]
    assert list(Entries([])) == []
