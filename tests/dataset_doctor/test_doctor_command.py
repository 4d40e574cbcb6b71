"""`chroma-trainer doctor` for folders and workflows, and the node CheckDataset."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.host import PACKAGE, Notice
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.read import graph_from_json
from PIL import Image

from .conftest import scene

FIRST_LORA = PACKAGE / "workflows" / "api" / "first-lora.json"


@pytest.fixture
def doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = main(["doctor", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_a_folder(doctor, folder, save, tmp_path):
    save("a.png", scene(0), "sks, one")
    save("b.png", scene(0), "two")
    options = ("--resolution", 128, "--trigger", "sks", "--sheet", tmp_path / "sheet.png")
    status, text, _ = doctor(folder, *options)
    assert status == 1 and "2 of 2 images can be trained" in text and "128x128" in text
    assert "#2 b.png: exact copy of #1" in text and "captions without the trigger: 1 image;" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
    status, text, _ = doctor(folder, *options, "--json", "--force")
    report = json.loads(text)
    assert status == 1 and report["sheet"] == str(tmp_path / "sheet.png")
    assert [finding["kind"] for finding in report["findings"]] == ["copies", "trigger_missing"]
    assert not (tmp_path / "output").exists()


def test_a_sheet_is_not_replaced(doctor, folder, save, tmp_path):
    save("a.png", scene(0))
    (tmp_path / "sheet.png").write_bytes(b"mine")
    status, _, error = doctor(folder, "--sheet", "sheet.png")
    assert status == 2 and "exists already" in error
    assert (tmp_path / "sheet.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cats", "--chart", "c.png"), "chart: is not for a dataset"),
        (("cats", "other.safetensors"), "second: is not for a dataset"),
        (("lora.safetensors", "--trigger", "sks"), "trigger: is not for a LoRA file"),
        (("w.json", "--resolution", "64"), "resolution: is not for a workflow"),
        (("cats", "--captions", "table"), "table: is empty"),
        (("empty.json",), "has no dataset"),
        (("nothing.json",), "nothing.json"),
    ],
)
def test_what_can_not_be_examined(doctor, folder, tmp_path, arguments, message):
    (tmp_path / "empty.json").write_text('{"1": {"class_type": "LoadChroma", "inputs": {}}}', "utf-8")
    status, _, error = doctor(*arguments)
    assert status == 2 and message in error


def test_a_workflow_is_examined_at_its_own_resolution(doctor):
    status, text, _ = doctor(FIRST_LORA)
    assert status == 0 and "plain-emoji, neon-emoji" in text
    assert "64x64" in text and "nothing is wrong" in text
    assert "not checked" not in text  # the embedded model has its tokenizer


def test_a_workflow_whose_model_is_not_here(doctor, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    workflow = json.loads(FIRST_LORA.read_text("utf-8"))
    for node in workflow.values():
        if node["class_type"] == "LoadChroma":
            node["inputs"]["flavour"] = "hd"
    (tmp_path / "hd.json").write_text(json.dumps(workflow), "utf-8")
    status, text, _ = doctor("hd.json")
    assert status == 0 and "the length of captions is not checked" in text


def test_long_captions_are_counted_with_the_tokenizer_of_the_model(doctor, folder, save, tmp_path):
    save("a.png", scene(0), "a red fox in the snow, " * 100)
    workflow = json.loads(FIRST_LORA.read_text("utf-8"))
    for node in workflow.values():
        if node["class_type"] == "DatasetBackend":
            node["inputs"]["folder"] = "cats"
    (tmp_path / "w.json").write_text(json.dumps(workflow), "utf-8")
    status, text, _ = doctor("w.json", "--json")
    findings = {finding["kind"]: finding for finding in json.loads(text)["findings"]}
    assert status == 1 and findings["caption_long"]["count"] == 1
    assert int(findings["caption_long"]["images"][0]["value"].split()[0]) > 512


def test_the_node_in_a_headless_graph(host):
    messages = []
    sink = lambda event: messages.append(event) if isinstance(event, Notice) else None  # noqa: E731
    nodes = {
        "1": {"class_type": "DatasetBackend", "inputs": {"folder": "neon-emoji", "resolution": 64, "trigger": "neon"}},
        "2": {"class_type": "CheckDataset", "inputs": {"dataset": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 1], "filename_prefix": "sheet"}},
    }
    text, (sheet,) = execute(graph_from_json(nodes, schemas()), CATALOGUE, replace(host, sinks=(sink,)))["2"]
    assert "28 of 28 images can be trained" in text and all(event.level == "info" for event in messages)
    assert sheet.ndim == 4 and sheet.shape[3] == 3 and float(sheet.min()) >= 0 and float(sheet.max()) <= 1
    (file,) = host.paths.output.glob("sheet*.png")
    with Image.open(file) as image:
        assert image.size == (sheet.shape[2], sheet.shape[1])
