"""Each image read once: its hash and size, or why it can't be used. Those that are as they were at the last run are not read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ...host import Host, PhaseProgress
from .backend import Backend, Entry
from .decode import BrokenImage, decode
from .integrity import upright_size
from .scan_cache import Known, ScanMemory

SLICE = 400  # images that are scanned together; then progress is told


@dataclass(frozen=True)
class Scan:
    """What reading an image once told: its hash and size, or why it can't be used."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    fault: str = ""


def scans(backend: Backend, entries: Sequence[Entry], root: str, host: Host) -> Iterator[Scan]:
    """A Scan for each entry, in order; read in threads, which Pillow and hashlib let run side by side."""
    memory = ScanMemory(host.paths.cache / "index", str(root))
    total = len(entries)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, total, SLICE):  # in slices: a million images are never in the queue at once
                host.check_cancelled()
                part = entries[start : start + SLICE]
                known = memory.known([entry.name for entry in part])
                found = list(pool.map(partial(_scan, backend, known), part))
                memory.learn({
                    entry.name: (entry.stamp, scan.sha256, scan.width, scan.height)
                    for entry, scan in zip(part, found, strict=True)
                    # A fault may be gone though the file is as it was: rights, a network share.
                    if not scan.fault and known.get(entry.name, ("",))[0] != entry.stamp
                })  # fmt: skip
                yield from found
                if total > SLICE:
                    host.emit(PhaseProgress("start", min(start + SLICE, total), total))
    finally:
        memory.close()


def _scan(backend: Backend, known: Mapping[str, Known], entry: Entry) -> Scan:
    if entry.name in known and known[entry.name][0] == entry.stamp:
        return Scan(*known[entry.name][1:])
    try:
        raw = backend.read(entry.name)
        # A file that is cut short is found now, not at step 399.
        width, height = upright_size(raw) or decode(raw).size
    except OSError as error:
        return Scan(fault=f"it can't be read ({error.strerror or error})")
    except BrokenImage as error:
        return Scan(fault=str(error))
    return Scan(hashlib.sha256(raw).hexdigest(), width, height)
