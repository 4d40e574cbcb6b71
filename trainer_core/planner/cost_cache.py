"""Counts of earlier runs, a small file each: what is counted on shapes takes seconds and does not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..storage.atomic import sha256_text, write_json
from ..version import VERSION

COUNT = 5  # of the way of counting: what an older one kept is not read

Counted = TypeVar("Counted")


class CostCache:
    """Args:
    folder: of the files; made when the first is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def kept(
        self,
        of: tuple[str, ...],
        read: Callable[[dict[str, Any]], Counted],
        count: Callable[[], Counted],
        write: Callable[[Counted], dict[str, Any]],
    ) -> Counted:
        """What an earlier run counted, or `count` now, kept for the next.

        Args:
            of: all that the count depends on, but for the versions of torch and of this.
            read: of what `write` made. What it can't read is counted anew.
        """
        path = self.folder / f"{sha256_text(VERSION, str(COUNT), torch.__version__, *of)[:24]}.json"
        try:
            return read(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, IndexError):  # not there, or of another version
            found = count()
            write_json(path, write(found))
            return found
