"""Names of the parts that can be chosen, and where each lies. Strings only: nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

PARTS: dict[str, dict[str, str]] = {
    "family": {
        "chroma": ".families.chroma:ChromaFamily",
    },
    "backend": {
        "folder": ".data.folder:FolderBackend",
    },
    "quantization": {
        "none": ".quant.none:KeepPrecision",
        "int8-quanto": ".quant.quanto:Int8Quanto",
    },
    "optimizer": {
        "adamw": ".optim.adamw:build",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Every name of a kind, in the order in which they are offered."""
    return tuple(PARTS[kind])


def load(kind: str, name: str) -> Any:
    """The part itself. An unknown name is our fault by now: specs check names before a run begins."""
    assert name in PARTS[kind], f"no {kind} is called {name!r}"
    module, attribute = PARTS[kind][name].split(":")
    return getattr(importlib.import_module(module, __package__), attribute)
