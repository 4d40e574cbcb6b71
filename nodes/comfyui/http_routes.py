"""HTTP routes of the run panel: list the runs, read the history of a run, and pause, stop or resume it.

Nothing else can be written through these routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from ...trainer_core.errors import UserError
from ...trainer_core.runs.control import COMMANDS, request
from .run_history import Backlog


def add_routes(routes: web.RouteTableDef, output: Callable[[], Path]) -> None:
    """Add GET /chroma_trainer/runs, GET /chroma_trainer/runs/RUN?after=STEP and POST /chroma_trainer/runs/RUN/COMMAND.

    Args:
        routes: table to add the routes to.
        output: returns the folder whose chroma_trainer/ contains the run folders. Called for every request.
    """
    backlogs: dict[Path, Backlog] = {}

    def backlog() -> Backlog:
        return backlogs.setdefault(output(), Backlog(output()))

    @routes.get("/chroma_trainer/runs")
    async def list_runs(call: web.Request) -> web.Response:
        return web.json_response({"runs": await asyncio.to_thread(backlog().runs)})

    @routes.get("/chroma_trainer/runs/{run}")
    async def read_history(call: web.Request) -> web.Response:
        text = call.query.get("after", "0")
        after = int(text) if text.isdecimal() and len(text) < 16 else 0
        return web.json_response(await asyncio.to_thread(backlog().story, _find_folder(call, backlog()), after))

    @routes.post("/chroma_trainer/runs/{run}/{command}")
    async def send_command(call: web.Request) -> web.Response:
        if not same_origin(call.headers):
            raise web.HTTPForbidden(text="cross-origin request refused; send commands from ComfyUI's own page")
        command = call.match_info["command"]
        if command not in COMMANDS:
            raise web.HTTPNotFound(text=f"unknown command {command!r}; use {', '.join(COMMANDS)}")
        folder = _find_folder(call, backlog())
        try:
            await asyncio.to_thread(request, folder, command)
        except UserError as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.json_response(await asyncio.to_thread(backlog().summary, folder))


def _find_folder(call: web.Request, backlog: Backlog) -> Path:
    folder = backlog.folder(call.match_info["run"])
    if folder is None:
        raise web.HTTPNotFound(text="run not found")
    return folder


def same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from the server's own page, or from outside a browser.

    ComfyUI has the same check, but only if its host is a loopback address and no CORS header is set.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()
