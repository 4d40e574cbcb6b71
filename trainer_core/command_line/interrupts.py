"""Ctrl-C, SIGTERM and the closing of a console: the run stops after its step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

CONSOLE_ENDS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT


class Interrupts:
    """Stop the run after the current step on Ctrl-C, SIGTERM or the closing of a Windows console.

    A second signal stops it immediately.
    """

    def __init__(self) -> None:
        self.seen = self._is_asked = False
        self._closing = _on_console_close(self._close)  # a reference, because Windows calls the handler
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:  # Windows has no SIGHUP, and other systems have no SIGBREAK
                continue
            is_ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if not is_ignored:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set a flag, and nothing that can raise: the signal may have hit the middle of a step."""
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; press again to stop immediately\n")

    def _close(self) -> None:
        """Wait for the run to end. Windows calls this in its own thread.

        It ends the process when this returns, and after 5 s in any case.
        """
        self.seen = True
        while threading.main_thread().is_alive():
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the run after the current step. The first signal after this still lets it end in order.

        torchrun sends a signal to all processes of a run when one of them fails, while others may be saving.
        """
        self._is_asked = True

    def __call__(self) -> bool:
        return self.seen or self._is_asked


def _on_console_close(call: Callable[[], None]) -> Any:
    """Register a function that Windows calls when its console is closed or the user logs off.

    Returns:
        The handler, which the caller must keep; None on other systems.
    """
    if sys.platform != "win32":
        return None
    import ctypes

    def handle(event: int) -> bool:
        if event in CONSOLE_ENDS:
            call()
        return event in CONSOLE_ENDS

    handler = ctypes.WINFUNCTYPE(ctypes.c_bool, ctypes.c_uint)(handle)
    ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, True)
    return handler
