"""Read each image once to get its hash and size, or the reason why it can't be used.

Images that have not changed since an earlier run are not read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ...host import Host, PhaseProgress
from ...storage.atomic import sha256_text
from .backend import Backend, Entry
from .decode import BrokenImage, decode, profile_of
from .folder import FolderBackend
from .integrity import upright_size
from .scan_cache import Known, ScanMemory

TO_SRGB = "converted to sRGB"
SLICE = 400  # images that are scanned between two progress reports
SLOW_SLICE = 32  # the same, where images may be downloaded


def converted_sha256(sha256: str) -> str:
    """Return the digest of the pixels of a file with this digest, where they are converted to sRGB."""
    return sha256_text(sha256, TO_SRGB)


@dataclass(frozen=True)
class Scan:
    """The result of reading an image once.

    Attributes:
        sha256: SHA-256 of the file.
        width: In pixels, after rotation to upright.
        height: In pixels, after rotation to upright.
        profile: Name of the color profile from which it is converted to sRGB; "" if it is not converted.
        fault: Why it can't be used; "" if it can.
    """

    sha256: str = ""
    width: int = 0
    height: int = 0
    profile: str = ""
    fault: str = ""

    @property
    def pixels_sha256(self) -> str:
        """Digest that identifies the pixels: that of the file, or another one if they are converted.

        Caches of earlier versions, which did not convert, are thus not used.
        """
        return converted_sha256(self.sha256) if self.profile else self.sha256


def scans(backend: Backend, entries: Sequence[Entry], root: str, host: Host) -> Iterator[Scan]:
    """Yield a Scan for each entry, in order.

    Files are read in threads, because Pillow and hashlib release the GIL.

    Args:
        backend: Source of the images.
        entries: The images.
        root: Identifies the dataset folder in the cache.
        host: Its cache folder holds the results of earlier scans; receives progress.
    """
    memory = ScanMemory(host.paths.cache / "index", str(root))
    total, size = len(entries), SLICE if isinstance(backend, FolderBackend) else SLOW_SLICE
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, total, size):  # in slices, so that a million images are never queued at once
                host.check_cancelled()
                part = entries[start : start + size]
                cached = memory.read([entry.name for entry in part])
                results = list(pool.map(partial(_scan, backend, cached), part))
                memory.learn({
                    entry.name: (entry.stamp, scan.sha256, scan.width, scan.height, scan.profile)
                    for entry, scan in zip(part, results, strict=True)
                    # Faults are not cached: permissions or a network share may be fixed without changing the file.
                    if not scan.fault and cached.get(entry.name, ("",))[0] != entry.stamp
                })  # fmt: skip
                yield from results
                if total > size:
                    host.emit(PhaseProgress("start", min(start + size, total), total))
    finally:
        memory.close()


def _scan(backend: Backend, cached: Mapping[str, Known], entry: Entry) -> Scan:
    if entry.name in cached and cached[entry.name][0] == entry.stamp:
        return Scan(*cached[entry.name][1:])
    try:
        return scan_bytes(backend.read(entry.name))
    except OSError as error:
        return Scan(fault=f"it can't be read ({error.strerror or error})")
    except BrokenImage as error:
        return Scan(fault=str(error))


def scan_bytes(raw: bytes) -> Scan:
    """Return the scan of an image file.

    Raises:
        BrokenImage: See decode.
    """
    # A truncated file is detected now, not at step 399.
    width, height = upright_size(raw) or decode(raw).size
    return Scan(hashlib.sha256(raw).hexdigest(), width, height, profile_of(raw))
