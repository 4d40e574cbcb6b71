"""Publishing a LoRA: the card as huggingface_hub reads it, and an upload to a hub of our own on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.publishing.model_card import MARK, Facts, Sample, base_of, card_of, license_of
from chroma_trainer.trainer_core.publishing.publish import run_of, samples_of
from chroma_trainer.trainer_core.runs.saved_loras import find_lora
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

COMMIT = "2" * 40
TOKEN = "hf_" + "x" * 30
RECORD = {
    "request": {
        "model": {"family": "chroma", "flavour": "hd", "repo": "lodestones/Chroma1-HD", "dtype": "bf16", "quantization": {"level": "int8-quanto"}},
        "training": {"name": "cat", "steps": 500, "rank": 16, "alpha": 16.0, "targets": "all", "learning_rate": 1e-4, "seed": 7},
        "validation": {"prompts": '{"a | cat": "sks cat, in a \\"hat\\"", "dog": "a dog: <b>big</b>"}'},
        "optimizer": {"optimizer": "adamw"}, "adapter": {"kind": "lora"},
    },
    "versions": {"chroma-trainer": "0.1.0"}, "dataset": {"digest": "d", "images": 12}, "trigger": "sks", "step": 500,
}  # fmt: skip


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with a LoRA and its run: named images of two steps."""
    output = tmp_path / "output"
    (output / "loras").mkdir(parents=True)
    workflow = {"5": {"class_type": "LoRATrainer", "inputs": {"name": "cat"}}}
    metadata = {"chroma_trainer": json.dumps(RECORD), "prompt": json.dumps(workflow), "ss_output_name": "cat"}
    save_file({"x.lora_A.weight": torch.zeros(4, 4)}, output / "loras" / "cat.safetensors", metadata)
    folder = output / "chroma_trainer" / "cat-12345678"
    (folder / "validation" / "by-name").mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "finished"}')
    (folder / "report.json").write_text(json.dumps({"sha256": sha256_of(output / "loras" / "cat.safetensors")}))
    for step in (250, 500):
        for name in ("a _ cat", "dog"):
            image = Image.new("RGB", (64, 64), (step // 2, 0, 0))
            image.save(folder / "validation" / "by-name" / f"{name}-step-{step:06}-64x64.png")
        Image.new("RGB", (128, 64)).save(folder / "validation" / f"step-{step:06}-64x64.png")
    return output


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a commit asks for."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, bytes]  # large objects by their SHA-256
    files: dict[str, bytes]  # of the repository
    log: list[tuple[str, str]]
    failures: list[tuple[str, int]]  # part of a path, status of the next request there
    about: dict  # of the repository; {} before it exists

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.fails(path):
            return
        if path.startswith("/api/models/"):
            if not self.about:
                return self.send(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return self.send(200, {"id": "me/cat", "sha": COMMIT, "siblings": [], **self.about})
        name = path.rpartition("/main/")[2]
        if name in self.files:
            data = self.files[name]
            digest = hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": digest}
            return self.send(200, data, headers)
        return self.send(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.fails(path):
            return
        if path == "/api/repos/create":
            if self.about:
                return self.send(409, {"url": f"{self.root}/me/cat"})
            asked = json.loads(body)  # older versions of huggingface_hub send `private`
            self.about.update(private=asked.get("private", False) or asked.get("visibility") == "private")
            return self.send(200, {"url": f"{self.root}/me/cat", "id": "me/cat", "name": "me/cat"})
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            return self.send(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self.lfs(item) for item in json.loads(body)["objects"]]
            return self.send(
                200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
            )
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "lfsFile":
                    self.files[item["value"]["path"]] = self.stored[item["value"]["oid"]]
            return self.send(
                200, {"commitUrl": f"{self.root}/me/cat/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        return self.send(200, {"warnings": [], "errors": []})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.fails(self.path):
            return
        self.stored[hashlib.sha256(data).hexdigest()] = data
        self.send(200, {})

    def lfs(self, item: dict) -> dict:
        if item["oid"] in self.stored:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.root}/store/{item['oid']}"}}}

    @property
    def root(self) -> str:
        assert isinstance(self.server, ThreadingHTTPServer)
        return f"http://127.0.0.1:{self.server.server_port}"

    def fails(self, path: str) -> bool:
        self.log.append((self.command, path))
        for number, (part, status) in enumerate(self.failures):
            if part in path:
                del self.failures[number]
                if status:
                    self.send(status, {"error": "as asked for"})
                else:  # the connection breaks
                    self.close_connection = True
                    self.connection.close()
                return True
        return False

    def send(self, status: int, value: object, headers: dict | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            **(headers or {}),
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (OSError, ValueError):
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    handler = type("OwnHub", (Hub,), {"stored": {}, "files": {}, "log": [], "failures": [], "about": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()


def variables_of(hub, output: Path, token: str) -> dict[str, str]:
    return {
        "HF_HOME": str(output.parent / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": hub.address, **({"HF_TOKEN": token} if token else {}),
    }  # fmt: skip


def is_of_the_hub(variable: str) -> bool:
    return variable.startswith("HF_") or "proxy" in variable.lower()


def arguments_of(output: Path, *arguments: str) -> list[str]:
    return ["publish", "cat", "--repo", "me/cat", "--output", str(output), *arguments]


def publish_in_a_process(hub, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    """As a user does: huggingface_hub reads the environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not is_of_the_hub(name)}
    return subprocess.run(
        [sys.executable, "-m", "chroma_trainer", *arguments_of(output, *arguments)], cwd=output,
        env={**environment, **variables_of(hub, output, TOKEN)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def publish(monkeypatch, capsys):
    """publish(hub, output, "--private") in this process, with the constants that huggingface_hub has read already."""
    for name in filter(is_of_the_hub, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits 23 s before it gives up
    close: Any = getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions
    close()

    def call(hub, output: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in variables_of(hub, output, token).items():
            monkeypatch.setenv(name, value)
        home = output.parent / "hf"
        values = {
            "ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_TELEMETRY": True,
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.chdir(output)
        capsys.readouterr()
        status = main(arguments_of(output, *arguments))
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    yield call
    close()


def test_the_card_is_read_back(output, hub):
    result = publish_in_a_process(hub, output, "--private")
    assert result.returncode == 0, result.stderr
    assert f"{hub.address}/me/cat" in result.stdout and hub.about["private"] is True
    assert set(hub.files) == {
        "README.md", "cat.safetensors", "workflow.json", "images/a-cat-step-000500-64x64.png", "images/dog-step-000500-64x64.png",
    }  # fmt: skip
    assert hub.files["cat.safetensors"] == (output / "loras" / "cat.safetensors").read_bytes()
    assert json.loads(hub.files["workflow.json"])["5"]["class_type"] == "LoRATrainer"
    text = hub.files["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "lodestones/Chroma1-HD" and data["license"] == "apache-2.0"
    assert data["instance_prompt"] == "sks" and {"lora", "chroma", "comfyui"} <= set(data["tags"])
    assert data["widget"] == [
        {"text": 'sks cat, in a "hat"', "output": {"url": "images/a-cat-step-000500-64x64.png"}},
        {"text": "a dog: <b>big</b>", "output": {"url": "images/dog-step-000500-64x64.png"}},
    ]
    assert "| Rank | 16 |" in text and "| Base model stored as | int8-quanto |" in text and "12 images" in text
    everything = "".join(path.read_text("utf-8", "replace") for path in output.rglob("*") if path.is_file())
    assert TOKEN not in everything + text + result.stdout + result.stderr


def test_what_the_hub_has_is_not_sent_again(output, hub, publish):
    """The commit of the first try fails after the LoRA has arrived."""
    hub.failures += [("/commit/main", 403)]
    first = publish(hub, output)
    assert first.returncode == 2 and "no write access" in first.stderr and not hub.files
    assert publish(hub, output).returncode == 0
    assert [path for command, path in hub.log if command == "PUT"] == [f"/store/{next(iter(hub.stored))}"]


@pytest.mark.parametrize("failure", [("/store/", 503), ("/store/", 0)])
def test_an_upload_that_breaks_is_repeated(output, hub, failure, publish):
    hub.failures += [failure]
    result = publish(hub, output)
    assert result.returncode == 0, result.stderr
    assert hub.files["cat.safetensors"] == (output / "loras" / "cat.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("status", "text"), [(401, "does not accept the token"), (403, "no write access"), (500, "HTTP status 500")]
)
def test_a_refusal_is_one_line(output, hub, status, text, publish):
    hub.failures += [("/preupload/", status)] * 8
    result = publish(hub, output)
    assert result.returncode == 2 and text in result.stderr and "Traceback" not in result.stderr
    assert "the LoRA itself is safe" in result.stderr and TOKEN not in result.stderr


def test_a_public_repository_is_not_taken_for_a_private_one(output, hub, publish):
    hub.about["private"] = False
    result = publish(hub, output, "--private")
    assert result.returncode == 2 and "is public" in result.stderr and not hub.files
    assert publish(hub, output).returncode == 0


def test_an_edited_card_stays(output, hub, publish):
    assert publish(hub, output).returncode == 0
    assert publish(hub, output).returncode == 0  # ours is replaced
    hub.files["README.md"] = hub.files["README.md"].decode().replace(MARK, "My own words.").encode()
    result = publish(hub, output)
    assert result.returncode == 0 and "was edited" in result.stderr and b"My own words." in hub.files["README.md"]


def test_mistakes_are_found_before_anything_is_sent(output, hub, publish):
    for arguments, token, text in (
        (("--repo", "no-name"), TOKEN, "write user/name"), ((), "", "run hf auth login"),
        (("--base-model", "x y"), TOKEN, "base_model"),
    ):  # fmt: skip
        result = publish(hub, output, *arguments, token=token)
        assert result.returncode == 2 and text in result.stderr, result.stderr
    assert hub.log == []


def test_a_dry_run_sends_nothing(output, hub, tmp_path, publish):
    target = tmp_path / "dry"
    result = publish(hub, output, "--dry-run", str(target), token="")
    assert result.returncode == 0 and hub.log == [], result.stderr
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "cat.safetensors", "images", "workflow.json"]
    assert ModelCard.load(target / "README.md").data.to_dict()["base_model"] == "lodestones/Chroma1-HD"
    again = publish(hub, output, "--dry-run", str(target))
    assert again.returncode == 2 and "not an empty folder" in again.stderr


def test_images_are_those_of_the_loras_own_step(output):
    folder, step = run_of(output / "loras" / "cat.safetensors", output)
    assert folder and folder.name == "cat-12345678" and step is None
    facts = Facts("cat", "cat.safetensors", RECORD["request"])
    assert {sample.path.name.partition("-step-")[2] for sample in samples_of(folder, 250, facts)} == {
        "000250-64x64.png"
    }
    assert {sample.path.name.partition("-step-")[2] for sample in samples_of(folder, 300, facts)} == {
        "000500-64x64.png"
    }
    for path in (folder / "validation" / "by-name").iterdir():
        path.unlink()
    (grid,) = samples_of(folder, None, facts)
    assert grid.path.name == "step-000500-64x64.png" and grid.prompt == 'sks cat, in a "hat" | a dog: <b>big</b>'
    assert run_of(folder / "status.json", output) == (None, None)


def test_a_lora_is_found_by_its_name(output, tmp_path):
    from chroma_trainer.trainer_core.errors import UserError

    assert find_lora("cat", output) == find_lora("cat.safetensors", output)
    with pytest.raises(UserError, match="did you mean 'cat'"):
        find_lora("cta", output)


def test_licenses_and_bases():
    assert license_of({"family": "flux", "flavour": "schnell"})["license"] == "apache-2.0"
    assert license_of({"family": "flux", "flavour": "krea"})["license_name"].startswith("flux-1-dev")
    assert license_of({}) == {}
    assert base_of({"family": "flux", "flavour": "dev", "repo": "my-folder"}) == "black-forest-labs/FLUX.1-dev"
    assert base_of({"family": "chroma", "flavour": "nano", "repo": "chroma-nano"}) == ""


def test_hostile_texts_break_no_card():
    hostile = "a\n---\nlicense: mit\n| x | `y` <script>"
    request = {
        "model": {"family": "chroma", "flavour": 3},
        "training": {"targets": hostile, "rank": [1]},
        "optimizer": "x",
    }
    sample = Sample(Path("x y\n.png"), hostile)
    card = ModelCard(card_of(Facts(hostile, "a.safetensors", request, {}, hostile, samples=[sample])))
    data = card.data.to_dict()
    assert (
        data["license"] == "apache-2.0" and data["widget"][0]["text"] == hostile and data["instance_prompt"] == hostile
    )
    assert "<script>" not in card.text and "\nlicense: mit" not in card.text
