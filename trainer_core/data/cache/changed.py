"""Files that are replaced while a run starts: what is made of them must not be stored under the hash of what was there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from ...errors import Problem, UserError
from ..sample_table import Sample
from ..source.backend import printable_name
from ..source.scan import converted_sha256

CHANGED = "was replaced or edited while the run was starting; start it again"
MOST_SHOWN = 20  # in one error


class Changed(Exception):
    """A file has other bytes than it had in the scan."""

    def __init__(self) -> None:
        super().__init__(CHANGED)


def check_unchanged(raw: bytes, sample: Sample, identify: Callable[[str, Sample], str] | None = None) -> None:
    """Check that a file has the bytes that the sample's sha256 stands for.

    Args:
        raw: The file's bytes.
        sample: Its sample.
        identify: Returns the sha256 of what is made of a file with a sha256; without it that is the file itself.
    Raises:
        Changed: It has others.
    """
    digest = hashlib.sha256(raw).hexdigest()
    possible = (digest, converted_sha256(digest))
    if sample.sha256 not in (map(identify, possible, (sample, sample)) if identify else possible):
        raise Changed


def refuse_changed(faults: Mapping[str, str]) -> None:
    """Refuse to go on if files have changed.

    Args:
        faults: Reason by the name of the file.
    Raises:
        UserError: Some have.
    """
    names = [printable_name(name) for name, fault in faults.items() if fault == CHANGED]
    if names:
        more = [Problem("dataset", f"{len(names) - MOST_SHOWN} more {CHANGED}")] if len(names) > MOST_SHOWN else []
        raise UserError([*(Problem("dataset", f"{name} {CHANGED}") for name in names[:MOST_SHOWN]), *more])
