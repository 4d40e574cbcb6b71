"""Datasets on the Hub, against a hub of our own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest

from .conftest import Service, png

COMMIT = "2" * 40
SCRIPT = """
import json, sys
from pathlib import Path
from chroma_trainer.nodes import dataset_backend
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.places.stores import retry
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
retry.WAITS = (0.0, 0.0)
base = Path(sys.argv[1])
host = SinkHost(paths=Paths(output=base / "out", cache=base / "cache", urls=("hf://someone/",)), device="cpu")
for folder, fields in json.loads(sys.argv[2]):
    try:
        (dataset,) = dataset_backend.run(dataset_backend.Inputs(folder=folder, resolution=64, **fields), host)
        index = build_index(dataset, host, 0)
        print(json.dumps({sample.name: [*sample.captions, index.read(sample).hex()] for sample in index.samples}))
    except UserError as error:
        print(json.dumps(str(error)))
"""


class Hub(Service):
    """As much of the Hub's API as is asked for."""

    def answer(self, target, headers):
        path = unquote(urlsplit(target).path)
        api = "/api/datasets/someone/cats"
        if path.startswith(("/api/datasets/someone/private", "/someone/private")):
            return 401, b'{"error": "private"}', {"X-Error-Code": "RepoNotFound"}
        if path.startswith(f"{api}/tree/{COMMIT}"):
            folder = path.removeprefix(f"{api}/tree/{COMMIT}").lstrip("/")
            files = [
                {"type": "file", "path": name, "size": len(raw), "oid": str(hash(raw))}
                for name, raw in sorted(self.files.items())
                if name.startswith(folder)
            ]
            start = int(dict(part.split("=") for part in urlsplit(target).query.split("&")).get("cursor", 0))
            more = (
                {"Link": f'<{self.url}{path}?recursive=true&cursor={start + 4}>; rel="next"'}
                if start + 4 < len(files)
                else {}
            )
            return 200, json.dumps(files[start : start + 4]).encode(), {"Content-Type": "application/json", **more}
        if path in (f"{api}/revision/main", api, f"{api}/revision/v2"):
            return 200, json.dumps({"id": "someone/cats", "sha": COMMIT}).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(f"/datasets/someone/cats/resolve/{COMMIT}/")
        return self.send(self.files[name], headers) if name in self.files else (404, b"", {})


@pytest.fixture
def hub():
    service = Hub()
    for number in range(5):
        service.files[f"train/{number}.png"] = png(number)
    rows = "".join(f'{{"file_name": "{number}.png", "text": "row {number}"}}\n' for number in range(5))
    service.files["train/metadata.jsonl"] = rows.encode()
    service.files["README.md"] = b"cats"
    service.start()
    yield service
    service.stop()


def read(hub, tmp_path, *datasets):
    """Read datasets in a process of its own, because huggingface_hub reads the environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "", "HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(datasets)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_datasets_of_the_hub(hub, tmp_path):
    hub.fault = lambda number, path: 503 if number == 3 else "cut" if number == 6 else None
    table, whole, private, other = read(
        hub,
        tmp_path,
        ("hf://datasets/someone/cats/train", {"captions": "table"}),
        ("hf://someone/cats@v2", {"captions": "filename"}),
        ("hf://someone/private", {}),
        ("hf://other/cats", {}),
    )
    assert table == {f"{number}.png": [f"row {number}", png(number).hex()] for number in range(5)}
    assert len(whole) == 5 and "train/0.png" in whole and any("/revision/v2" in path for path, _ in hub.log)
    assert "HTTP 401" in private and "hf auth login" in private
    assert "--allow-url hf://other/cats" in other and not any("other" in path for path, _ in hub.log)
