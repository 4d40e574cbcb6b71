"""HTTP routes for the images of a run that are voted on, or shown at several strengths.

While a vote goes on, nothing in an answer says which version an image is of: an image is asked for by its place and its side.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from ....trainer_core.errors import UserError
from ....trainer_core.host import Host
from ....trainer_core.run_images.image_sets import VOTE, find_set, image_name, read_set, sets_of
from ....trainer_core.run_images.votes import CHOICES, SIDES, Vote, read_vote
from ....trainer_core.runs import layout
from ....trainer_core.storage.atomic import sha256_of
from ....trainer_core.storage.bounded_files import Unusable, read_regular
from ....trainer_core.storage.lora_name import free_path
from .long_work import LongWork
from .requests import conflict, image_response, read_object, refuse_foreign

IMAGE_BYTES = 256 << 20
ROOT = "/chroma_trainer/runs/{run}/sets"


def add_image_set_routes(
    routes: web.RouteTableDef, find_run: Callable[[web.Request], Path], make_host: Callable[[], Host], work: LongWork
) -> None:
    """Add GET /chroma_trainer/runs/RUN/sets, .../SET, .../SET/ROW/COLUMN, and POST .../SET and .../SET/save.

    Args:
        routes: table to add the routes to.
        find_run: returns the folder of the run that a request names, or raises that it is not found.
        make_host: returns the host whose folders are searched.
        work: runs what takes long.
    """
    lock = threading.Lock()  # of votes.json; several threads handle requests

    def find(call: web.Request) -> Path:
        folder = find_set(find_run(call), call.match_info["set"])
        if folder is None:
            raise web.HTTPNotFound(text="images not found")
        return folder

    @routes.get(ROOT)
    async def list_sets(call: web.Request) -> web.Response:
        run = find_run(call)
        return web.json_response(await asyncio.to_thread(_describe_run, run, make_host()))

    @routes.get(f"{ROOT}/{{set}}")
    async def read(call: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(_describe, find(call), "result" in call.query))

    @routes.post(f"{ROOT}/{{set}}")
    async def vote(call: web.Request) -> web.Response:
        refuse_foreign(call)
        folder, asked = find(call), await read_object(call)
        try:
            return web.json_response(await asyncio.to_thread(_vote, folder, asked, lock))
        except (UserError, OSError) as error:
            return conflict(error, folder)

    @routes.post(f"{ROOT}/{{set}}/save")
    async def save(call: web.Request) -> web.StreamResponse:
        refuse_foreign(call)
        run, folder, asked, host = find_run(call), find(call), await read_object(call), make_host()
        return await work.answer(call, lambda progress: _save(run, folder, asked.get("version"), host, progress))

    @routes.get(f"{ROOT}/{{set}}/{{row}}/{{column}}")
    async def show(call: web.Request) -> web.Response:
        folder, place = find(call), (call.match_info["row"], call.match_info["column"])
        try:
            body = await asyncio.to_thread(lambda: read_regular(folder / _image_at(folder, *place), IMAGE_BYTES))
        except (OSError, Unusable, UserError) as error:
            raise web.HTTPNotFound(text="image not found") from error
        return image_response(body, "image/png")


def _describe_run(run: Path, host: Host) -> dict[str, Any]:
    """Return the sets of a run, and the versions that a vote can be on."""
    checkpoints = layout.list_checkpoints(run / layout.CHECKPOINTS)
    steps = [layout.step_of(path) for path in checkpoints if (path / layout.CHECKPOINT_LORA).is_file()]
    folder = host.paths.output / layout.LORAS
    loras = (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")) if folder.is_dir() else []
    )
    sets = []
    for name, images in sets_of(run):
        vote = read_vote(run / layout.IMAGE_SETS / name)
        labels = [version.label for version in images.versions]
        voted = {"voted": len(vote.choices), "outcome": _outcome(vote)} if vote else {}
        sets.append(
            {
                "set": name,
                "kind": images.kind,
                "versions": labels,
                "rows": len(images.rows),
                "step": images.step,
                "checkpoints": sorted({images.step_of(version) for version in images.versions}),
                **voted,
            }
        )
    return {"sets": sets, "steps": steps, "loras": loras}


def _outcome(vote: Vote, is_asked: bool = False) -> dict[str, Any] | None:
    """Return what the votes say when all are there, or if the user asks: before that it would not be blind."""
    return vote.outcome.as_json() if vote.choices and (vote.is_complete or is_asked) else None


def _describe(folder: Path, is_asked: bool = False) -> dict[str, Any]:
    """Return the rows of a set: of a vote in their mixed order, with what was chosen."""
    vote = read_vote(folder)
    if vote is None:
        images = read_set(folder)
        assert images
        rows = [asdict(row) for row in images.rows]
        versions = [
            {"label": version.label, "strength": version.strength, "step": images.step_of(version)}
            for version in images.versions
        ]
        return {"set": folder.name, "kind": images.kind, "step": images.step, "versions": versions, "rows": rows}
    rows = [asdict(vote.images.rows[number]) | {"choice": vote.side_of(number)} for number in vote.order]
    return {"set": folder.name, "kind": VOTE, "rows": rows, "outcome": _outcome(vote, is_asked)}


def _image_at(folder: Path, row: str, column: str) -> str:
    """Return the name of an image: of a vote by its place in the order and its side, else by row and version.

    Raises:
        UserError: there is none.
    """
    vote = read_vote(folder)
    images = vote.images if vote else read_set(folder)
    number = int(row) if row.isdecimal() and len(row) < 8 else -1
    if images and 0 <= number < len(images.rows):
        if vote and column in SIDES:
            shown = vote.order[number]
            return image_name(shown, vote.version_at(shown, column))
        if not vote and column.isdecimal() and len(column) < 4 and int(column) < len(images.versions):
            return image_name(number, int(column))
    raise UserError.at("image", "is not in this set")


def _vote(folder: Path, asked: dict[str, Any], lock: threading.Lock) -> dict[str, Any]:
    place, choice = asked.get("place"), asked.get("choice")
    with lock:
        vote = read_vote(folder)
        if vote is None:
            raise UserError.at("vote", "is not on two versions")
        if type(place) is not int or not 0 <= place < len(vote.order) or choice not in (*CHOICES, ""):
            raise UserError.at("vote", f"is a place from 0 to {len(vote.order) - 1} and one of {', '.join(CHOICES)}")
        vote.with_choice(vote.order[place], choice).save()
    return _describe(folder)


def _save(run: Path, folder: Path, version: Any, host: Host, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Save the LoRA of a slider at the strength of a version, under a name that no file has.

    Raises:
        UserError: there is no such version, or the checkpoint is not there any more.
    """
    import torch

    from ....trainer_core.lora_tools.reader import open_lora
    from ....trainer_core.lora_tools.surgery import scale_blocks
    from ....trainer_core.lora_tools.writer import edited_metadata, write_lora

    images = read_set(folder)
    if images is None or images.kind == VOTE or type(version) is not int or not 0 <= version < len(images.versions):
        raise UserError.at("version", "is not one of this set")
    shown = images.versions[version]
    if not shown.strength:
        raise UserError.at("version", "is the base model; choose a strength that is not 0")
    step = images.step_of(shown)
    path = run / layout.CHECKPOINTS / layout.step_name(step) / layout.CHECKPOINT_LORA
    if not path.is_file() or sha256_of(path) != shown.sha256:
        raise UserError.at("version", f"is of the checkpoint of step {step}, which is not there any more")
    name = f"{layout.name_of_run(run)}-step-{step}-strength-{shown.strength:g}.safetensors"
    target = free_path(host.paths.output / layout.LORAS / name)
    with torch.no_grad(), open_lora(path) as lora:
        metadata = edited_metadata("lora strength", [(lora, f"strength {shown.strength:g}")])
        written = write_lora(target, scale_blocks(lora, "all", "", shown.strength, progress), metadata)
    return {"lora": target.name, "text": written.text()}
