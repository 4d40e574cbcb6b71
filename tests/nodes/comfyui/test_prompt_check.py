"""Every problem of a queued prompt, on its node, before the first node runs."""

from __future__ import annotations

import asyncio
import threading

import pytest
from chroma_trainer.nodes import ALL_NODES, CATALOGUE
from chroma_trainer.nodes.comfyui.prompt_check import (
    asking_page,
    message_of,
    problems_of,
    remember,
    reported_field,
    text_of,
)
from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost


@pytest.fixture
def host(tmp_path):
    return lambda: SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache", datasets=(tmp_path, ASSETS)))


def prompt(**changes) -> dict:
    """A sound graph of the embedded model, with other nodes' parts in it. changes: inputs by class."""
    graph = {
        "1": {"class_type": "LoadChroma", "inputs": {"flavour": "nano", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "neon-emoji", "resolution": "64"}},
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": ["8", 0], "resolutions": "64x64"}},
        "5": {
            "class_type": "LoRATrainer",
            "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], "name": "one", "steps": 30},
        },
        "8": {"class_type": "SomebodysText", "inputs": {"text": "a cat"}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    for node in graph.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    return graph


def ask(graph, host, *nodes: str) -> dict[str, list[str]]:
    async def validate():
        remember({"prompt": graph}, host)
        return {node: [problem.field for problem in await problems_of(node)] for node in nodes}

    return asyncio.run(validate())


def test_a_sound_prompt_with_nodes_of_other_packs(host):
    assert ask(prompt(), host, "1", "3", "4", "5") == {"1": [], "3": [], "4": [], "5": []}


def test_four_faults_in_one_graph(host):
    """Those that ComfyUI finds itself (rank) are left to it: it would say them twice."""
    faults = {
        "LoadChroma": {"flavour": "local", "folder": "nowhere"},
        "DatasetBackend": {"folder": "no-such-folder", "min_size": 64, "captions": "instance prompt"},
        "ValidateSampler": {"resolutions": "63x64"},
        "LoRATrainer": {"name": "con", "rank": 0, "learning_rate": 0.0, "steps": 0},
    }
    problems = ask(prompt(**faults), host, "1", "3", "4", "5")
    assert problems["1"] and problems["4"] == ["resolutions"]
    assert set(problems["3"]) == {"folder", "instance_prompt"}
    assert problems["5"] == ["name", "steps", "learning_rate"]


def test_a_fault_behind_a_fault(host):
    """The second dataset is checked, though the first one, which it continues, is not there."""
    graph = prompt(DatasetBackend={"folder": "nowhere"})
    graph["2"] = {"class_type": "DatasetBackend", "inputs": {"folder": "missing", "resolution": 64}}
    graph["3"]["inputs"]["dataset"] = ["2", 0]
    assert ask(graph, host, "2", "3", "5") == {"2": ["folder"], "3": ["folder"], "5": []}


def test_one_check_for_all_nodes_in_a_thread_of_its_own(host):
    """The server answers other requests meanwhile; and two prompts at the same time don't meet."""
    calls = []

    def counted():
        calls.append(threading.current_thread())
        return host()

    async def validate(folder):
        remember({"prompt": prompt(DatasetBackend={"folder": folder})}, counted)
        await asyncio.sleep(0)
        return [problem.field for node in "135" for problem in await problems_of(node)]

    async def both():
        return await asyncio.gather(validate("neon-emoji"), validate("nowhere"))

    assert asyncio.run(both()) == [[], ["folder"]]
    assert len(calls) == 2 and threading.main_thread() not in calls


def test_two_trainers_of_one_name(host):
    graph = prompt()
    graph["6"] = {"class_type": "LoRATrainer", "inputs": {**graph["5"]["inputs"], "name": "ONE.safetensors"}}
    assert ask(graph, host, "5", "6") == {"5": [], "6": ["name"]}
    graph["6"]["inputs"]["name"] = "two"
    assert ask(graph, host, "5", "6") == {"5": [], "6": []}
    graph["5"]["inputs"]["name"] = graph["6"]["inputs"]["name"] = ["8", 0]  # known to ComfyUI alone
    assert ask(graph, host, "5", "6") == {"5": [], "6": []}


@pytest.mark.parametrize(
    "broken", [None, [], {}, {"1": 3}, {"1": {"class_type": "LoadChroma", "inputs": {"repo": ["7", 0]}}}]
)
def test_what_is_no_graph_is_left_to_comfyui(host, broken):
    assert ask(broken, host, "1") == {"1": []}


def test_a_fault_of_the_check_stops_no_prompt():
    def broken():
        raise RuntimeError("no such folder")

    assert ask(prompt(), broken, "5") == {"5": []}


def test_how_comfyui_shows_them(host):
    spec = CATALOGUE["DatasetBackend"]
    assert reported_field(spec) == "folder"
    graph = prompt(DatasetBackend={"folder": "", "captions": "instance prompt"})

    async def validate():
        remember({"prompt": graph}, host)
        return text_of(await problems_of("3"), spec)

    lines = asyncio.run(validate()).splitlines()
    assert lines[0].startswith("is empty; enter the name") and lines[1].startswith("instance_prompt: is empty")


def test_what_the_page_is_told(host):
    """Every problem with the name of its field: the page itself names the reported field alone."""
    graph = prompt(LoRATrainer={"targets": "nothing.*", "warmup_steps": 31})

    async def validate():
        remember({"prompt": graph, "client_id": "a-page"}, host)
        return asking_page(), message_of("5", await problems_of("5"))

    page, message = asyncio.run(validate())
    assert page == "a-page" and message["node"] == "5"
    assert [field for field, _ in message["problems"]] == ["warmup_steps", "targets"]

    async def without_a_page():
        remember({"prompt": graph}, host)
        return asking_page()

    assert asyncio.run(without_a_page()) == ""


@pytest.mark.parametrize("spec", ALL_NODES.values(), ids=lambda spec: spec.id)
def test_every_node_has_a_field_to_report_at(spec):
    """Also one without widgets: an error here would keep ComfyUI from loading the whole pack."""
    field = next(field for field in spec.fields() if field.name == reported_field(spec))
    assert field.is_widget or not any(other.is_widget for other in spec.fields())
