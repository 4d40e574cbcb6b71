"""What the page may do with LoRA files: look at those in the folders and at those that it sends, and write beside them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from chroma_trainer.nodes.comfyui.routes import long_work, uploads
from chroma_trainer.nodes.comfyui.routes.long_work import LongWork
from chroma_trainer.nodes.comfyui.routes.lora_routes import add_lora_routes
from chroma_trainer.nodes.comfyui.routes.uploads import Uploads, usable_name
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from safetensors.torch import save, save_file

FOREIGN = {"Origin": "https://elsewhere.example"}
RANK, WIDTH = 4, 64


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"transformer.transformer_blocks.{block}.attn.to_out.0" for block in (0, 1)]
    return {
        key: torch.randn(shape, generator=generator)
        for name in names
        for key, shape in ((f"{name}.lora_A.weight", (RANK, WIDTH)), (f"{name}.lora_B.weight", (WIDTH, RANK)))
    }


def broken() -> dict[str, torch.Tensor]:
    values = tensors()
    next(iter(values.values()))[0, 0] = torch.nan
    return values


@pytest.fixture
def base(tmp_path) -> Path:
    """Folders of an installation, with a sound and a broken LoRA, and a file beside the folder of LoRAs."""
    (tmp_path / "loras" / "old").mkdir(parents=True)
    save_file(tensors(), tmp_path / "loras" / "old" / "sound.safetensors")
    save_file(broken(), tmp_path / "loras" / "broken.safetensors")
    save_file(tensors(), tmp_path / "secret.safetensors")
    (tmp_path / "loras" / "words.txt").write_text("secret", "utf-8")
    return tmp_path


class Page:
    """Requests to one server."""

    def __init__(self, base: Path, files: Uploads | None = None):
        self.output = base / "output"
        self.host = SinkHost(Paths(self.output, base / "cache", {"loras": (base / "loras", self.output / "loras")}))
        self.files = files or Uploads(lambda: base / "cache")

    def __call__(self, *requests: tuple[str, Any], headers: dict | None = None) -> list[tuple[int, Any]]:
        """Post each (path, body) to one server; a body may be a function of the answers so far."""
        return asyncio.run(self._post(requests, headers))

    async def _post(self, requests, headers) -> list[tuple[int, Any]]:
        routes, app, answers = web.RouteTableDef(), web.Application(client_max_size=1000), []
        add_lora_routes(routes, lambda: self.host, LongWork(), self.files)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            for path, body in requests:
                body = body(answers) if callable(body) else body
                data = body if isinstance(body, bytes) else json.dumps(body)
                answer = await client.post(f"/chroma_trainer/loras/{path}", data=data, headers=headers or {})
                lines = (await answer.text()).splitlines()
                is_json = lines and lines[-1].startswith("{")
                answers.append((answer.status, json.loads(lines[-1]) if is_json else "\n".join(lines)))
        return answers


def uploaded(answers: list) -> dict[str, str]:
    return {"upload": answers[0][1]["upload"]}


def test_the_report_of_a_file_in_the_folders(base):
    ((status, answer),) = Page(base)(("report", {"lora": "old/sound.safetensors"}))
    report = answer["result"]
    assert status == 200 and report["file"] == "sound.safetensors" and not report["can_repair"]
    assert report["ranks"] == {"4": 2} and report["block_norms"].keys() == {"double 0", "double 1"}
    assert [point["rank"] for point in report["spectrum"]] == [1, 2, 3, 4]
    shares = [point["median"] for point in report["spectrum"]]
    assert shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] < 1
    assert report["family"]["file"] == "old/sound.safetensors"


def test_names_that_are_no_lora(base):
    names = ("../secret.safetensors", "/etc/passwd", "words.txt", "old", "", "a" * 500, "x\0.safetensors", 5, None)
    for status, answer in Page(base)(*(("report", {"lora": name}) for name in names)):
        assert status == 200 and answer["error"] and "result" not in answer
    for status, _ in Page(base)(("report", b"[]"), ("report", b"{"), ("repair", b""), ("save", b"[" * 900)):
        assert status == 400


def test_a_foreign_page_is_refused(base):
    paths = ("upload?name=a", "report", "repair", "save", "forget")
    answers = Page(base)(*((path, {"lora": "broken.safetensors"}) for path in paths), headers=FOREIGN)
    assert [status for status, _ in answers] == [403] * len(paths)
    assert not (base / "cache").exists()


def test_the_repaired_file_lies_beside_it_and_replaces_none(base):
    before = {path: path.read_bytes() for path in base.rglob("*.safetensors")}
    asked = ("repair", {"lora": "broken.safetensors"})
    names = [answer["result"]["lora"] for _, answer in Page(base)(asked, asked)]
    assert names == ["broken-fixed.safetensors", "broken-fixed-2.safetensors"]
    assert all(path.read_bytes() == content for path, content in before.items())
    ((_, answer),) = Page(base)(("report", {"lora": names[0]}))
    assert answer["result"]["findings"] == [] and answer["result"]["num_layers"] == 1
    family = answer["result"]["family"]
    assert (family["operation"], family["parents"][0]["file"]) == ("doctor", "broken.safetensors")


def test_a_sent_file_is_looked_at_and_not_stored(base):
    """Far above the limit that aiohttp has for other requests."""
    page, path = Page(base), "upload?name=C:%5CUsers%5Cme%5Cmine.safetensors"
    answers = page(
        (path, save(broken())), ("report", uploaded), ("repair", uploaded), ("forget", uploaded), ("report", uploaded)
    )
    assert [status for status, _ in answers] == [200] * 5
    assert answers[0][1]["name"] == answers[1][1]["result"]["file"] == "mine.safetensors"
    assert answers[2][1]["result"]["lora"] == "mine-fixed.safetensors"
    assert "drop the file again" in answers[4][1]["error"]
    assert [path.name for path in page.output.rglob("*.safetensors")] == ["mine-fixed.safetensors"]
    assert not list((base / "cache").rglob("*.safetensors"))


def test_a_sent_file_is_stored_if_the_user_asks(base):
    page = Page(base)
    answers = page(("upload?name=mine.safetensors", save(tensors())), ("save", uploaded), ("save", uploaded))
    assert [answer["lora"] for _, answer in answers[1:]] == ["mine.safetensors", "mine-2.safetensors"]
    assert (page.output / "loras" / "mine.safetensors").read_bytes() == save(tensors())
    page.files.clear()
    assert not list((base / "cache").rglob("*.safetensors"))
    ((status, answer),) = page(("save", {"upload": "../../secret"}))
    assert status == 409 and "drop the file again" in answer["error"]


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + b"x" * 100, b"\x80\x02}q\x00." * 20, save({})[:9], (1 << 40).to_bytes(8, "little") + b"{}"],
)
def test_what_is_no_safetensors_file_is_refused_and_removed(base, content):
    ((status, answer),) = Page(base)(("upload?name=a.safetensors", content))
    assert status == 409 and "not a safetensors file" in answer["error"]
    assert not [path for path in (base / "cache").rglob("*") if path.is_file()]


def test_limits_of_sent_files(base, monkeypatch):
    small = Uploads(lambda: base / "cache", max_bytes=1000)
    ((status, answer),) = Page(base, small)(("upload", save(tensors())))
    assert status == 409 and "larger than" in answer["error"]

    async def receive(chunks: list[bytes], files: Uploads) -> None:
        async def send():
            for chunk in chunks:
                yield chunk

        await files.receive("a", None, send())  # its size is not announced

    whole = save(tensors())
    with pytest.raises(UserError, match="larger than"):
        asyncio.run(receive([whole[:500], whole[500:]], small))
    monkeypatch.setattr(uploads, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match="free disk space"):
        asyncio.run(receive([whole], Uploads(lambda: base / "cache")))
    assert not [path for path in (base / "cache").rglob("*") if path.is_file()]


def test_old_files_go(base):
    now = [0.0]
    page = Page(base, Uploads(lambda: base / "cache", clock=lambda: now[0]))
    page(*[("upload", save(tensors()))] * 4)
    assert len(list((base / "cache").rglob("*.safetensors"))) == uploads.MAX_FILES
    now[0] = uploads.MAX_AGE + 1
    page(("report", {"upload": "x"}))
    assert not list((base / "cache").rglob("*.safetensors"))


def test_names_of_sent_files():
    assert usable_name("a/b\\c.SafeTensors") == "c.safetensors"
    for name in ("", ".safetensors", "../..", "con", 'a"b', "x" * 300, "a\0b", " .safetensors"):
        assert usable_name(name) == "upload.safetensors", name


def test_a_page_that_leaves_ends_the_work(monkeypatch):
    """The next one does not wait for it."""
    monkeypatch.setattr(long_work, "SECONDS", 0.01)
    reached = []

    def endless(progress):
        while True:
            reached.append(len(reached))
            progress(len(reached), 1 << 30)

    async def play() -> bytes:
        work, routes, app = LongWork(), web.RouteTableDef(), web.Application()

        @routes.get("/endless")
        async def answer_endless(call: web.Request) -> web.StreamResponse:
            return await work.answer(call, endless)

        @routes.get("/short")
        async def answer_short(call: web.Request) -> web.StreamResponse:
            return await work.answer(call, lambda progress: 5)

        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            answer = await client.get("/endless")
            await answer.content.readline()
            answer.close()
            return await (await client.get("/short")).read()

    assert asyncio.run(play()) == b'{"result": 5}\n' and reached
