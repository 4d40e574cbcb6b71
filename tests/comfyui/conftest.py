"""A real ComfyUI server with this pack in it, and its real page. See README.md beside this file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chroma_trainer.nodes import CATALOGUE

PROJECT = Path(__file__).resolve().parents[2]
ARTIFACTS = Path(__file__).with_name("artifacts")  # screenshots and what else is worth a look; ignored by git
PROBE = Path(__file__).with_name("probe")
CURRENT, OLDEST = ("COMFYUI_PATH", "~/ComfyUI"), ("COMFYUI_OLDEST_PATH", "~/ComfyUI-0.8")
BOOT_SECONDS, RUN_SECONDS = 240, 600
PACK_PARTS = (
    "__init__.py",
    "pyproject.toml",
    "cli.py",
    "nodes",
    "trainer_core",
    "workflows",
    "js",
    "assets",
    "locales",
)


@dataclass
class Server:
    """A running ComfyUI; root is its own folder, base that of this server's models and results."""

    root: Path
    url: str
    base: Path
    process: subprocess.Popen[bytes]
    log_start: int = 0  # where the running test's part of the log begins, in characters

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def whole_log(self) -> str:
        return (self.base / "server.log").read_text("utf-8", errors="replace")

    @property
    def log(self) -> str:
        """What the server has written since the running test began: tests share a server, and not what it says."""
        return self.whole_log[self.log_start :]

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read().decode("utf-8")

    def get(self, path: str) -> Any:
        return json.loads(self.get_text(path))

    def post(self, path: str, value: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def queue(self, prompt: dict[str, Any]) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": "test"})["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The finished prompt's history: status and outputs."""
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            found = self.get(f"/history/{prompt_id}")
            if found:
                return found[prompt_id]
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log[-3000:]}"
            time.sleep(0.3)
        raise AssertionError(f"no end after {RUN_SECONDS} s:\n{self.log[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait for it; its history.

        Raises:
            AssertionError: it failed; with ComfyUI's own words.
        """
        history = self.wait(self.queue(prompt))
        faults = [fault["exception_message"] for fault in faults_of(history)]
        assert history["status"]["status_str"] == "success", f"{faults} {self.log[-1500:]}"
        return history

    def stop(self) -> None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], check=False)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def faults_of(history: dict[str, Any]) -> list[dict[str, Any]]:
    """The errors of a prompt's history, each with its node and message."""
    return [detail for name, detail in history["status"]["messages"] if name == "execution_error"]


def skip_loudly(reason: str) -> None:
    warnings.warn(f"NOT TESTED: {reason}; see tests/comfyui/README.md", stacklevel=2)
    pytest.skip(reason)


STARTED: list[Server] = []


@pytest.fixture(autouse=True)
def log_of_this_test() -> None:
    """From here on each server's log is this test's."""
    for server in STARTED:
        server.log_start = len(server.whole_log)


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty base folder of its own, whose custom_nodes hold a copy of this pack and the tests' probe."""
    yield from serve(*CURRENT, tmp_path_factory)


@pytest.fixture(scope="session")
def oldest_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with the oldest ComfyUI that is supported."""
    yield from serve(*OLDEST, tmp_path_factory)


@pytest.fixture(scope="session", params=["comfyui", "oldest_comfyui"])
def each_comfyui(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def root_of(variable: str, default: str) -> Path:
    root = Path(os.environ.get(variable, default)).expanduser()
    if not (root / "main.py").is_file():
        skip_loudly(f"no ComfyUI at {root} (set {variable})")
    return root


def serve(variable: str, default: str, folders: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(root_of(variable, default), folders.mktemp("comfyui"))
    try:
        yield server
    finally:
        server.stop()


def start(root: Path, base: Path, *arguments: str) -> Server:
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / name).mkdir()
    pack = base / "custom_nodes" / "chroma-trainer"  # a hyphen, as many people will have
    pack.mkdir()
    for name in PACK_PARTS:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, pack / name)
    shutil.copytree(PROBE, base / "custom_nodes" / "probe", ignore=shutil.ignore_patterns("__pycache__"))
    few_pictures(base / "input")
    return boot(root, base, *arguments)


def boot(root: Path, base: Path, *arguments: str) -> Server:
    """Start a server on a base folder that start() has made, for the first time or again."""
    python = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (base / "server.log").open("ab")
    process = subprocess.Popen(
        [
            str(python) if python.is_file() else sys.executable,
            "main.py",
            "--cpu",
            "--port",
            str(port),
            "--base-directory",
            str(base),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-auto-launch",
            *arguments,
        ],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=os.name != "nt",
    )
    server = Server(root, f"http://127.0.0.1:{port}", base, process)
    STARTED.append(server)
    until = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, f"ComfyUI did not start:\n{server.log[-3000:]}"
        try:
            server.get("/system_stats")
            return server
        except OSError:
            time.sleep(0.3)
    server.stop()
    raise AssertionError(f"ComfyUI is not ready after {BOOT_SECONDS} s:\n{server.log[-3000:]}")


def few_pictures(root: Path) -> None:
    """A dataset `few` under root, which is cached in seconds: four pictures of the demo's."""
    (root / "few").mkdir()
    for path in sorted((PROJECT / "assets" / "neon-emoji").glob("*.png"))[:4]:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, root / "few")


@dataclass
class Page:
    """The server's page in a real browser, driven by page.mjs and live.mjs."""

    server: Server
    modules: Path
    browser: str
    window: str = ""  # its size, such as "1600x1000"

    def __call__(self, command: str, workflow: Path, output: Path) -> Any:
        """Run one command of page.mjs on a workflow; returns what it wrote, where that is JSON."""
        return self.node("page.mjs", command, workflow, output)

    def live(self, scenario: str, workflow: Any, name: str = "") -> dict[str, Any]:
        """Play a scenario of live.mjs with a workflow; what it saw. Screenshots stay in artifacts/."""
        folder = ARTIFACTS / (name or scenario)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "workflow.json").write_text(json.dumps(workflow), "utf-8")
        return self.node("live.mjs", scenario, folder / "workflow.json", folder / "seen.json")

    def node(self, name: str, command: str, workflow: Path, output: Path) -> Any:
        script = Path(__file__).with_name(name)
        done = subprocess.run(
            ["node", str(script), command, self.server.url, str(workflow), str(output)],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            env={**os.environ, "PLAYWRIGHT_CORE": str(self.modules), "CHROMIUM": self.browser, "WINDOW": self.window},
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return json.loads(output.read_text("utf-8")) if output.suffix == ".json" else None


def open_page(server: Server) -> Page:
    modules = Path(os.environ.get("PLAYWRIGHT_CORE", "~/pw/node_modules/playwright-core")).expanduser()
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
    if not modules.is_dir() or not shutil.which("node"):
        skip_loudly(f"no Node, or no playwright-core at {modules} (set PLAYWRIGHT_CORE)")
    if not browser:
        skip_loudly("no Chromium (set CHROMIUM)")
    server.post("/settings/Comfy.TutorialCompleted", True)  # else a dialog covers everything
    return Page(server, modules, browser)


@pytest.fixture(scope="session")
def page(comfyui: Server) -> Page:
    return open_page(comfyui)


@pytest.fixture(scope="session")
def oldest_page(oldest_comfyui: Server) -> Page:
    return open_page(oldest_comfyui)


@pytest.fixture(scope="session")
def each_page(each_comfyui: Server) -> Page:
    return open_page(each_comfyui)


@pytest.fixture(scope="session")
def short_prompt() -> Callable[..., dict[str, Any]]:
    """short_prompt(name, **fields): the shipped workflow, for a LoRA of that name, with 6 steps or what the fields say."""

    def build(name: str, **fields: Any) -> dict[str, Any]:
        prompt = json.loads((PROJECT / "workflows" / "api" / "first-lora.json").read_text("utf-8"))
        few = {"steps": 6, "warmup_steps": 2, "batch_size": 2, "validate_every": 0, "checkpoint_every": 2}
        for node in prompt.values():
            if node["class_type"] == "LoRATrainer":
                node["inputs"].update(few, name=name, **fields)
            if node["class_type"] == "DatasetBackend":
                node["inputs"].update(folder="few")
            if node["class_type"] == "ValidateSampler":
                node["inputs"].update(steps=2, cfg=1.0, lora_strength="1.0", prompts="cat face")
        return prompt

    return build


@pytest.fixture(scope="session")
def short_workflow() -> Callable[..., dict[str, Any]]:
    """short_workflow(name, **fields): the shipped workflow as the editor saves it, made short, with a LoRATrainer of these fields."""

    def build(name: str, **fields: Any) -> dict[str, Any]:
        workflow = json.loads((PROJECT / "workflows" / "first-lora.json").read_text("utf-8"))
        few = {
            "name": name,
            "steps": 8,
            "warmup_steps": 1,
            "batch_size": 1,
            "validate_every": 0,
            "checkpoint_every": 5,
            **fields,
        }
        drawn = {"prompts": "cat face", "steps": 1, "cfg": 1.0, "lora_strength": "1.0"}
        given = {"LoRATrainer": few, "ValidateSampler": drawn, "DatasetBackend": {"folder": "few"}}
        for node in workflow["nodes"]:
            for field, value in given.get(node["type"], {}).items():
                place, values = widget_place(node["type"], field), node["widgets_values"]
                values[place : place + 1] = [value]  # the file may be older than the last field
        return workflow

    return build


def widget_place(node_type: str, name: str) -> int:
    """Where a saved workflow keeps a field's value: a seed is followed by its control."""
    names: list[str] = []
    for field in CATALOGUE[node_type].fields():
        if field.is_widget:
            names += [field.name, "control"] if field.seed else [field.name]
    return names.index(name)


@pytest.fixture(scope="session")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """headless(workflow, *more): what `chroma-trainer run` of this JSON leaves; its output folder. more: arguments."""

    def run(workflow: Any, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("headless")
        (folder / "workflow.json").write_text(json.dumps(workflow), "utf-8")
        few_pictures(folder)
        command = ["run", str(folder / "workflow.json"), "--output", str(folder), "--datasets", str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "chroma_trainer.cli", *command, *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return folder

    return run


@pytest.fixture(scope="session")
def chroma(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny Chroma for both: our transformer, and files for the probe nodes."""
    import torch
    from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("probe")
    family = ChromaFamily()
    transformer = family.load_transformer(tiny_model)
    config = json.loads((Path(tiny_model.repo) / "transformer" / "config.json").read_text("utf-8"))
    save_file(original_weights(transformer, 64), folder / "weights.safetensors")
    generator = torch.Generator().manual_seed(3)
    texts = {name: torch.randn(length, 32, generator=generator) for name, length in (("positive", 5), ("negative", 4))}
    save_file(texts, folder / "texts.safetensors")
    return SimpleNamespace(family=family, transformer=transformer, config=config, texts=texts, folder=folder)


def original_weights(transformer: Any, width: int) -> dict[str, Any]:
    """By ComfyUI's names, fused where ComfyUI fuses."""
    import torch
    from chroma_trainer.trainer_core.adapters.files.keys import original_parameter

    parts: dict[str, list[Any]] = {}
    for name, parameter in transformer.state_dict().items():
        key, place = original_parameter(name)
        parameter = parameter.roll(len(parameter) // 2, 0) if place.is_swapped else parameter
        parts.setdefault(key, []).append((place.rows(width).start or 0, parameter))
    return {
        key: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])]).contiguous()
        for key, found in parts.items()
    }
