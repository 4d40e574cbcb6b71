"""The nodes for finished LoRAs, in a headless graph: from a file through every tool to a saved one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.lora_tools.reader import LoraTensors
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.read import graph_from_json
from safetensors import safe_open
from safetensors.torch import save_file

from .conftest import assert_equal, delta, diffusers_tensors, expected, kohya_tensors, native_tensors


@pytest.fixture
def host(tmp_path):
    (tmp_path / "loras").mkdir()
    save_file(native_tensors(""), tmp_path / "loras" / "bare.safetensors", {"prompt": "{}"})
    save_file(kohya_tensors(2.0), tmp_path / "loras" / "kohya.safetensors")
    paths = Paths(output=tmp_path / "out", cache=tmp_path / "cache", models={"loras": (tmp_path / "loras",)})
    return SinkHost(paths=paths, device="cpu")


def graph(**nodes):
    return graph_from_json({"1": load("bare"), "2": load("kohya"), **nodes}, schemas())


def load(name):
    return {"class_type": "LoadLoRAFile", "inputs": {"lora": f"{name}.safetensors"}}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def saved(host, name) -> Path:
    return host.paths.output / "loras" / f"{name}.safetensors"


def test_a_chain_of_tools(host):
    nodes = {
        "3": node("CheckLoRA", lora_model=["1", 0], second=["2", 0], save_as="fixed"),
        "4": node("MergeLoRA", lora_a=["3", 2], lora_b=["2", 0], strength_a=0.5, save_as="merged"),
        "5": node("ScaleLoRA", lora_model=["4", 0], blocks="single_blocks.*=0", strength=2.0),
        "6": node("ResizeLoRA", lora_model=["5", 0], rank=4, energy=0.0, save_as="styles/small"),
        "7": node("SaveImage", images=["3", 1], filename_prefix="chart"),
    }
    outputs = execute(graph(**nodes), CATALOGUE, host)
    text, charts, _, name = outputs["3"]
    assert (
        "12 of 12 keys are not loaded by ComfyUI" in text
        and "cosine      +1.000" in text
        and name == "fixed.safetensors"
    )
    assert charts[0].shape[0] == 1 and charts[0].shape[3] == 3 and (host.paths.output / "chart_00001_.png").is_file()
    assert_equal(delta(saved(host, "fixed")), expected())
    assert_equal(delta(saved(host, "merged")), expected(1.0))
    double = {layer: 2 * tensor for layer, tensor in expected().items() if not layer.startswith("single")}
    assert_equal(delta(saved(host, "styles/small")), double)
    assert (
        "rank 8 -> 4, relative error" in outputs["6"][1]
        and outputs["6"][2].replace("\\", "/") == "styles/small.safetensors"
    )
    assert outputs["5"][2] == ""  # not saved
    with safe_open(saved(host, "styles/small"), "pt") as file:
        edit = json.loads(file.metadata()["chroma_trainer_edit"])
    scaled = json.loads(edit["parents"][0]["metadata"]["chroma_trainer_edit"])
    merged = json.loads(scaled["parents"][0]["metadata"]["chroma_trainer_edit"])
    assert [edit["operation"], scaled["operation"], merged["operation"]] == [
        "lora resize",
        "lora strength",
        "lora merge",
    ]
    assert [parent["name"] for parent in merged["parents"]] == ["fixed.safetensors", "kohya.safetensors"]
    assert all(len(parent["sha256"]) == 64 for parent in merged["parents"])


def test_a_saved_file_stays_and_the_same_bytes_are_not_saved_twice(host):
    nodes = {"3": node("ScaleLoRA", lora_model=["2", 0], strength=0.5, save_as="mine")}
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine.safetensors"
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine.safetensors"
    nodes["3"]["inputs"]["strength"] = 0.25
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine-2.safetensors"
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine-2.safetensors"
    assert sorted(path.name for path in saved(host, "mine").parent.iterdir()) == [
        "mine-2.safetensors",
        "mine.safetensors",
    ]
    assert_equal(delta(saved(host, "mine")), expected(0.25))


def test_a_number_that_the_user_typed_is_a_name_of_its_own(host):
    nodes = {"3": node("ScaleLoRA", lora_model=["2", 0], strength=0.5, save_as="mine")}
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine.safetensors"
    nodes["3"]["inputs"]["save_as"] = "mine-2"
    assert execute(graph(**nodes), CATALOGUE, host)["3"][2] == "mine-2.safetensors"
    assert saved(host, "mine").read_bytes() == saved(host, "mine-2").read_bytes()


def test_a_sound_lora_passes_unchanged(host):
    nodes = {"3": node("CheckLoRA", lora_model=["2", 0])}
    outputs = execute(graph(**nodes), CATALOGUE, host)
    assert outputs["3"][2] is outputs["2"][0] and isinstance(outputs["2"][0], LoraTensors)


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ({"3": node("ResizeLoRA", lora_model=["2", 0], rank=0, energy=0.0)}, "node 3 (ResizeLoRA).rank: is 0, and so is energy"),
        ({"3": node("ScaleLoRA", lora_model=["2", 0], blocks="x")}, "node 3 (ScaleLoRA).blocks: 'x' is not a valid rule"),
        ({"3": node("ScaleLoRA", lora_model=["2", 0], save_as="../x")}, "node 3 (ScaleLoRA).save_as: '../x' is outside the folder"),
        ({"3": node("LoadLoRAFile", lora="none")}, "node 3 (LoadLoRAFile).lora: no LoRA is chosen"),
        ({"3": node("LoadLoRAFile", lora="kohay.safetensors")}, "did you mean 'kohya.safetensors'?"),
        ({"3": node("ScaleLoRA", lora_model=["2", 0], blocks="double_blocks.7=0")}, "node 3 (ScaleLoRA).blocks: 'transformer_blocks.7=0' matches none"),
    ],
)  # fmt: skip
def test_mistakes_are_named_on_their_node(host, nodes, problem):
    with pytest.raises(UserError) as caught:
        execute(graph(**nodes), CATALOGUE, host)
    assert problem in str(caught.value)


def test_a_model_is_extracted(tiny_chroma, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(tiny_chroma, tmp_path / "models" / "diffusers" / name)
    from safetensors.torch import load_file

    (file,) = (tmp_path / "models" / "diffusers" / "two" / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["transformer_blocks.0.attn.to_q.weight"] += 0.1
    save_file(weights, file)
    nodes = {
        "1": node("LoadChroma", folder="one", dtype="fp32"), "2": node("LoadChroma", folder="two", dtype="fp32"),
        "3": node("ExtractLoRA", base=["1", 0], tuned=["2", 0], rank=2, save_as="difference"),
    }  # fmt: skip
    Path("w.json").write_text(json.dumps(nodes), encoding="utf-8")
    assert main(["run", "w.json", "--models", "models", "--output", "out", "--device", "cpu"]) == 0
    (change,) = delta(tmp_path / "out" / "loras" / "difference.safetensors").values()
    assert (change - 0.1).abs().max() < 1e-5


def test_plain_tensors_of_other_nodes_are_taken():
    from chroma_trainer.nodes.lora_tools import scale_lora

    host = SinkHost(paths=Paths(output=Path("x"), cache=Path("x")))
    inputs = scale_lora.Inputs(lora_model=diffusers_tensors(), strength=0.5)
    tensors, text, name = scale_lora.run(inputs, host)
    assert len(tensors) == len(diffusers_tensors()) and name == "" and "22 of 22 keys load in ComfyUI" in text
