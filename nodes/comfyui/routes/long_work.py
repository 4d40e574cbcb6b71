"""Answers that take seconds to minutes: progress is sent while a thread works, and a page that leaves ends the work.

The answer is one JSON object per line: {"done", "total"} as often as they change, then {"result"} or {"error"}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ....trainer_core.errors import Cancelled, UserError

SECONDS = 0.15  # between two lines of progress


class Progress:
    """What work reports to: progress(done, total). It raises Cancelled if the page has left."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.last: tuple[int, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        self.last = done, total
        if self.is_cancelled():
            raise Cancelled

    def is_cancelled(self) -> bool:
        """Return whether the page has left."""
        return self.cancelled.is_set()


class LongWork:
    """Runs one piece of work at a time: each reads many files and computes on all cores."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def answer(self, call: web.Request, work: Callable[[Progress], Any]) -> web.StreamResponse:
        """Answer a request with the result of work(progress), which runs in a thread.

        Args:
            work: Returns JSON values. Raises UserError for what the user can change.
        """
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(call)
        async with self._turn:
            progress = Progress()
            task = asyncio.ensure_future(asyncio.to_thread(_attempt, work, progress))
            try:
                await _send_progress(response, progress, task)
            finally:  # the page left, or the server ends
                progress.cancelled.set()
                last = await asyncio.shield(task)
            await response.write(last)
        await response.write_eof()
        return response


def _attempt(work: Callable[[Progress], Any], progress: Progress) -> bytes:
    """Return the last line of the answer."""
    try:
        return _line({"result": work(progress)})
    except UserError as error:
        text = str(error)
    except Cancelled:
        text = "canceled"
    except OSError as error:
        text = f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except Exception as error:  # a fault of this pack, or of a library
        logging.exception("[ChromaTrainer] a request of the page failed")
        text = f"{type(error).__name__}: {error}; ComfyUI's log has the details"
    return _line({"error": text})


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


async def _send_progress(response: web.StreamResponse, progress: Progress, task: asyncio.Future[Any]) -> None:
    sent = None
    while not task.done():
        await asyncio.wait([task], timeout=SECONDS)
        if progress.last and progress.last != sent:
            sent = progress.last
            await response.write(_line({"done": sent[0], "total": sent[1]}))
