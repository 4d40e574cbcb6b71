"""Cache of counts, one small file each. Counting on shapes takes seconds, and its result does not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..storage.atomic import sha256_text, write_json
from ..version import VERSION

COUNT = 7  # version of the way of counting; entries of other versions are not read

Counted = TypeVar("Counted")


class CostCache:
    """A folder of cached counts.

    Args:
        folder: created when the first file is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get_or_count(
        self,
        key: tuple[str, ...],
        read: Callable[[dict[str, Any]], Counted],
        count: Callable[[], Counted],
        write: Callable[[Counted], dict[str, Any]],
    ) -> Counted:
        """Return the cached count, or count now and cache the result.

        Args:
            key: all that the count depends on, except the versions of torch and of this package.
            read: converts the JSON values that `write` has made. Where it fails, the count is repeated.
            count: computes the result.
            write: converts the result to JSON values.
        """
        path = self.folder / f"{sha256_text(VERSION, str(COUNT), torch.__version__, *key)[:24]}.json"
        try:
            return read(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, IndexError):  # missing, or of another version
            counted = count()
            write_json(path, write(counted))
            return counted
