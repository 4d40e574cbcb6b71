"""ComfyUI's image outputs in a headless run: SaveImage writes files, PreviewImage does nothing."""

from __future__ import annotations

import json
from typing import Any

from ..host import Notice, SinkHost
from ..storage.atomic import replace_atomic
from .graph import Node

SAVERS = ("SaveImage", "PreviewImage")


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
    info.add_text("prompt", json.dumps(dict(host.prompt)))
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
