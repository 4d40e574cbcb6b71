"""What all HTTP routes share: requests of other sites are refused, JSON bodies are objects, and errors are answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from ....trainer_core.errors import UserError


def same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from the server's own page, or from outside a browser.

    ComfyUI has the same check, but only if its host is a loopback address and no CORS header is set.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


def refuse_foreign(call: web.Request) -> None:
    """Refuse a request of another site's page."""
    if not same_origin(call.headers):
        raise web.HTTPForbidden(text="cross-origin request refused; send commands from ComfyUI's own page")


async def read_object(call: web.Request) -> dict[str, Any]:
    """Return the JSON object of a request. aiohttp bounds its size."""
    try:
        value = await call.json()
    except (ValueError, RecursionError):  # also where it is not UTF-8
        value = None
    if not isinstance(value, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    return value


def conflict(error: UserError | OSError, place: object = "") -> web.Response:
    """Return the answer to a request that can't be fulfilled. place: the folder of an operating system's error."""
    text = f"{error.strerror or error} ({place})" if isinstance(error, OSError) else str(error)
    return web.json_response({"error": text}, status=409)


def image_response(body: bytes, kind: str) -> web.Response:
    """Return an image that does not change under its address."""
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, content_type=kind, headers=headers)
