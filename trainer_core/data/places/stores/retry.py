"""Try a request again where a store is busy or the network fails, for about half a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .store import Temporary, store_fault

WAITS = (0.5, 2.0, 8.0, 16.0)  # seconds before each further try
LONGEST_WAIT = 60.0  # seconds that a server may ask for
ADVICE = "what has been read is stored, so that another start continues from there"

Result = TypeVar("Result")


def with_retries(place: str, call: Callable[[], Result], check_cancelled: Callable[[], None]) -> Result:
    """Return the result of a call that may fail for a while.

    Args:
        place: The store, for the message.
        call: Raises Temporary if another try may succeed.
        check_cancelled: Raises if the user canceled; called before each try.
    Raises:
        UserError: It failed as often as it may.
    """
    for wait in WAITS:
        check_cancelled()
        try:
            return call()
        except Temporary as error:
            _sleep(min(max(wait, error.wait), max(LONGEST_WAIT, wait)), check_cancelled)
    check_cancelled()
    try:
        return call()
    except Temporary as error:
        raise store_fault(place, f"{error} ({len(WAITS) + 1} tries)", ADVICE) from error


def _sleep(seconds: float, check_cancelled: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_cancelled()
        time.sleep(min(left, 0.5))
