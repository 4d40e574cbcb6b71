"""Images and captions of ComfyUI's own nodes, trained in one graph; and the same graph headless."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from PIL import Image

from .conftest import faults_of

pytestmark = pytest.mark.comfyui
NAME = "graph-dataset"


def graph(prompt: dict, **inputs) -> dict:
    """The prompt with a dataset of nodes that only run in ComfyUI: a list of images, and a batch of frames without color."""
    prompt["load"] = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "few"}}
    inputs = {"images": ["load", 0], "captions": ["load", 1], "name": "sets/graph", **inputs}
    prompt["save"] = {"class_type": "SaveDataset", "inputs": inputs}
    for node in prompt.values():
        if node["class_type"] == "DatasetBackend":
            node["inputs"].update(folder=["save", 0], masks=["save", 1])
    return prompt


def written(server) -> dict[str, tuple[str, int]]:
    (folder,) = [path for path in server.base.glob("**/sets/graph") if path.is_dir()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(server.base)): (sha256_of(path), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def trained(each_comfyui, short_prompt):
    each_comfyui.run(graph(short_prompt(NAME)))
    return each_comfyui


def test_a_list_of_images_and_captions_is_written(trained):
    def images(folder: Path) -> dict[bytes, str]:
        pictures = {}
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB")).tobytes()
            pictures[pixels] = " ".join(path.with_suffix(".txt").read_text("utf-8").split())
        return pictures

    (folder,) = trained.base.glob("**/sets/graph")
    assert len(images(folder)) == 4 and images(folder) == images(trained.base / "input" / "few")


def test_the_same_graph_writes_nothing_new_and_a_headless_run_the_same_bytes(trained, short_prompt, headless):
    before = written(trained)
    trained.run(graph(short_prompt(NAME)))
    assert written(trained) == before
    (sets,) = trained.base.glob("**/sets")
    lora = headless(graph(short_prompt(NAME)), "--datasets", str(sets.parent)) / "loras" / f"{NAME}.safetensors"
    assert sha256_of(lora) == sha256_of(trained.output / "loras" / f"{NAME}.safetensors")
    assert str(trained.base) not in lora.read_bytes().decode("latin-1")


def test_a_mismatch_is_shown_on_the_node(trained, short_prompt):
    prompt = graph(short_prompt(NAME), images=["frames", 0])
    prompt["frames"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 0x808080},
    }
    history = trained.wait(trained.queue(prompt))
    (fault,) = faults_of(history)
    text = fault["exception_message"]
    assert fault["node_id"] == "save" and "captions: 4 captions for 3 images; connect one for all" in text, json.dumps(
        text
    )
