"""HF_ENDPOINT is honoured: the model comes from a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "1" * 40
SCRIPT = """
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
model, family = ModelConfig("chroma", "hd", "someone/Chroma", dtype="fp32"), ChromaFamily()
assert family.problems(model) == [], family.problems(model)
print(*[family.identity(model, part) for part in ("transformer", "text_encoder")])
"""


TRANSFORMER_ALONE = """
from pathlib import Path
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
model, family = ModelConfig("chroma", "hd", "", transformer_file="someone/Chroma", dtype="fp32"), ChromaFamily()
print(family.empty_transformer(model).inner_dim, family.identity(model, "transformer"))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as snapshot_download asks for."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        if path.startswith("/api/models/someone/Chroma/tree/"):
            listed = [{"type": "file", "path": self.name(f), "size": f.stat().st_size, "oid": "0"} for f in files]
            return self.send(json.dumps(listed).encode(), {}, with_body)
        if path.startswith("/api/models/someone/Chroma"):
            info = {"id": "someone/Chroma", "sha": COMMIT, "siblings": [{"rfilename": self.name(f)} for f in files]}
            return self.send(json.dumps(info).encode(), {}, with_body)
        file = self.folder / re.sub("^/someone/Chroma/resolve/[^/]+/", "", path)
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        data = file.read_bytes()
        return self.send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, with_body)

    def name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def send(self, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny_chroma):
    handler = type("TinyHub", (Hub,), {"folder": tiny_chroma, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked, handler
    server.shutdown()
    server.server_close()
    thread.join()


def run(home: Path, script: str = SCRIPT, **variables: str) -> tuple[list[str], str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split(), result.stderr


@pytest.mark.slow
def test_endpoint(hub, tiny_model, tmp_path):
    """The variable is read when huggingface_hub is imported, so this runs in a process of its own."""
    from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily

    address, asked, _ = hub
    identities, messages = run(tmp_path, HF_ENDPOINT=address)
    assert identities == [ChromaFamily().identity(tiny_model, part) for part in ("transformer", "text_encoder")]
    assert "Fetching 2 files: 100%" in messages  # huggingface_hub's own progress bars
    assert any(path.endswith("/text_encoder/model.safetensors") for path in asked)
    assert not any("resolve" in path and "/vae/" in path for path in asked)  # only the parts that are needed


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_repository_that_may_hold_a_transformer_alone(hub, tiny_model, tmp_path, folder):
    """Of a repository only the transformer is downloaded, at its root or in a folder, and an estimate needs no weights."""
    from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily

    address, handler = hub[0], hub[2]
    handler.folder = handler.folder if folder else handler.folder / "transformer"
    (width, identity), _ = run(tmp_path, TRANSFORMER_ALONE, HF_ENDPOINT=address)
    assert (width, identity) == ("64", ChromaFamily().identity(tiny_model, "transformer"))
    fetched = {path.rpartition("/")[2] for path in hub[1] if "resolve" in path}
    assert fetched == {"config.json", "diffusion_pytorch_model.safetensors"}
