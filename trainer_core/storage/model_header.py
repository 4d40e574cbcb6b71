"""The header of a file of model weights, safetensors or GGUF. It is parsed once for as long as the file does not change.

A run looks at the header of each file about eight times between its check and its last load.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .gguf.header import gguf_header_of, is_gguf
from .safetensors_header import header_of

# A file that changed less than this long ago may change again without another time of change.
SETTLED_SECONDS = 2.0
# Of all headers that are remembered, the oldest ones make room. 20,000 tensors take about 15 MB; Chroma with its text
# encoder and VAE has 1,500.
MAX_TENSORS = 20_000

ModelHeader = tuple[Mapping[str, Any], int]
Stamp = tuple[str | int, ...]

_headers: OrderedDict[Stamp, ModelHeader] = OrderedDict()
_lock = threading.Lock()  # ComfyUI checks a prompt while another one is trained


def model_header_of(path: Path) -> ModelHeader:
    """Return the tensors of a file (dtype, shape and data_offsets by name), and the offset at which they start.

    The entries are shared with other callers, so they must not be changed.

    Raises:
        OSError: The file does not exist or can't be read.
        ValueError: It is in another format, truncated or damaged.
    """
    stamp = stamp_of(path)
    with _lock:
        if stamp in _headers:
            _headers.move_to_end(stamp)
            return _headers[stamp]
    entries, start = gguf_header_of(path) if is_gguf(path) else header_of(path)
    header = MappingProxyType(entries), start
    if stamp and stamp_of(path) == stamp:  # else it changed while it was read
        _remember(stamp, header)
    return header


def stamp_of(path: Path) -> Stamp:
    """Return what is another one as soon as the file changes; () for a file that may change without.

    Raises:
        OSError: The file does not exist or can't be read.
    """
    facts = path.stat()
    if time.time() - max(facts.st_mtime, facts.st_ctime) <= SETTLED_SECONDS:
        return ()
    return str(path), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _remember(stamp: Stamp, header: ModelHeader) -> None:
    with _lock:
        _headers[stamp] = header
        while sum(len(entries) for entries, _ in _headers.values()) > MAX_TENSORS:
            _headers.popitem(last=False)
