"""ComfyUI's image outputs in a headless run: SaveImage writes files, PreviewImage does nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import Problem
from ..host import Notice, SinkHost
from ..runs.portable import portable
from ..spec import NodeSpec
from ..storage.atomic import replace_atomic
from ..storage.bounded_files import path_fault
from .graph import Graph, Link, Node

SAVERS = ("SaveImage", "PreviewImage")
NUMBER_BYTES = len("_00001_.png")  # added to the prefix of a file's name


def saver_problems(node: Node, graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[Problem]:
    """Return problems of a node that saves images, which would otherwise show only after the training."""
    problems = []
    images, prefix = node.inputs.get("images"), node.inputs.get("filename_prefix", "ComfyUI")
    source = graph.nodes[images.node] if isinstance(images, Link) else None
    if isinstance(images, Link) and source and source.type in catalogue:
        outputs = catalogue[source.type].outputs
        kind = outputs[images.slot].type if 0 <= images.slot < len(outputs) else "nothing"
        if kind != "IMAGE":
            message = f"receives {kind} from output {images.slot} of node {source.id} ({source.type}); connect images"
            problems.append(Problem("images", message))
    if not isinstance(prefix, str | Link):
        problems.append(Problem("filename_prefix", f"{repr(prefix)[:60]} is not a text; write a name"))
    elif isinstance(prefix, str) and (fault := path_fault(prefix + "x" * NUMBER_BYTES)):
        problems.append(Problem("filename_prefix", fault))
    return [problem.at(node.id, node.type) for problem in problems]


def save_images(images: Any, node: Node, host: SinkHost) -> None:
    """Save PNG files to the output folder, numbered like ComfyUI's.

    Args:
        images: List of (B, H, W, 3) in [0, 1].
        node: The SaveImage or PreviewImage node.
        host: Provides the output folder, and the prompt that is embedded in the files.
    """
    if node.type != "SaveImage" or not images:
        return
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", json.dumps(portable(dict(host.prompt), host.paths)))
    prefix = str(node.inputs.get("filename_prefix", "ComfyUI")).replace("\\", "/")
    target = (host.paths.output / prefix).resolve()
    if not target.is_relative_to(host.paths.output.resolve()):
        host.emit(
            Notice(f"node {node.id} (SaveImage): {prefix!r} is outside the output folder; nothing is saved", "warning")
        )
        return
    counter = 1
    for image in (image for batch in images for image in batch):
        pixels = (image.clamp(0, 1) * 255).round().byte().numpy()
        while (path := target.with_name(f"{target.name}_{counter:05}_.png")).exists():
            counter += 1
        replace_atomic(
            path, lambda temporary, pixels=pixels: Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)
        )
        host.emit(Notice(f"saved {path}"))
