"""HTTP routes for LoRA files: list them, take one from the page, report what it is, and write a repaired file beside it.

A file is named as ComfyUI lists it, or by the token of an upload. No file is replaced.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from ....trainer_core.errors import UserError
from ....trainer_core.host import Host
from ....trainer_core.runs.layout import LORAS
from ....trainer_core.storage.atomic import sha256_of
from ....trainer_core.storage.lora_name import ENDING, free_path
from .long_work import LongWork, Progress
from .requests import conflict, read_object, refuse_foreign
from .uploads import Uploads

CHUNK_BYTES = 1 << 20
FIXED = "-fixed"


def add_lora_routes(
    routes: web.RouteTableDef, make_host: Callable[[], Host], work: LongWork, uploads: Uploads | None = None
) -> Uploads:
    """Add GET /chroma_trainer/loras and POST /chroma_trainer/loras/upload?name=NAME, /report, /repair, /save, /forget.

    Args:
        routes: table to add the routes to.
        make_host: returns the host whose folders are searched.
        work: runs what takes long.
        uploads: the files that the page sends. None: those in the host's cache folder.
    Returns:
        The files that the page sends, to be removed when the server ends.
    """
    files = uploads or Uploads(lambda: make_host().paths.cache)

    @routes.get("/chroma_trainer/loras")
    async def list_loras(call: web.Request) -> web.Response:
        names = await asyncio.to_thread(lambda: [n for n in make_host().paths.list_models(LORAS) if n.endswith(ENDING)])
        return web.json_response({"loras": names})

    @routes.post("/chroma_trainer/loras/upload")
    async def take_upload(call: web.Request) -> web.Response:
        refuse_foreign(call)
        try:
            chunks = call.content.iter_chunked(CHUNK_BYTES)
            upload = await files.receive(call.query.get("name", ""), call.content_length, chunks)
        except UserError as error:
            return conflict(error)
        return web.json_response({"upload": upload.token, "name": upload.name})

    @routes.post("/chroma_trainer/loras/report")
    async def report_lora(call: web.Request) -> web.StreamResponse:
        refuse_foreign(call)
        asked, host = await read_object(call), make_host()
        return await work.answer(call, lambda progress: report_of(_find(asked, host, files), host, progress))

    @routes.post("/chroma_trainer/loras/repair")
    async def repair_lora(call: web.Request) -> web.StreamResponse:
        refuse_foreign(call)
        asked, host = await read_object(call), make_host()
        return await work.answer(call, lambda progress: _repair(asked, host, files, progress))

    @routes.post("/chroma_trainer/loras/save")
    async def save_upload(call: web.Request) -> web.Response:
        refuse_foreign(call)
        token, output = _text(await read_object(call), "upload"), make_host().paths.output
        try:
            path = await asyncio.to_thread(files.save, token, output)
        except (UserError, OSError) as error:
            return conflict(error, output / LORAS)
        return web.json_response({"lora": path.name})

    @routes.post("/chroma_trainer/loras/forget")
    async def forget_upload(call: web.Request) -> web.Response:
        refuse_foreign(call)
        files.remove(_text(await read_object(call), "upload"))
        return web.json_response({})

    return files


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name, "")
    return value if isinstance(value, str) else ""


def _find(asked: dict[str, Any], host: Host, files: Uploads) -> tuple[Path, str]:
    """Return the file that a request names, and its name.

    Raises:
        UserError: There is none.
    """
    if token := _text(asked, "upload"):
        upload = files.find(token)
        return upload.path, upload.name
    name = _text(asked, "lora")
    path = host.paths.find_model(LORAS, name, "lora")
    if not path.name.lower().endswith(ENDING) or not os.path.isfile(path):
        raise UserError.at("lora", f"{name[:200]!r} is not a LoRA file; use one that ends in {ENDING}")
    return path, path.name


def report_of(file: tuple[Path, str], host: Host, progress: Progress) -> dict[str, Any]:
    """Return what the page shows of a LoRA file. file: its path, and its name."""
    import torch

    from ....trainer_core.lora_tools.reader import open_lora
    from ....trainer_core.lora_tools.report.examine import examine
    from ....trainer_core.lora_tools.report.family_tree import family_of, located

    path, name = file
    with torch.no_grad(), open_lora(path) as lora:
        lora.name = name
        report = examine(lora, progress)
        family = family_of(lora)
        folders = host.paths.models.get(LORAS, ())
        tree = located(family, host.paths.output, folders, _digest, path)
    values = report.as_json()
    layers, not_loaded = values.pop("layers"), values.pop("not_loaded")
    needed = sorted(layer["rank_of_95_percent"] for layer in layers if layer["rank_of_95_percent"] and layer["norm"])
    return values | {
        "bytes": path.stat().st_size,
        "trigger": report.trigger,
        "num_layers": len(layers),
        "loaded": {program: report.num_keys - len(keys) for program, keys in not_loaded.items()},
        "spectrum": report.spectrum(),
        "needed_rank": needed[len(needed) // 2] if needed else None,
        "can_repair": report.needs_repair and report.base.is_ours and bool(report.layers),
        "family": tree.as_json(),
    }


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: Path, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def _repair(asked: dict[str, Any], host: Host, files: Uploads, progress: Progress) -> dict[str, Any]:
    """Write the repaired file beside the LoRA; that of an upload into the output folder's LoRAs."""
    import torch

    from ....trainer_core.lora_tools.reader import open_lora
    from ....trainer_core.lora_tools.report.examine import examine
    from ....trainer_core.lora_tools.report.repair import repair

    path, name = _find(asked, host, files)
    folder = host.paths.output / LORAS if "upload" in asked else path.parent
    target = free_path(folder / f"{name[: -len(ENDING)]}{FIXED}{ENDING}")
    with torch.no_grad(), open_lora(path) as lora:
        lora.name = name
        written = repair(lora, examine(lora, progress), target)
    roots = [root for root in host.paths.models.get(LORAS, ()) if target.is_relative_to(root.resolve())]
    listed = target.relative_to(roots[0].resolve()).as_posix() if roots else target.name
    return {"lora": listed, "text": written.text()}
