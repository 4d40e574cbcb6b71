"""Write nodes as ComfyUI's editor saves them, placed in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...spec import Field, NodeSpec

COLUMNS = {
    "MarkdownNote": 0,
    "LoadChroma": 1,
    "LoadFlux": 1,
    "QuantizeModel": 1,
    "DatasetBackend": 2,
    "AdapterSettings": 3,
    "OptimizerSettings": 3,
    "MemorySettings": 3,
    "ValidateSampler": 4,
    "LoRATrainer": 5,
}
WIDTHS = (420, 340, 340, 340, 400, 400)
MARGIN, GAP, TITLE, ROW = 40, 40, 30, 24  # pixels
MULTILINE_HEIGHT, NOTE_HEIGHT = 150, 560


@dataclass
class Canvas:
    """The workflow so far.

    Args:
        nodes: its nodes.
        links: its links, as [id, node, output, node, input, type].
        bottoms: lower end of each column, in pixels.
    """

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    bottoms: list[float] = field(default_factory=lambda: [float(MARGIN)] * len(WIDTHS))

    def add(self, kind: str, height: int, **content: Any) -> dict[str, Any]:
        """Add a node at the end of its column."""
        column = COLUMNS[kind]
        left = MARGIN + sum(width + GAP for width in WIDTHS[:column])
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [left, self.bottoms[column] + TITLE],
            "size": [WIDTHS[column], height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            **content,
        }
        self.bottoms[column] += height + TITLE + GAP
        self.nodes.append(node)
        return node

    def add_ours(self, spec: NodeSpec, values: Mapping[str, Any], title: str = "") -> dict[str, Any]:
        """Add a node of this pack, with the values of new nodes where `values` has none."""
        widgets = [item for item in spec.fields() if item.is_widget]
        named: dict[str, Any] = {}
        for item in widgets:
            named[item.name] = values.get(item.name, item.initial)
            if item.seed:
                named["control_after_generate"] = "fixed"
        sockets = [item for item in spec.fields() if item.socket]
        lines = sum(MULTILINE_HEIGHT if item.text and item.text.multiline else ROW for item in widgets)
        return self.add(
            spec.id,
            lines + ROW * max(len(sockets), len(spec.outputs)) + GAP,
            **({"title": title} if title else {}),
            inputs=[_input_of(item) for item in sockets],
            outputs=[{"name": output.name, "type": output.type, "links": []} for output in spec.outputs],
            properties={"Node name for S&R": spec.id},
            widgets_values=list(named.values()),
            widgets_values_named=named,
        )

    def connect(self, source: dict[str, Any], output: str, target: dict[str, Any], socket: str) -> None:
        slot = next(i for i, item in enumerate(source["outputs"]) if item["name"] == output)
        place = next(i for i, item in enumerate(target["inputs"]) if item["name"] == socket)
        link, kind = len(self.links) + 1, source["outputs"][slot]["type"]
        source["outputs"][slot]["links"].append(link)
        target["inputs"][place]["link"] = link
        self.links.append([link, source["id"], slot, target["id"], place, kind])

    def as_json(self) -> dict[str, Any]:
        """Return the workflow. Columns without nodes take no room."""
        used = {COLUMNS[node["type"]] for node in self.nodes}
        for node in self.nodes:
            empty = [width for i, width in enumerate(WIDTHS[: COLUMNS[node["type"]]]) if i not in used]
            node["pos"][0] -= sum(empty) + GAP * len(empty)
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _input_of(item: Field) -> dict[str, Any]:
    assert item.socket
    optional = {} if item.required else {"shape": 7}
    return {"name": item.name, **optional, "type": item.socket.type, "link": None}


def editor_workflow(
    nodes: Mapping[str, Mapping[str, Any]],
    folders: Sequence[Mapping[str, Any]],
    catalogue: Mapping[str, NodeSpec],
    note: str,
) -> dict[str, Any]:
    """Return the workflow of a training run, as ComfyUI's editor saves it.

    Args:
        nodes: node type -> values. LoRATrainer and one loader are among them.
        folders: values of each DatasetBackend, which are chained.
        catalogue: the nodes by type.
        note: Markdown text of a note beside the nodes.
    """
    canvas = Canvas()
    canvas.add("MarkdownNote", NOTE_HEIGHT, title="Read me", widgets_values=[note])
    loader = next(kind for kind in nodes if COLUMNS[kind] == 1 and kind != "QuantizeModel")
    model = canvas.add_ours(catalogue[loader], nodes[loader])
    if "QuantizeModel" in nodes:
        quantized = canvas.add_ours(catalogue["QuantizeModel"], nodes["QuantizeModel"])
        canvas.connect(model, "model", quantized, "model")
        model = quantized
    dataset: dict[str, Any] | None = None
    for i, values in enumerate(folders):
        title = f"Dataset {i + 1}" if len(folders) > 1 else ""
        backend = canvas.add_ours(catalogue["DatasetBackend"], values, title)
        if dataset:
            canvas.connect(dataset, "dataset", backend, "dataset")
        dataset = backend
    settings = ("ValidateSampler", "AdapterSettings", "OptimizerSettings", "MemorySettings")
    parts = [canvas.add_ours(catalogue[kind], nodes[kind]) for kind in settings if kind in nodes]
    trainer = canvas.add_ours(catalogue["LoRATrainer"], nodes["LoRATrainer"])
    canvas.connect(model, "model", trainer, "model")
    assert dataset
    canvas.connect(dataset, "dataset", trainer, "dataset")
    for part in parts:
        output = "validation" if part["type"] == "ValidateSampler" else part["outputs"][0]["name"]
        canvas.connect(part, output, trainer, output)
    return canvas.as_json()
