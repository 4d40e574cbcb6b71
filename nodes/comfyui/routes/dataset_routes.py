"""HTTP routes for datasets: examine the folder of a DatasetBackend, show its images, and write a copy without some.

The images of a report are read by its token and their number, so that no path comes from the page. The dataset stays as it is.
"""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ....trainer_core.errors import UserError
from ....trainer_core.host import Event, Host, PhaseProgress, SinkHost
from ....trainer_core.runs.control import find_run_by_name
from ....trainer_core.spec import build_inputs
from ... import CATALOGUE
from .long_work import LongWork, Progress
from .requests import conflict, image_response, read_object, refuse_foreign

NODE = "DatasetBackend"
MAX_REPORTS = 2  # the newest reports whose images can be shown, for two open pages
EDGES = (192, 2048)  # pixels of a thumbnail, and of an image that is opened
MAX_SHOWN = 500  # images of a finding that the page gets


@dataclass(frozen=True)
class Examined:
    """A report, and its images.

    Attributes:
        report: The DatasetReport.
        images: The ImageList.
        folder: The folder, as the node names it.
    """

    report: Any
    images: Any
    folder: str


def _host_of_page(host: Host, progress: Progress) -> SinkHost:
    """Return a host with the folders of another one, whose progress goes to the page, and that the page can cancel."""

    def report(event: Event) -> None:
        if isinstance(event, PhaseProgress):
            progress(event.done, event.total)

    return SinkHost(host.paths, (report,), progress.is_cancelled, host.device)


def add_dataset_routes(routes: web.RouteTableDef, make_host: Callable[[], Host], work: LongWork) -> None:
    """Add POST /chroma_trainer/datasets/report and /copy, and GET /chroma_trainer/datasets/TOKEN/NUMBER, /sheet, /captions.

    Args:
        routes: table to add the routes to.
        make_host: returns the host whose folders are searched.
        work: runs what takes long.
    """
    examined: dict[str, Examined] = {}

    def find(token: Any) -> Examined:
        if not isinstance(token, str) or token not in examined:
            raise UserError.at("report", "is not there any more; examine the dataset again")
        return examined[token]

    def look(asked: dict[str, Any], host: Host, progress: Progress) -> dict[str, Any]:
        result = _examine(asked, _host_of_page(host, progress))
        token = secrets.token_urlsafe(16)
        examined[token] = result
        for old in list(examined)[:-MAX_REPORTS]:
            del examined[old]
        return {"report": token, **_as_page_shows(result)}

    @routes.post("/chroma_trainer/datasets/report")
    async def report_dataset(call: web.Request) -> web.StreamResponse:
        refuse_foreign(call)
        asked, host = await read_object(call), make_host()
        return await work.answer(call, lambda progress: look(asked, host, progress))

    @routes.post("/chroma_trainer/datasets/copy")
    async def copy_dataset(call: web.Request) -> web.StreamResponse:
        refuse_foreign(call)
        asked, host = await read_object(call), make_host()
        return await work.answer(
            call,
            lambda progress: _copy(find(asked.get("report")), asked.get("leave_out"), _host_of_page(host, progress)),
        )

    @routes.get("/chroma_trainer/datasets/{report}/{what}")
    async def show(call: web.Request) -> web.Response:
        refuse_foreign(call)  # as a page of another site could show the images
        what = call.match_info["what"]
        try:
            found = find(call.match_info["report"])
            if what == "captions":
                return _download(await asyncio.to_thread(_captions, found), "captions.jsonl", "application/jsonl")
            if what == "sheet":
                return image_response(await asyncio.to_thread(_sheet, found, make_host()), "image/png")
            edge = EDGES[1] if call.query.get("size") == "full" else EDGES[0]
            return image_response(await asyncio.to_thread(_picture, found, what, edge), "image/webp")
        except UserError as error:
            return conflict(error)


def _examine(asked: dict[str, Any], host: SinkHost) -> Examined:
    """Examine the folder that the widgets of a node name, and return the report.

    Raises:
        UserError: a value is wrong, or the dataset can't be examined.
    """
    from ....trainer_core.dataset_doctor.examine_dataset import examine_dataset
    from ....trainer_core.dataset_doctor.token_limits import token_limit

    spec, values = CATALOGUE[NODE], asked.get("inputs")
    names = {field.name for field in spec.fields() if field.is_widget}
    if not isinstance(values, dict):
        raise UserError.at("inputs", "are not the values of a node")
    given = {name: value for name, value in values.items() if name in names}
    inputs, problems = build_inputs(spec, given)
    if inputs is None:
        raise UserError(problems)
    (dataset,) = spec.run(inputs, host)
    run = asked.get("run")
    folder = find_run_by_name(run, host.paths.output) if isinstance(run, str) and run else None
    report, images = examine_dataset(dataset, host, *token_limit(None, host.paths), folder)
    return Examined(report, images, str(given.get("folder", "")))


def _as_page_shows(found: Examined) -> dict[str, Any]:
    from ....trainer_core.data.source.backend import printable_name
    from ....trainer_core.dataset_doctor.clean_copy import to_leave_out

    names = {image.number: printable_name(image.name) for image in found.images.images}
    values = found.report.as_json()
    for finding in values["findings"]:
        finding["images"] = [
            {**{name: value for name, value in image.items() if name != "image"}, "name": names[image["number"]]}
            for image in finding["images"][:MAX_SHOWN]
        ]
    return values | {"leave_out": sorted(to_leave_out(found.report))}


def _copy(found: Examined, numbers: Any, host: SinkHost) -> dict[str, Any]:
    """Write a copy without these images beside the other datasets. Return its name for the node."""
    from ....trainer_core.dataset_doctor.clean_copy import free_folder, write_copy

    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise UserError.at("leave_out", "is not a list of numbers of images")
    parent = host.paths.new_datasets
    if parent is None:
        raise UserError.at("copy", "has no place: no folder of datasets can be written here")
    target = free_folder(parent, found.folder)
    count = write_copy(found.images, set(numbers), target, host)
    return {"folder": target.name, "path": str(target), "images": count}


def _captions(found: Examined) -> bytes:
    from ....trainer_core.dataset_doctor.clean_copy import captions_table

    return captions_table(found.report, found.images).encode("utf-8", "backslashreplace")


def _sheet(found: Examined, host: Host) -> bytes:
    from ....trainer_core.dataset_doctor.findings_sheet import draw_findings

    return _encoded(draw_findings(found.report, found.images, host), "PNG")


def _picture(found: Examined, text: str, edge: int) -> bytes:
    """Return an image of the dataset, not larger than this, as WebP.

    Raises:
        UserError: there is none with this number, or it can't be read.
    """
    from ....trainer_core.data.source.decode import BrokenImage, decode

    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    images = found.images.images
    if not 1 <= number <= len(images):
        raise UserError.at("image", "is not in this report")
    try:
        image = decode(found.images.read(images[number - 1]), at_least=edge)
    except (OSError, BrokenImage) as error:
        raise UserError.at("image", f"can't be read: {error}") from error
    image.thumbnail((edge, edge))
    return _encoded(image, "WEBP", quality=85)


def _encoded(image: Any, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _download(body: bytes, name: str, kind: str) -> web.Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return web.Response(body=body, content_type=kind, headers=headers)
