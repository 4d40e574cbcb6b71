"""What the page may ask of the server: the runs, one run's story, and pause, stop or resume. Nothing else is written."""

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
    """GET /chroma_trainer/runs, GET .../runs/RUN?after=STEP and POST .../runs/RUN/COMMAND.

    Args:
        output: the folder whose chroma_trainer/ holds the run folders, asked at every request.
    """
    backlogs: dict[Path, Backlog] = {}

    def backlog() -> Backlog:
        return backlogs.setdefault(output(), Backlog(output()))

    @routes.get("/chroma_trainer/runs")
    async def list_runs(call: web.Request) -> web.Response:
        return web.json_response({"runs": await asyncio.to_thread(backlog().runs)})

    @routes.get("/chroma_trainer/runs/{run}")
    async def tell(call: web.Request) -> web.Response:
        text = call.query.get("after", "0")
        after = int(text) if text.isdecimal() and len(text) < 16 else 0
        return web.json_response(await asyncio.to_thread(backlog().story, _folder(call, backlog()), after))

    @routes.post("/chroma_trainer/runs/{run}/{command}")
    async def command(call: web.Request) -> web.Response:
        if not same_origin(call.headers):
            raise web.HTTPForbidden(text="this page is not ComfyUI's own")
        wanted = call.match_info["command"]
        if wanted not in COMMANDS:
            raise web.HTTPNotFound(text=f"no command {wanted!r}; there are {', '.join(COMMANDS)}")
        folder = _folder(call, backlog())
        try:
            await asyncio.to_thread(request, folder, wanted)
        except UserError as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.json_response(await asyncio.to_thread(backlog().summary, folder))


def _folder(call: web.Request, backlog: Backlog) -> Path:
    folder = backlog.folder(call.match_info["run"])
    if folder is None:
        raise web.HTTPNotFound(text="no such run")
    return folder


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from the server's own page, or from no page at all.

    ComfyUI asks the same of every request, but only where its host is a loopback address and no CORS header is set.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()
