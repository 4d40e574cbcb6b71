"""Load scripts that belong to no package, such as those of tools/ and benchmarks/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str | Path) -> ModuleType:
    """Run a script as a new module, and return it.

    Args:
        path: relative to the repository's root, or absolute.
    """
    path = ROOT / path
    # A name of its own: tools/locales.py and others are called as modules of the library are.
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up here
    spec.loader.exec_module(module)
    return module
