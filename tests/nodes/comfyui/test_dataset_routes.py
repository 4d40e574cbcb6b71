"""What the page may do with datasets: have a folder examined, see its images by number, and get a copy without some."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from chroma_trainer.nodes.comfyui.routes.dataset_routes import MAX_REPORTS, add_dataset_routes
from chroma_trainer.nodes.comfyui.routes.long_work import LongWork
from chroma_trainer.trainer_core.host import Paths, SinkHost
from PIL import Image

FOREIGN = {"Origin": "https://elsewhere.example"}
INPUTS = {"inputs": {"folder": "cats", "resolution": 128, "a button": None}}


@pytest.fixture
def base(tmp_path) -> Path:
    """A folder of datasets with one in it, and a secret beside it."""
    folder = tmp_path / "datasets" / "cats"
    folder.mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        image = Image.effect_noise((300, 200), 120).convert("RGB")
        image = (
            Image.blend(image, Image.new("RGB", image.size, color), 0.2)
            if name != "b"
            else Image.open(folder / "a.png")
        )
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}", "utf-8")
    (folder / "d.png").write_bytes(b"no image")
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret" / "s.png")
    return tmp_path


def ask(base: Path, *requests: tuple[str, str, Any], headers: dict | None = None) -> list[tuple[int, Any, Any]]:
    """Status, body and headers of requests (method, path, JSON body) to one server; each may be a function of the token."""
    datasets = base / "datasets"
    host = SinkHost(Paths(base / "output", base / "cache", datasets=(datasets,), new_datasets=datasets))

    async def call() -> list[tuple[int, Any, Any]]:
        routes, app, answers = web.RouteTableDef(), web.Application(), []
        add_dataset_routes(routes, lambda: host, LongWork())
        app.add_routes(routes)
        token = ""
        async with TestClient(TestServer(app)) as client:
            for method, path, body in requests:
                data = json.dumps(body(token) if callable(body) else body) if method == "POST" else None
                url = f"/chroma_trainer/datasets/{path.replace('TOKEN', token)}"
                answer = await client.request(method, url, data=data, headers=headers or {})
                content = await answer.read()
                if method == "POST" and answer.status == 200:
                    content = json.loads(content.splitlines()[-1])
                    token = content.get("result", {}).get("report", token)
                answers.append((answer.status, content, answer.headers))
        return answers

    return asyncio.run(call())


def test_a_report_and_its_images(base):
    report, thumb, full, sheet, captions = ask(
        base, ("POST", "report", INPUTS), ("GET", "TOKEN/1", None), ("GET", "TOKEN/2?size=full", None),
        ("GET", "TOKEN/sheet", None), ("GET", "TOKEN/captions", None),
    )  # fmt: skip
    result = report[1]["result"]
    kinds = {finding["kind"]: finding for finding in result["findings"]}
    assert (result["images"], result["usable"]) == (4, 3) and kinds.keys() >= {"copies", "unreadable"}
    assert [(image["name"], image["group"]) for image in kinds["copies"]["images"]] == [("a.png", 1), ("b.png", 1)]
    assert result["leave_out"] == [2, 4] and str(base) not in json.dumps(result["findings"])
    with Image.open(io.BytesIO(thumb[1])) as image:
        assert image.format == "WEBP" and max(image.size) == 192
    with Image.open(io.BytesIO(full[1])) as image:
        assert image.size == (300, 200)
    assert sheet[2]["Content-Type"] == "image/png" and thumb[2]["X-Content-Type-Options"] == "nosniff"
    rows = [json.loads(line) for line in captions[1].decode().splitlines()]
    assert [row["text"] for row in rows] == ["caption a", "caption b", "caption c"]
    assert "attachment" in captions[2]["Content-Disposition"]


def test_a_copy_without_some(base):
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    copy = ("POST", "copy", lambda token: {"report": token, "leave_out": [2]})
    _, first, second = ask(base, ("POST", "report", INPUTS), copy, copy)
    assert first[1]["result"]["folder"] == "cats-clean" and second[1]["result"]["folder"] == "cats-clean-2"
    assert first[1]["result"]["images"] == 2
    names = sorted(path.name for path in (base / "datasets" / "cats-clean").iterdir())
    assert names == ["a.png", "a.txt", "c.png", "c.txt"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_can_not_be_is_refused(base):
    outside = [
        {"inputs": {"folder": folder}} for folder in ("../secret", str(base / "secret"), "nowhere", "s3://bucket/x", "")
    ]
    asked = [
        *outside,
        {"inputs": {"folder": "cats", "resolution": "x"}},
        {"inputs": []},
        {**INPUTS, "run": "../../secret"},
    ]
    for status, body, _ in ask(base, *(("POST", "report", body) for body in asked)):
        assert status == 200 and body["error"] and "result" not in body
    copies = [{"report": "x"}, {"report": ["x"]}, {}]
    for status, body, _ in ask(base, *(("POST", "copy", body) for body in copies)):
        assert status == 200 and "examine the dataset again" in body["error"]
    wrong = (None, "all", [True], ["2"], [[2]])
    copies = [("POST", "copy", lambda token, value=value: {"report": token, "leave_out": value}) for value in wrong]
    _, *answers = ask(base, ("POST", "report", INPUTS), *copies)
    assert all("not a list of numbers" in body["error"] for _, body, _ in answers)
    assert sorted(path.name for path in (base / "datasets").iterdir()) == ["cats"]


def test_images_are_of_a_report_only(base):
    numbers = ("0", "5", "-1", "x", "9" * 30, "..%2Fsecret", "4")
    _, *answers = ask(base, ("POST", "report", INPUTS), *(("GET", f"TOKEN/{number}", None) for number in numbers))
    assert {status for status, _, _ in answers} == {409}
    ((status, _, _),) = ask(base, ("GET", "guess/1", None))
    assert status == 409
    many = [("POST", "report", INPUTS)] * (MAX_REPORTS + 1)
    first = ask(base, *many)[0][1]["result"]["report"]
    assert len(first) >= 16


def test_a_foreign_page_sees_nothing(base):
    asked = (("POST", "report", INPUTS), ("POST", "copy", {}), ("GET", "x/1", None), ("GET", "x/captions", None))
    assert [status for status, _, _ in ask(base, *asked, headers=FOREIGN)] == [403] * 4
