"""ComfyUI's run and the headless run write the same bytes, and ComfyUI's own loaders take every key of them, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.keys import original_place
from chroma_trainer.trainer_core.adapters.files.load import read_lora, read_tensors
from chroma_trainer.trainer_core.adapters.lora import LoraPair
from chroma_trainer.trainer_core.storage.atomic import sha256_of

pytestmark = pytest.mark.comfyui
PROJECT = Path(__file__).resolve().parents[2]
NAME = "same-bytes"
CONFIG = json.loads((PROJECT / "assets" / "chroma-nano" / "transformer" / "config.json").read_text("utf-8"))
WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
RELATIVE, ABSOLUTE = 1e-5, 1e-7  # fp32 products, in another order


@pytest.fixture(scope="module")
def trained(each_comfyui, short_prompt):
    """A server where one prompt has trained a LoRA, given it to Load LoRA Model, and plotted its loss."""
    prompt = short_prompt(NAME)
    prompt["loader"] = {
        "class_type": "LoraModelLoader",
        "inputs": {"model": ["chroma", 0], "lora": ["5", 1], "strength_model": 1.0, "bypass": False},
    }
    prompt["chroma"] = chroma()
    prompt["delta"] = {"class_type": "ProbeDelta", "inputs": {"model": ["loader", 0], "name": "by-socket"}}
    prompt["plot"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["5", 2], "filename_prefix": "loss"}}
    return each_comfyui, each_comfyui.run(prompt)


@pytest.fixture(scope="module")
def headless_lora(short_prompt, headless) -> Path:
    return headless(short_prompt(NAME)) / "loras" / f"{NAME}.safetensors"


def chroma() -> dict:
    return {"class_type": "ProbeChroma", "inputs": {"config": json.dumps(CONFIG)}}


def assert_exact(delta: Path, lora: Path, num_patches: int) -> None:
    """The delta that ComfyUI computed is that of our file: every key of it, in the right rows, and nothing else."""
    pairs = read_lora(lora)
    assert 2 * num_patches == len(read_tensors(lora)) == 2 * len(pairs)
    found = read_tensors(delta)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    for module, pair in pairs.items():
        place = original_place(module)
        assert isinstance(pair, LoraPair)
        wanted[f"{place.module}.weight"][place.rows(WIDTH)] += pair.up @ pair.down
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=RELATIVE, atol=ABSOLUTE)
    assert any(tensor.abs().max() > 0 for tensor in wanted.values())


def test_the_server_and_headless_write_the_same_bytes(trained, headless_lora):
    server, _ = trained
    assert sha256_of(server.output / "loras" / f"{NAME}.safetensors") == sha256_of(headless_lora)


def test_load_lora_model_takes_every_key(trained):
    server, history = trained
    (num_patches,) = history["outputs"]["delta"]["patches"]
    assert_exact(server.output / "by-socket.safetensors", server.output / "loras" / f"{NAME}.safetensors", num_patches)


def test_plot_loss_graph_takes_the_loss_map(trained):
    _, history = trained
    assert history["outputs"]["plot"]["images"]


@pytest.mark.parametrize("loader", ["LoraLoader", "LoraLoaderModelOnly"])
def test_the_file_loaders_list_it_and_take_every_key(trained, loader):
    server, _ = trained
    inputs = {"model": ["chroma", 0], "lora_name": f"{NAME}.safetensors", "strength_model": 1.0}
    if loader == "LoraLoader":
        inputs |= {"clip": ["chroma", 1], "strength_clip": 1.0}
    history = server.run({
        "chroma": chroma(),
        "loader": {"class_type": loader, "inputs": inputs},
        "delta": {"class_type": "ProbeDelta", "inputs": {"model": ["loader", 0], "name": loader}},
    })  # fmt: skip
    (num_patches,) = history["outputs"]["delta"]["patches"]
    assert_exact(server.output / f"{loader}.safetensors", server.output / "loras" / f"{NAME}.safetensors", num_patches)
    assert "not loaded" not in server.log.lower()
