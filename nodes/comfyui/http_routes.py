"""HTTP routes of the page: list the runs, read the history of a run, control it, order the queue, unfold a QuickLora, and
import another trainer's configuration.

Apart from these commands and the cache, nothing can be written through these routes. Those for LoRA files,
datasets and images that are voted on are in routes/.
"""

from __future__ import annotations

import asyncio
import atexit
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from ...trainer_core.errors import UserError, printable
from ...trainer_core.host import Host
from ...trainer_core.launch.run_queue import ACTIONS, WAITING, RunQueue, describe_queue
from ...trainer_core.runs.control import COMMANDS, request
from .. import CATALOGUE
from ..wizard.quick_lora import unfold
from .live_events import removed_message
from .routes.dataset_routes import add_dataset_routes
from .routes.image_set_routes import add_image_set_routes
from .routes.long_work import LongWork
from .routes.lora_routes import add_lora_routes
from .routes.requests import conflict, read_object, refuse_foreign
from .run_history import Backlog


def add_routes(
    routes: web.RouteTableDef,
    output: Callable[[], Path],
    make_host: Callable[[], Host],
    queue: RunQueue,
    send: Callable[[dict[str, Any]], None],
) -> None:
    """Add GET /chroma_trainer/runs, GET /chroma_trainer/runs/RUN?after=STEP, POST /chroma_trainer/runs/RUN/COMMAND,
    POST /chroma_trainer/queue/ID/ACTION, POST /chroma_trainer/unfold and POST /chroma_trainer/import.

    Args:
        routes: table to add the routes to.
        output: returns the folder whose chroma_trainer/ contains the run folders. Called for every request.
        make_host: returns the host whose folders are searched for models and images.
        queue: the runs that wait in the background.
        send: sends a message to all pages.
    """
    backlogs: dict[Path, Backlog] = {}
    shared = SharedAnswers()
    work = LongWork()
    atexit.register(add_lora_routes(routes, make_host, work).clear)
    add_dataset_routes(routes, make_host, work)
    add_image_set_routes(routes, lambda call: _find_folder(call, backlog()), make_host, work)

    _add_conversions(routes, make_host)

    def backlog() -> Backlog:
        return backlogs.setdefault(output(), Backlog(output()))

    @routes.get("/chroma_trainer/runs")
    async def list_runs(call: web.Request) -> web.Response:
        current = backlog()
        return _response(
            await shared.get(current.output, lambda: {"runs": current.runs(), "queue": describe_queue(queue)})
        )

    @routes.get("/chroma_trainer/runs/{run}")
    async def read_history(call: web.Request) -> web.Response:
        text = call.query.get("after", "0")
        after = int(text) if text.isdecimal() and len(text) < 16 else 0
        current = backlog()
        folder = _find_folder(call, current)
        return _response(await shared.get((folder, after), lambda: current.story(folder, after)))

    @routes.post("/chroma_trainer/queue/{entry}/{action}")
    async def order_queue(call: web.Request) -> web.Response:
        action = _command_of(call, "action", ACTIONS)
        try:
            entry = await asyncio.to_thread(queue.act, call.match_info["entry"], action)
        except UserError as error:
            return conflict(error)
        if action == "remove" and entry.state == WAITING:
            send(removed_message(entry))
        return web.json_response({"queue": await asyncio.to_thread(describe_queue, queue)})

    @routes.post("/chroma_trainer/runs/{run}/{command}")
    async def send_command(call: web.Request) -> web.Response:
        command = _command_of(call, "command", COMMANDS)
        folder = _find_folder(call, backlog())
        try:
            await asyncio.to_thread(request, folder, command)
        except UserError as error:
            return conflict(error)
        return web.json_response(await asyncio.to_thread(backlog().summary, folder))


def _add_conversions(routes: web.RouteTableDef, make_host: Callable[[], Host]) -> None:
    """Add the routes that answer a workflow, and change nothing."""

    @routes.post("/chroma_trainer/unfold")
    async def unfold_node(call: web.Request) -> web.Response:
        refuse_foreign(call)
        values = await read_object(call)
        try:
            return web.json_response({"workflow": await asyncio.to_thread(unfold, values, make_host())})
        except UserError as error:
            return conflict(error)

    @routes.post("/chroma_trainer/import")
    async def import_files(call: web.Request) -> web.Response:
        from ...trainer_core.importers.dropped_files import import_dropped  # not at every start of ComfyUI

        refuse_foreign(call)
        entries = (await read_object(call)).get("files")
        if not isinstance(entries, list):
            raise web.HTTPBadRequest(text="the body has no list of files")
        try:
            return web.json_response(await asyncio.to_thread(import_dropped, entries, CATALOGUE))
        except UserError as error:
            return web.json_response({"error": printable(str(error), lines=True)}, status=409)


class SharedAnswers:
    """Computes JSON in a thread, once for all requests of one kind that wait at the same time.

    An answer is never older than its request: requests that arrive during a computation share the next one.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[bytes]] = {}
        self._waiting: dict[Hashable, asyncio.Task[bytes]] = {}

    async def get(self, key: Hashable, compute: Callable[[], Any]) -> bytes:
        """Return the JSON of compute(), which is called after this call.

        Args:
            key: identifies what is asked for.
            compute: returns JSON values.
        """
        if key not in self._waiting:
            self._waiting[key] = asyncio.ensure_future(self._compute(key, compute))
        return await asyncio.shield(self._waiting[key])  # one who leaves does not cancel the others

    async def _compute(self, key: Hashable, compute: Callable[[], Any]) -> bytes:
        if key in self._running:
            await asyncio.wait([self._running[key]])
        task = self._running[key] = self._waiting.pop(key)
        try:
            return await asyncio.to_thread(lambda: json.dumps(compute(), allow_nan=False).encode())
        finally:
            if self._running.get(key) is task:
                del self._running[key]


def _response(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", charset="utf-8")


def _command_of(call: web.Request, name: str, commands: Sequence[str]) -> str:
    """Return the command of a request that the server's own page sends."""
    refuse_foreign(call)
    command = call.match_info[name]
    if command not in commands:
        raise web.HTTPNotFound(text=f"unknown command {command!r}; use {', '.join(commands)}")
    return command


def _find_folder(call: web.Request, backlog: Backlog) -> Path:
    folder = backlog.folder(call.match_info["run"])
    if folder is None:
        raise web.HTTPNotFound(text="run not found")
    return folder
