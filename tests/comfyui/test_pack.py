"""The pack in a real ComfyUI: its nodes, its manners, and the same bytes as a headless run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.nodes import CATALOGUE

pytestmark = pytest.mark.comfyui
PROJECT = Path(__file__).resolve().parents[2]


def prompt_of(name: str, **changes: Any) -> dict[str, Any]:
    """The shipped workflow with another LoRA name and few steps."""
    prompt = json.loads((PROJECT / "workflows" / "api" / "first-lora.json").read_text("utf-8"))
    prompt["5"]["inputs"].update(name=name, steps=6, warmup_steps=2, validate_every=0, checkpoint_every=2, **changes)
    for node in ("4", "6"):
        prompt[node]["inputs"].update(steps=2, cfg=1.0, lora_strength="1.0", prompts="cat face")
    return prompt


def headless(prompt: dict[str, Any], folder: Path) -> Path:
    """The LoRA that `chroma-trainer run` makes of a prompt."""
    folder.mkdir()
    (folder / "prompt.json").write_text(json.dumps(prompt), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "chroma_trainer.cli", "run", str(folder / "prompt.json"), "--output", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder / "loras" / f"{prompt['5']['inputs']['name']}.safetensors"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nodes_are_listed_with_their_fields(comfyui):
    info = comfyui.get("/object_info")
    for node_id, spec in CATALOGUE.items():
        inputs = info[node_id]["input"]
        offered = {**inputs.get("required", {}), **inputs.get("optional", {})}
        assert list(offered) and set(offered) == {field.name for field in spec.fields()}
        for field in spec.fields():
            options = offered[field.name][1]
            assert options["tooltip"] == field.doc
            if field.is_widget:
                assert options["default"] == field.default
            if field.range:
                assert (options["min"], options["max"], options["step"]) == (
                    field.range.low,
                    field.range.high,
                    field.range.step,
                )
        assert info[node_id]["output"] == [output.type for output in spec.outputs]


def test_loading_the_pack_imports_nothing_heavy(comfyui):
    """ComfyUI itself imports torch and transformers; diffusers, peft and quanto would be ours."""
    assert "chroma-trainer" in comfyui.log and "IMPORT FAILED" not in comfyui.log
    code = (
        "import sys, types, json, importlib.util\n"
        "spec = importlib.util.spec_from_file_location('pack', sys.argv[1] + '/__init__.py', submodule_search_locations=[sys.argv[1]])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "import pack.nodes\n"
        "print(json.dumps(sorted(n for n in sys.modules if n.split('.')[0] in"
        " {'torch', 'diffusers', 'transformers', 'peft', 'optimum', 'accelerate', 'safetensors', 'PIL', 'numpy'})))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(PROJECT)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_editor_and_headless_write_the_same_bytes(comfyui, tmp_path):
    prompt = prompt_of("same-bytes")
    history = comfyui.wait(comfyui.queue(prompt))
    assert history["status"]["status_str"] == "success", history["status"]
    inside = comfyui.output / "loras" / "same-bytes.safetensors"
    assert digest(inside) == digest(headless(prompt, tmp_path / "headless"))
    # ComfyUI's LoRA loaders list it at once
    loaders = comfyui.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"]
    assert "same-bytes.safetensors" in json.dumps(loaders)


def test_cancel_keeps_a_lora_and_the_next_run_goes_on(comfyui, tmp_path):
    prompt = prompt_of("cancelled")
    prompt["5"]["inputs"].update(steps=4000, lr_schedule="constant")
    prompt_id = comfyui.queue(prompt)
    checkpoints = lambda: list((comfyui.output / "chroma_trainer").glob("cancelled-*/checkpoints/step-*"))  # noqa: E731
    until = time.monotonic() + 240
    while not checkpoints():
        assert time.monotonic() < until, comfyui.log[-3000:]
        time.sleep(0.2)
    comfyui.post("/interrupt", {})
    history = comfyui.wait(prompt_id)
    assert any(message[0] == "execution_interrupted" for message in history["status"]["messages"])
    reached = max(int(path.name.removeprefix("step-")) for path in checkpoints())
    assert (comfyui.output / "loras" / "cancelled.safetensors").is_file()

    prompt["5"]["inputs"]["steps"] = reached + 3
    history = comfyui.wait(comfyui.queue(prompt))
    assert history["status"]["status_str"] == "success", history["status"]
    report = json.loads(next((comfyui.output / "chroma_trainer").glob("cancelled-*/report.json")).read_text("utf-8"))
    assert (report["resumed_from"], report["steps"]) == (reached, reached + 3)
    again = headless(prompt, tmp_path / "uninterrupted")
    assert digest(comfyui.output / "loras" / "cancelled.safetensors") == digest(again)


def test_a_fault_shows_on_its_node_with_the_fix(comfyui):
    prompt = prompt_of("fault")
    prompt["3"]["inputs"]["folder"] = "no-such-folder"
    history = comfyui.wait(comfyui.queue(prompt))
    error = next(message[1] for message in history["status"]["messages"] if message[0] == "execution_error")
    assert error["node_id"] == "3"
    assert "node 3 (DatasetBackend).folder: 'no-such-folder' is not a folder in" in error["exception_message"]


KEY_MAP = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
sys.argv = ["main.py", "--cpu", *sys.argv[2:]]
path = sys.argv.pop()
import torch
import comfy.utils
from safetensors import safe_open
with safe_open(path, "pt") as file:
    keys = list(file.keys())
config = {"depth": 2, "depth_single_blocks": 4, "hidden_size": 192}
config.update(json.loads(sys.argv.pop()))
known = comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.")
names = {"transformer." + name[: -len(".weight")] for name in known if name.endswith(".weight")}
missing = sorted(key for key in keys if key.rsplit(".lora_", 1)[0] not in names)
print(json.dumps({"keys": len(keys), "missing": missing}))
"""


def test_lora_keys_are_known_to_comfyui(comfyui):
    """ComfyUI's own table from diffusers' names to its Chroma modules knows every key of our file: N of N."""
    root = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    python = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    config = json.loads((PROJECT / "assets" / "chroma-nano" / "transformer" / "config.json").read_text("utf-8"))
    sizes = {
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
    }
    lora = next((comfyui.output / "loras").glob("*.safetensors"))
    done = subprocess.run(
        [str(python) if python.is_file() else sys.executable, "-c", KEY_MAP, str(root), json.dumps(sizes), str(lora)],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["keys"] > 0 and found["missing"] == []
