"""Each rule of reading the editor's format, on a document of a few nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.workflow.graph import Link, Schema, Widget
from chroma_trainer.trainer_core.workflow.read import graph_from_json, to_api

SCHEMAS = {
    "Paint": Schema(
        (Widget("seed", control=True), Widget("colour", default="red"), Widget("size", default=3)), "Paint!"
    ),
    "Source": Schema(()),
    "Pick": Schema(
        (
            Widget("kind", options={"a": (Widget("kind.x", default=1), Widget("kind.y", default=2)), "b": ()}),
            Widget("last", default=9),
        )
    ),
}


def node(node_id: Any, kind: str, values: Any = None, inputs: list | None = None, outputs: list | None = None, **more):
    slots = [dict(zip(("name", "type", "link"), slot, strict=True)) for slot in inputs or []]
    given = [{"name": name, "type": name} for name in outputs or []]
    return {"id": node_id, "type": kind, "widgets_values": values, "inputs": slots, "outputs": given, **more}


def read(nodes: list, links: Sequence = (), definitions: Sequence = ()) -> dict[str, dict[str, Any]]:
    """Inputs by node id."""
    data = {"nodes": nodes, "links": list(links), "version": 0.4, "definitions": {"subgraphs": list(definitions)}}
    return {key: dict(value.inputs) for key, value in graph_from_json(data, SCHEMAS).nodes.items()}


def test_values_by_position_after_a_control():
    assert read([node(1, "Paint", [5, "randomize", "blue", 7])]) == {"1": {"seed": 5, "colour": "blue", "size": 7}}


def test_missing_values_and_nulls_take_defaults():
    assert read([node(1, "Paint", [5, "fixed", None])]) == {"1": {"seed": 5, "colour": "red", "size": 3}}
    assert read([node(1, "Paint")]) == {"1": {"seed": None, "colour": "red", "size": 3}}


def test_a_list_written_by_hand_may_lack_the_control():
    assert read([node(1, "Paint", [5, "blue", 7])]) == {"1": {"seed": 5, "colour": "blue", "size": 7}}


def test_values_by_name():
    assert read([node(1, "Paint", {"size": 8, "seed": 1})]) == {"1": {"seed": 1, "colour": "red", "size": 8}}


def test_positions_win_over_names_as_in_the_page():
    paint = node(1, "Paint", [5, "fixed", "blue", 7], widgets_values_named={"seed": 6, "colour": "green", "size": 1})
    assert read([paint]) == {"1": {"seed": 5, "colour": "blue", "size": 7}}


def test_a_linked_widget_keeps_its_place():
    paint = node(1, "Paint", [5, "fixed", "blue", 7], [("colour", "COMBO", 1)])
    assert read([paint, node(2, "Source", outputs=["COMBO"])], [[1, 2, 0, 1, 0, "COMBO"]])["1"] == {
        "seed": 5,
        "colour": Link("2", 0),
        "size": 7,
    }


def test_dynamic_combo_brings_its_own_widgets():
    assert read([node(1, "Pick", ["a", 11, 12, 13])])["1"] == {"kind": "a", "kind.x": 11, "kind.y": 12, "last": 13}
    assert read([node(1, "Pick", ["b", 13])])["1"] == {"kind": "b", "last": 13}
    assert read([node(1, "Pick", {"kind": "a", "kind.x": 4})])["1"] == {
        "kind": "a",
        "kind.x": 4,
        "kind.y": 2,
        "last": 9,
    }


def test_links_count_by_id_not_by_target_slot():
    paint = node(1, "Paint", [5, "fixed", "blue", 7], [("extra", "A", None), ("size", "INT", 4)])
    links = [[4, 2, 1, 1, 0, "INT"]]
    assert read([paint, node(2, "Source", outputs=["A", "INT"])], links)["1"]["size"] == Link("2", 1)


def test_links_as_objects_and_texts_as_ids():
    paint = node("eins", "Paint", [5, "fixed", "blue", 7], [("size", "INT", "four")])
    link = {"id": "four", "origin_id": 2, "origin_slot": 0, "target_id": "eins", "target_slot": 0, "type": "INT"}
    assert read([paint, node(2, "Source", outputs=["INT"])], [link])["eins"]["size"] == Link("2", 0)


def test_the_title_is_the_types_own_until_renamed():
    data = {"nodes": [node(1, "Paint"), node(2, "Paint", title="Mine"), node(3, "Unknown")], "links": []}
    assert [n.title for n in graph_from_json(data, SCHEMAS).nodes.values()] == ["Paint!", "Mine", "Unknown"]


def test_set_and_get_nodes_are_a_line_by_name():
    nodes = [
        node(1, "Source", outputs=["INT"]),
        node(2, "SetNode", ["size"], [("INT", "INT", 1)], ["*"]),
        node(3, "GetNode", ["size"], [], ["INT"]),
        node(4, "GetNode", ["other"], [], ["INT"]),
        node(5, "Paint", [5, "fixed", "blue", 7], [("size", "INT", 2), ("colour", "COMBO", 3)]),
    ]
    found = read(nodes, [[1, 1, 0, 2, 0, "INT"], [2, 3, 0, 5, 0, "INT"], [3, 4, 0, 5, 1, "COMBO"]])
    assert found == {"1": {}, "5": {"seed": 5, "colour": "blue", "size": Link("1", 0)}}


def bypassed(inputs: list[tuple[str, str]], output: str, wanted: str) -> Any:
    """The source of a Paint's input behind a bypassed node whose n-th input comes from output n of node 9."""
    slots = [(name, kind, index + 1) for index, (name, kind) in enumerate(inputs)]
    links = [[index + 1, 9, index, 2, index, kind] for index, (_, kind) in enumerate(inputs)]
    source = node(9, "Source", outputs=[kind for _, kind in inputs])
    middle = node(2, "Whatever", None, slots, ["FIRST", output], mode=4)
    end = node(3, "End", None, [("in", wanted, 99)])
    return read([source, middle, end], [*links, [99, 2, 1, 3, 0, wanted]])["3"].get("in")


def test_bypass_prefers_the_opposite_slot_then_the_same_type_then_one_that_fits():
    assert bypassed([("a", "M"), ("b", "M")], "M", "M") == Link("9", 1)
    assert bypassed([("a", "M"), ("b", "X")], "M", "M") == Link("9", 0)
    assert bypassed([("a", "m,n"), ("b", "X")], "M", "M") == Link("9", 0)
    assert bypassed([("a", "X"), ("b", "Y")], "M", "M") is None
    assert bypassed([("a", "X"), ("b", "Y")], "M", "*") == Link("9", 1)
    assert bypassed([("a", "X")], "M", "*") == Link("9", 0)


def definition(key: str, nodes: list, links: list, inputs: Sequence = (), name: str = "Inside") -> dict[str, Any]:
    objects = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
        for link in links
    ]
    ends = [{"id": slot, "name": slot, "type": "*"} for slot in inputs]
    return {"id": key, "name": name, "nodes": nodes, "links": objects, "inputs": ends, "outputs": [{"name": "out"}]}


def painter(inputs: list) -> dict[str, Any]:
    """A Paint as node 1, whose named widgets come from the subgraph's inputs in order."""
    paint = node(1, "Paint", [5, "fixed", "blue", 7])
    paint["inputs"] = [
        {"name": name, "type": "*", "link": index + 1, "widget": {"name": name}} for index, name in enumerate(inputs)
    ]
    return paint


ENTRIES = [[1, -10, 0, 1, 0, "*"], [2, -10, 1, 1, 1, "*"]]


def test_an_instance_has_its_own_values():
    inside = definition("D", [painter(["seed", "size"])], ENTRIES, ["s", "z"])
    found = read([node(8, "D", [55, 66]), node(9, "D", [None, 77]), node(10, "D")], [], [inside])
    assert found["8:1"] == {"seed": 55, "colour": "blue", "size": 66}
    assert found["9:1"] == {"seed": 5, "colour": "blue", "size": 77}
    assert found["10:1"] == {"seed": 5, "colour": "blue", "size": 7}


def test_an_instance_may_hold_the_controls_value_too():
    inside = definition("D", [painter(["seed", "size"])], ENTRIES, ["s", "z"])
    assert read([node(8, "D", [55, "fixed", 66])], [], [inside])["8:1"] == {"seed": 55, "colour": "blue", "size": 66}


def test_the_instances_own_order_counts():
    inside = definition("D", [painter(["seed", "size"])], ENTRIES, ["s", "z"])
    host = node(8, "D", [66, 55], [("z", "INT", None), ("s", "INT", None)])
    assert read([host], [], [inside])["8:1"] == {"seed": 55, "colour": "blue", "size": 66}


def test_values_by_proxy():
    inside = definition("D", [painter(["seed", "size"])], ENTRIES, ["s", "z"])
    proxies = [["-1", "z"], ["1", "colour"], ["1", "seed"], ["1", "$$preview"], ["-1", "gone"]]
    host = node(8, "D", [66, "green", 55, "x", "y"], properties={"proxyWidgets": proxies})
    assert read([host], [], [inside])["8:1"] == {"seed": 55, "colour": "green", "size": 66}


def test_a_proxy_through_two_subgraphs():
    inner = definition("D", [painter(["seed", "size"])], ENTRIES, ["s", "z"])
    outer = definition("E", [node(3, "D")], [])
    proxies = [["3", "1: colour"], ["3", "z"]]
    host = node(8, "E", ["green", 66], properties={"proxyWidgets": proxies})
    assert read([host], [], [inner, outer])["8:3:1"] == {"seed": 5, "colour": "green", "size": 66}


def test_a_primitive_within_takes_the_instances_value():
    primitive = node(2, "PrimitiveNode", [7, "fixed"], [], ["INT"])
    paint = node(1, "Paint", [5, "fixed", "blue", 7], [("size", "INT", 1)])
    inside = definition("D", [primitive, paint], [[1, 2, 0, 1, 0, "INT"]])
    host = node(8, "D", [66], properties={"proxyWidgets": [["2", "value"]]})
    assert read([host], [], [inside])["8:1"]["size"] == 66


def test_a_subgraphs_input_leads_out_and_its_output_in():
    through = definition("D", [], [[1, -10, 0, -20, 0, "*"]], ["in"])
    nodes = [
        node(1, "Source", outputs=["INT"]),
        node(8, "D", None, [("in", "*", 1)], ["out"]),
        node(2, "Paint", [5, "fixed", "blue", 7], [("size", "INT", 2)]),
    ]
    assert read(nodes, [[1, 1, 0, 8, 0, "INT"], [2, 8, 0, 2, 0, "INT"]], [through])["2"]["size"] == Link("1", 0)


def test_foreign_values_are_named_where_the_file_accounts_for_all():
    slots = [{"name": name, "type": "INT", "link": None, "widget": {"name": name}} for name in ("noise_seed", "steps")]
    assert read([{"id": 1, "type": "F", "inputs": slots, "widgets_values": [3, "fixed", 20]}])["1"] == {
        "noise_seed": 3,
        "steps": 20,
    }
    assert read([{"id": 1, "type": "F", "inputs": slots, "widgets_values": [3, 20]}])["1"] == {
        "noise_seed": 3,
        "steps": 20,
    }
    assert read([{"id": 1, "type": "F", "inputs": slots, "widgets_values": [3, "fixed", 20, "more"]}])["1"] == {}
    named = {"noise_seed": 3, "control_after_generate": "fixed", "steps": 20}
    assert read([{"id": 1, "type": "F", "widgets_values": [1], "widgets_values_named": named}])["1"] == {
        "noise_seed": 3,
        "steps": 20,
    }


def test_braces_in_our_prompts_are_left_alone():
    """A prompt library is JSON, and the page does not draw from {a|b} in our fields (dynamic_prompts is off)."""
    for text in ('{"cat": "a cat | face"}', "a {red|blue} cat // not a comment"):
        data = {"nodes": [node(1, "ValidateSampler", [text])], "links": []}
        assert graph_from_json(data, schemas()).nodes["1"].inputs["prompts"] == text


def test_patterns_that_the_page_leaves_alone():
    for prefix in ("plain", "100%", "%width%x%height%", "%year%/a.b"):
        data = {"nodes": [node(1, "SaveImage", [prefix], [("images", "IMAGE", None)])], "links": []}
        assert graph_from_json(data, schemas()).nodes["1"].inputs["filename_prefix"] == prefix


def test_lists_are_wrapped_in_the_api_format():
    graph = graph_from_json(
        {"1": {"class_type": "A", "inputs": {"v": {"__value__": ["2", 0]}, "w": ["2", 0]}}, "2": {"class_type": "B"}},
        {},
    )
    assert graph.nodes["1"].inputs == {"v": ["2", 0], "w": Link("2", 0)}
    assert to_api(graph)["1"]["inputs"] == {"v": {"__value__": ["2", 0]}, "w": ["2", 0]}


def test_a_posted_body_is_read_as_well():
    body = {"client_id": "x", "prompt": {"1": {"class_type": "A", "inputs": {}}}}
    assert list(graph_from_json(body, {}).nodes) == ["1"]


def test_the_editors_json_is_kept():
    data = {"nodes": [node(1, "Paint")], "links": []}
    graph = graph_from_json(data, SCHEMAS)
    assert graph.source == "ui" and graph.workflow == data
    api = graph_from_json(to_api(graph), SCHEMAS)
    assert api.source == "api" and api.workflow is None and api.nodes == graph.nodes
