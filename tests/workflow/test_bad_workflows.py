"""Workflows at fault, each with its exact message: where, what came, what is wanted, what to do."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.workflow import embedded
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.overrides import override
from chroma_trainer.trainer_core.workflow.read import graph_from_json, read_workflow

PNG = b"\x89PNG\r\n\x1a\n"
NO_WORKFLOW = (
    "is JSON, but not a ComfyUI workflow; export one from ComfyUI's menu (Workflow > Export or Export (API)); of another "
    "trainer's configuration, chroma-trainer import makes one"
)
NO_PICTURE = "the image contains no workflow; use one that ComfyUI saved with metadata, or an exported .json"
NO_FILE = "the file contains no workflow; use a LoRA that ChromaTrainer saved from a workflow, or an exported .json"


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def png_text(text: bytes) -> bytes:
    return PNG + struct.pack(">I4s", len(text), b"tEXt") + text + b"....."


NO_HEADER = "FILE: is not a safetensors file ({}); use a LoRA that ends in .safetensors"
NO_SIZE = "its first 8 bytes give a header size of {} bytes; only .safetensors files can be read"
FILES: dict[str, tuple[bytes, str]] = {
    "empty.json": (b"", "FILE: is empty; export the workflow again"),
    "blank.json": (b" \n\t", "FILE: is empty; export the workflow again"),
    "prose.json": (
        b"a cat",
        "FILE: is not JSON: Expecting value in line 1, column 1; export the workflow again",
    ),
    "truncated.json": (
        b'{"nodes": [\n  {"id": 1',
        "FILE: is not JSON: Expecting ',' delimiter in line 2, column 11; export the workflow again",
    ),
    "list.json": (b"[1, 2]", f"FILE: {NO_WORKFLOW}"),
    "number.json": (b"3", f"FILE: {NO_WORKFLOW}"),
    "null.json": (b"null", f"FILE: {NO_WORKFLOW}"),
    "other.json": (b'{"name": "a package", "version": 1, "nodes": {}}', f"FILE: {NO_WORKFLOW}"),
    "deep.json": (b"[" * 200_000, "FILE: is nested more than 100 levels deep; export the workflow again"),
    "long-number.json": (
        b'{"1": ' + b"9" * 5000 + b"}",
        "FILE: has a number that is too long; export the workflow again",
    ),
    "latin.json": (
        '{"a": "größer"}'.encode("latin-1"),
        "FILE: is not UTF-8 text (byte 9); save it as UTF-8, or use a .json, .png or .safetensors file",
    ),
    "utf16.json": (
        '{"a": 1}'.encode("utf-16"),
        "FILE: is not UTF-8 text (byte 0); save it as UTF-8, or use a .json, .png or .safetensors file",
    ),
    "picture.jpg": (
        b"\xff\xd8\xff\xe0" + bytes(30),
        "FILE: is not UTF-8 text (byte 0); save it as UTF-8, or use a .json, .png or .safetensors file",
    ),
    "bare.png": (PNG, f"FILE: {NO_PICTURE}"),
    "other-text.png": (png_text(b"parameters\0a cat"), f"FILE: {NO_PICTURE}"),
    "cut.png": (png_text(b"prompt\0{}")[:-9], f"FILE: {NO_PICTURE}"),
    "broken.png": (
        png_text(b"prompt\0{1"),
        "FILE, its prompt: is not JSON: Expecting property name enclosed in double quotes in line 1, column 2; "
        "export the workflow again",
    ),
    "other.png": (png_text(b'prompt\0{"a": 1}'), f"FILE: {NO_WORKFLOW}"),
    "bare.safetensors": (safetensors(b"{}"), f"FILE: {NO_FILE}"),
    "other.safetensors": (safetensors(b'{"__metadata__": {"format": "pt"}}'), f"FILE: {NO_FILE}"),
    "without.safetensors": (safetensors(b'{"__metadata__": {"prompt": "{}"}}'), f"FILE: {NO_FILE}"),
    "list.safetensors": (
        safetensors(b"[]"),
        NO_HEADER.format("its header is not a JSON object; the file is damaged or in another format"),
    ),
    "short.safetensors": (b"123", NO_HEADER.format(NO_SIZE.format(0x333231))),
    "junk.safetensors": (b"x" * 100, NO_HEADER.format(NO_SIZE.format(0x7878787878787878))),
    "deep.safetensors": (
        safetensors(b"[" * 200_000),
        NO_HEADER.format("its header is nested more than 100 levels deep; the file is damaged or in another format"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str):
    raw, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_workflow(path, schemas())
    assert str(caught.value) == message.replace("FILE", str(path))


def test_a_file_that_is_not_there(tmp_path: Path):
    path = tmp_path / "nowhere.json"
    with pytest.raises(UserError) as caught:
        read_workflow(path, schemas())
    message = "can't be read: No such file or directory; use a .json, .png or .safetensors file"
    assert str(caught.value) == f"{path}: {message}"


def test_a_folder(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read_workflow(tmp_path, schemas())
    assert str(caught.value) == f"{tmp_path}: is a folder; choose a workflow file: .json, .png or .safetensors"


def test_a_huge_file_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(65 << 20)  # a hole, no bytes on disk
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(UserError) as caught:
        read_workflow(path, schemas())
    assert str(caught.value) == (
        f"{path}: is 65 MiB in size; the limit is {embedded.MAX_BYTES >> 20} MiB; "
        "choose a workflow file: .json, .png or .safetensors"
    )


def fed(node_id: int, kind: str, link: int, name: str = "x") -> dict[str, Any]:
    """A node with one input, from this link."""
    return {"id": node_id, "type": kind, "inputs": [{"name": name, "type": "T", "link": link}]}


def nested(*layers: list[str]) -> dict[str, Any]:
    """A workflow with an instance of D0; definition Dk has a node of each type of its layer."""
    definitions = [
        {"id": f"D{k}", "name": f"Part {k}", "nodes": [{"id": i, "type": kind} for i, kind in enumerate(kinds)]}
        for k, kinds in enumerate(layers)
    ]
    return {"nodes": [{"id": 1, "type": "D0"}], "definitions": {"subgraphs": definitions}}


DOCUMENTS: dict[str, tuple[Any, list[str]]] = {
    "entries that are no nodes": (
        {"1": {"class_type": "A"}, "2": {"inputs": {}}, "3": 5, "4": {"class_type": 5}},
        [f'workflow: entry "{key}" is not a node: it has no "class_type"; export the workflow again' for key in "234"],
    ),
    "inputs that are a list": (
        {"1": {"class_type": "A", "inputs": []}},
        ["node 1 (A).inputs: is not an object of names and values; export the workflow again"],
    ),
    "links to nodes that are not there": (
        {"1": {"class_type": "A", "inputs": {"x": ["9", 0], "y": ["1", 0], "z": [8, 1]}}},
        [
            "node 1 (A).x: is connected to node 9, which is not in the workflow; connect it again",
            "node 1 (A).z: is connected to node 8, which is not in the workflow; connect it again",
        ],
    ),
    "nodes without id or type": (
        {"nodes": [{"id": 1}, 5, {"type": "A"}, {"id": True, "type": "A"}]},
        [
            "workflow: has a node without an id or type: {'id': 1}; export the workflow again",
            "workflow: has a node without an id or type: 5; export the workflow again",
            "workflow: has a node without an id or type: {'type': 'A'}; export the workflow again",
            "workflow: has a node without an id or type: {'id': True, 'type': 'A'}; export the workflow again",
        ],
    ),
    "an id twice": (
        {"nodes": [{"id": 1, "type": "A"}, {"id": "1", "type": "B"}]},
        ["workflow: has two nodes with the id 1: A and B; export the workflow again"],
    ),
    "links that are none": (
        {"nodes": [], "links": [[1, 2], {"id": 1}, "x", [1, 2, "a", 3, 4, "T"]]},
        [
            "workflow: has a link that can't be read: [1, 2]; export the workflow again",
            "workflow: has a link that can't be read: {'id': 1}; export the workflow again",
            "workflow: has a link that can't be read: 'x'; export the workflow again",
            "workflow: has a link that can't be read: [1, 2, 'a', 3, 4, 'T']; export the workflow again",
        ],
    ),
    "a link that is not there": (
        {"nodes": [fed(1, "LoRATrainer", 7, "model")], "links": []},
        ["node 1 (LoRATrainer).model: is fed by link 7, which is not in the workflow; connect it again"],
    ),
    "a node that is not there": (
        {"nodes": [fed(1, "LoRATrainer", 7, "model")], "links": [[7, 9, 0, 1, 0, "T"]]},
        ["node 1 (LoRATrainer).model: is connected to node 9, which is not in the workflow; connect it again"],
    ),
    "a circle of reroutes": (
        {
            "nodes": [fed(1, "A", 1), fed(2, "Reroute", 2), fed(3, "Reroute", 3)],
            "links": [[1, 2, 0, 1, 0, "T"], [2, 3, 0, 2, 0, "T"], [3, 2, 0, 3, 0, "T"]],
        },
        ["node 1 (A).x: is fed by a cycle of reroutes, bypassed nodes or subgraphs; remove one of its links"],
    ),
    "a subgraph within itself": (
        nested(["A", "D1"], ["D2"], ["D1"]),
        ["workflow: has a subgraph that contains itself: Part 1 > Part 2 > Part 1; remove the innermost one"],
    ),
    "subgraphs too deep": (
        nested(*([f"D{k + 1}"] for k in range(3000))),
        ["workflow: has subgraphs nested more than 32 levels deep; export a simpler workflow"],
    ),
    "subgraphs that multiply": (
        nested(*([f"D{k + 1}"] * 20 for k in range(8)), []),
        ["workflow: has more than 20000 nodes after its subgraphs are expanded; export a smaller one"],
    ),
    "a subgraph that is not defined": (
        {"nodes": [{"id": 4, "type": "6b6f2e2c-0f5e-4c3a-9c55-2a1d7f0c1a11", "title": "The model"}]},
        ["node 4 (The model): is a subgraph that the workflow does not define; export the workflow again"],
    ),
    "subgraphs that are none": (
        {"nodes": [], "definitions": {"subgraphs": [{"id": "D"}, 3]}},
        [
            "workflow: has a subgraph without an id or nodes: {'id': 'D'}; export the workflow again",
            "workflow: has a subgraph without an id or nodes: 3; export the workflow again",
        ],
    ),
    "a group node": (
        {"nodes": [{"id": 4, "type": "workflow>Mine"}]},
        [
            "node 4 (workflow>Mine): is a group node of an old ComfyUI version; convert it to a subgraph in the editor, "
            "then export again"
        ],
    ),
    "names that the page fills in": (
        {
            "nodes": [
                {"id": 4, "type": "SaveImage", "widgets_values": ["%date:yyyy-MM-dd%/x"]},
                {"id": 5, "type": "SaveImage", "widgets_values": ["a %KSampler.seed%"]},
            ]
        },
        [
            "node 4 (SaveImage).filename_prefix: '%date:yyyy-MM-dd%/x' is filled in by ComfyUI's web page; "
            "use a plain name, or Export (API)",
            "node 5 (SaveImage).filename_prefix: 'a %KSampler.seed%' is filled in by ComfyUI's web page; "
            "use a plain name, or Export (API)",
        ],
    ),
    "several faults": (
        {"nodes": [5, fed(1, "A", 7), {"id": 2, "type": "workflow/B"}], "links": [3]},
        [
            "workflow: has a node without an id or type: 5; export the workflow again",
            "workflow: has a link that can't be read: 3; export the workflow again",
            "node 1 (A).x: is fed by link 7, which is not in the workflow; connect it again",
            "node 2 (workflow/B): is a group node of an old ComfyUI version; convert it to a subgraph in the editor, "
            "then export again",
        ],
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name: str):
    data, messages = DOCUMENTS[name]
    with pytest.raises(UserError) as caught:
        graph_from_json(data, schemas())
    assert [str(problem) for problem in caught.value.problems] == messages


@pytest.fixture
def host(tmp_path: Path) -> SinkHost:
    (tmp_path / "datasets" / "cats").mkdir(parents=True)
    (tmp_path / "datasets" / "cats" / "a.png").touch()  # a check looks at names alone
    return SinkHost(Paths(tmp_path / "output", tmp_path / "cache", datasets=(tmp_path / "datasets",)))


def workflow() -> dict[str, Any]:
    """A sound one: model 1 and 2, data 3, what to draw 4, training 5, what it learnt 6."""
    return {
        "1": {"class_type": "LoadChroma", "inputs": {}},
        "2": {"class_type": "QuantizeModel", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "cats"}},
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": "a cat"}},
        "5": {
            "class_type": "LoRATrainer",
            "inputs": {"model": ["2", 0], "dataset": ["3", 0], "validation": ["4", 1]},
            "_meta": {"title": "My trainer"},
        },
        "6": {"class_type": "ValidateSampler", "inputs": {"lora": ["5", 0], "prompts": "a cat"}},
    }


Edit = Callable[[dict[str, Any]], Any]


def sets(node_id: str, **values: Any) -> Edit:
    return lambda data: data[node_id]["inputs"].update(values)


def adds(node_id: str, kind: str, then: Edit) -> Edit:
    return lambda data: (data.update({node_id: {"class_type": kind, "inputs": {}}}), then(data))


def drops(*node_ids: str) -> Edit:
    return lambda data: [data.pop(node_id) for node_id in node_ids]


CHECKS: dict[str, tuple[Edit, list[str]]] = {
    "unknown input": (
        sets("5", learning_rat=1),
        ["node 5 (LoRATrainer).learning_rat: LoRATrainer has no input of this name; did you mean 'learning_rate'?"],
    ),
    "unknown input, nothing near": (
        sets("5", zzz=1),
        ["node 5 (LoRATrainer).zzz: LoRATrainer has no input of this name"],
    ),
    "out of range": (
        sets("5", rank=0, steps=-5, learning_rate=11, caption_dropout=1.5, seed=2**60),
        [
            "node 5 (LoRATrainer).rank: 0 is out of range; use 1 to 512, nearest is 1",
            "node 5 (LoRATrainer).steps: -5 is out of range; use 0 to 1000000, nearest is 0",
            "node 5 (LoRATrainer).learning_rate: 11 is out of range; use 0 to 10, nearest is 10",
            "node 5 (LoRATrainer).caption_dropout: 1.5 is out of range; use 0 to 1, nearest is 1",
            "node 5 (LoRATrainer).seed: 1152921504606846976 is out of range; "
            "use 0 to 9007199254740991, nearest is 9007199254740991",
        ],
    ),
    "wrong types": (
        sets("5", rank="16", gradient_checkpointing="yes", name=5, alpha=None, seed=1.5, steps=True, shift=[1, 2, 3]),
        [
            "node 5 (LoRATrainer).name: 5 is not a string",
            "node 5 (LoRATrainer).rank: '16' is not a whole number; use 1 to 512",
            "node 5 (LoRATrainer).alpha: None is not a number; use 0 to 1024",
            "node 5 (LoRATrainer).steps: True is not a whole number; use 0 to 1000000",
            "node 5 (LoRATrainer).gradient_checkpointing: 'yes' is not true or false",
            "node 5 (LoRATrainer).shift: [1, 2, 3] is not a number; use 0 to 100",
            "node 5 (LoRATrainer).seed: 1.5 is not a whole number; use 1 or 2",
        ],
    ),
    "no number at all": (
        sets("5", learning_rate=float("nan"), weight_decay=float("inf")),
        [
            "node 5 (LoRATrainer).learning_rate: nan is not a finite number",
            "node 5 (LoRATrainer).weight_decay: inf is not a finite number",
        ],
    ),
    "texts and numbers that nothing can hold": (
        sets("5", name="a\0b", targets="\ud800", rank=10**400, learning_rate=-(10**400)),
        [
            "node 5 (LoRATrainer).name: 'a\\x00b' is not valid UTF-8 without NUL characters; type it again",
            f"node 5 (LoRATrainer).rank: 1{'0' * 56}... is not a finite whole number",
            "node 5 (LoRATrainer).targets: '\\ud800' is not valid UTF-8 without NUL characters; type it again",
            f"node 5 (LoRATrainer).learning_rate: -1{'0' * 55}... is not a finite number",
        ],
    ),
    "a name that is too long for a file": (
        sets("3", folder="x" * 5000),
        [f"node 3 (DatasetBackend).folder: '{'x' * 60}' has a name of 5000 bytes; file systems allow 255"],
    ),
    "not among the choices": (
        sets("3", crop_style="centre"),
        [
            "node 3 (DatasetBackend).crop_style: 'centre' is not one of center, random, corner, boxes, mask; did you mean 'center'?"
        ],
    ),
    "no model": (
        lambda data: data["5"]["inputs"].pop("model"),
        ["node 5 (LoRATrainer).model: required input is missing; connect an output of type TRAIN_MODEL"],
    ),
    "a value where a connection is wanted": (
        sets("5", model="hd"),
        ["node 5 (LoRATrainer).model: needs a connection of type TRAIN_MODEL, not a value"],
    ),
    "the wrong connection": (
        sets("5", dataset=["4", 1]),
        [
            "node 5 (LoRATrainer).dataset: receives VALIDATION from node 4 (ValidateSampler), but needs TRAIN_DATASET; "
            "connect DatasetBackend.dataset"
        ],
    ),
    "a connection where a value is wanted": (
        sets("5", rank=["3", 0]),
        [
            "node 5 (LoRATrainer).rank: receives TRAIN_DATASET from node 3 (DatasetBackend), "
            "which is not a value for a widget; disconnect it"
        ],
    ),
    "an output that is not there": (
        sets("5", model=["2", 4]),
        [
            "node 5 (LoRATrainer).model: is connected to output 4 of node 2 (QuantizeModel), which has only 1; connect it again"
        ],
    ),
    "a model of ComfyUI's": (
        adds("9", "UNETLoader", sets("5", model=["9", 0])),
        [
            "node 5 (LoRATrainer).model: is connected to node 9 (UNETLoader), which can only run in ComfyUI; "
            "connect an output of type TRAIN_MODEL"
        ],
    ),
    "a value that ComfyUI computes": (
        adds("9", "MathExpression", sets("5", steps=["9", 0])),
        [
            "node 5 (LoRATrainer).steps: is connected to node 9 (MathExpression), which can only run in ComfyUI; "
            "enter the value directly"
        ],
    ),
    "a misspelt type": (
        lambda data: data["5"].update(class_type="LoraTrainer"),
        ["node 5 (LoraTrainer): there is no node of type 'LoraTrainer'; did you mean 'LoRATrainer'?"],
    ),
    "nothing to run": (
        drops("4", "5", "6"),
        ["workflow: has nothing to run; add a LoRATrainer or ValidateSampler or PlanRun node"],
    ),
    "a node that waits for itself": (
        sets("3", dataset=["3", 0]),
        ["workflow: nodes form a cycle: 3 (DatasetBackend) <- 3 (DatasetBackend); remove one of these links"],
    ),
    "nodes that wait for each other, and more": (
        lambda data: (
            sets("1", flavour="ultra")(data),
            adds("8", "DatasetBackend", sets("8", dataset=["3", 0]))(data),
            sets("3", dataset=["8", 0])(data),
        ),
        [
            "workflow: nodes form a cycle: 3 (DatasetBackend) <- 8 (DatasetBackend) <- 3 (DatasetBackend); "
            "remove one of these links",
            "node 1 (LoadChroma).flavour: 'ultra' is not one of nano, hd, base, flash",
        ],
    ),
    "a folder that is not there, beside another fault": (
        sets("3", folder="dogs", repeats=0),
        [
            "node 3 (DatasetBackend).repeats: 0 is out of range; use 1 to 10000, nearest is 1",
            "node 3 (DatasetBackend).folder: 'dogs' is not a folder in (ROOTS); put it into one of them",
        ],
    ),
    "fields that don't go together": (
        sets("5", steps=0, epochs=0, learning_rate=0, targets=" ", name="a:b"),
        [
            "node 5 (LoRATrainer).name: 'a:b' is not a valid file name on every system; "
            "use letters, digits, spaces, - and _, and / for subfolders",
            "node 5 (LoRATrainer).steps: steps and epochs are both 0; set one of them",
            "node 5 (LoRATrainer).targets: is empty; use 'all', or a comma-separated list of module patterns",
            "node 5 (LoRATrainer).learning_rate: is 0, so nothing would be trained; 1e-4 is usual",
        ],
    ),
    "a fault of one field does not hide those of fields together": (
        sets("5", rank=0, steps=0, epochs=0),
        [
            "node 5 (LoRATrainer).rank: 0 is out of range; use 1 to 512, nearest is 1",
            "node 5 (LoRATrainer).steps: steps and epochs are both 0; set one of them",
        ],
    ),
    "prompts": (
        sets("4", prompts="{oops", resolutions="65x64", lora_strength="much"),
        [
            "node 4 (ValidateSampler).prompts: starts with { but is not JSON: "
            "Expecting property name enclosed in double quotes in line 1, column 2",
            "node 4 (ValidateSampler).resolutions: 65 in '65x64' is not a multiple of 16 from 16 to 8192; use 64 or 80",
            "node 4 (ValidateSampler).lora_strength: 'much' is not a list of numbers; write for example 0.5, 1.0",
        ],
    ),
    "several nodes, in the order in which they run": (
        lambda data: [
            sets("6", cfg=99)(data),
            sets("5", rank=0, stepz=1)(data),
            sets("3", resolution_type="pixels")(data),
            sets("1", flavour="ultra")(data),
        ],
        [
            "node 1 (LoadChroma).flavour: 'ultra' is not one of nano, hd, base, flash",
            "node 3 (DatasetBackend).resolution_type: 'pixels' is not one of pixel_area, pixel, area; "
            "did you mean 'pixel'?",
            "node 5 (LoRATrainer).stepz: LoRATrainer has no input of this name; did you mean 'steps'?",
            "node 5 (LoRATrainer).rank: 0 is out of range; use 1 to 512, nearest is 1",
            "node 6 (ValidateSampler).cfg: 99 is out of range; use 1 to 30, nearest is 30",
        ],
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks(name: str, host: SinkHost):
    edit, messages = CHECKS[name]
    data = workflow()
    edit(data)
    found = [str(problem) for problem in check(graph_from_json(data, schemas()), CATALOGUE, host)]
    assert [_without_roots(message) for message in found] == messages


def _without_roots(message: str) -> str:
    before, found, rest = message.partition("is not a folder in (")
    return f"{before}{found}ROOTS){rest.partition(')')[2]}" if found else message


KNOWN = "LoadChroma, QuantizeModel, DatasetBackend, ValidateSampler, LoRATrainer"
SETTINGS: dict[str, str] = {
    "rank=3": "is not NODE.FIELD=VALUE; for example: LoRATrainer.steps=200",
    "LoRATrainer.rank": "is not NODE.FIELD=VALUE; for example: LoRATrainer.steps=200",
    "Lora.steps=3": f"there is no node 'Lora'; the node types are {KNOWN}",
    "99.steps=3": f"there is no node '99'; the node types are {KNOWN}",
    "My traner.steps=3": "there is no node 'My traner'; did you mean 'My trainer'?",
    "loratrainer.steps=3": "there is no node 'loratrainer'; did you mean 'LoRATrainer'?",
    "ValidateSampler.steps=3": "'ValidateSampler' matches 2 nodes; use one of the ids 4, 6",
    "5.stepz=3": "LoRATrainer has no field 'stepz'; did you mean 'steps'?",
    "My trainer.model=hd": "LoRATrainer.model is a connection, not a value",
}


def test_settings_all_at_once():
    graph = graph_from_json(workflow(), schemas())
    with pytest.raises(UserError) as caught:
        override(graph, list(SETTINGS), CATALOGUE)
    assert [str(p) for p in caught.value.problems] == [f"--set {key}: {message}" for key, message in SETTINGS.items()]


def test_values_of_settings_are_checked_as_in_the_file(host: SinkHost):
    graph = graph_from_json(workflow(), schemas())
    settings = ["5.steps=many", "My trainer.rank=0", "LoRATrainer.gradient_checkpointing=maybe", "1.flavour=hdd"]
    assert [str(problem) for problem in check(override(graph, settings, CATALOGUE), CATALOGUE, host)] == [
        "node 1 (LoadChroma).flavour: 'hdd' is not one of nano, hd, base, flash; did you mean 'hd'?",
        "node 5 (LoRATrainer).rank: 0 is out of range; use 1 to 512, nearest is 1",
        "node 5 (LoRATrainer).steps: 'many' is not a whole number; use 0 to 1000000",
        "node 5 (LoRATrainer).gradient_checkpointing: 'maybe' is not true or false",
    ]


@pytest.mark.parametrize("kind", ["KSampler", "LoadImage", "LoraLoader", "LoraSave", "VOIDSampler", "ColorTransfer"])
def test_nodes_of_comfyui_are_not_taken_for_misspelt_ones(kind: str, host: SinkHost):
    data = workflow()
    drops("1", "2", "3", "5", "6")(data)
    data["9"] = {"class_type": kind, "inputs": {}}
    assert check(graph_from_json(data, schemas()), CATALOGUE, host) == []


def test_nothing_that_is_read_ends_in_another_error():
    """Values of a sound workflow, in both formats, replaced by what no editor writes: 1,000 of them, drawn by a seed."""
    odd: list[Any] = [None, True, -1, 1.5, "", "x", [], [1], [[]], {}, {"a": []}, "\ud800"]
    fixture = Path(__file__).parent.parent / "fixtures" / "workflows" / "1.58.1" / "subgraph-promoted.json"
    draw = random.Random(0)
    for text in (json.dumps(workflow()), fixture.read_text("utf-8")):
        places = _places(json.loads(text))
        for place in draw.choices(places, k=500):
            data = json.loads(text)
            _put(data, place, draw.choice(odd))
            try:
                graph_from_json(data, schemas()).order()
            except UserError as error:
                assert error.problems


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where containers and what stands in them lie; of long lists the first two."""
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:2]
        if isinstance(value, list)
        else []
    )
    return [place for key, item in items for place in [(*path, key), *_places(item, (*path, key))]]


def _put(data: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value
