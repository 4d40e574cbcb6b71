"""Saves the shipped workflows anew, as a real ComfyUI's page saves and draws them: `python tests/comfyui/refresh.py [--files] [NAME ...]`

For each workflows/NAME.json: the page loads it, runs it to its end where the small model is enough for that, and writes workflows/NAME.json,
its API export workflows/api/NAME.json and its thumbnail workflows/NAME.jpg; first-lora also gives docs/images/graph.png. Look at the pictures afterwards.
--files: without runs and pictures, for fields that are new.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
WORKFLOWS = PROJECT / "workflows"
THUMBNAIL = (640, 640)  # pixels, at most
FILES = ("diffusion_models/Chroma1-HD", "text_encoders/t5xxl_fp16", "vae/ae")  # that the page shall find, not load
RUN = ("first-lora", "compare-checkpoints")  # the others want Chroma in full size
TALL = {"LoRATrainer": 1060, "PreviewImage": 560}  # height for the live panel, and for a grid
DRAWING = 680  # of a ValidateSampler that shows its pictures under its fields
GAP, MARGIN = 50, 30  # pixels: between nodes, where the title needs its place; within groups
README_PICTURE = ("first-lora", PROJECT / "docs" / "images" / "graph.png")


def fixtures() -> ModuleType:
    """conftest.py as a module: pytest's tests have no package to import it from."""
    spec = importlib.util.spec_from_file_location("comfyui_fixtures", HERE / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def refresh(page: Any, name: str, folder: Path, draws: bool) -> None:
    source = WORKFLOWS / f"{name}.json"
    saved = page("prompt", source, folder / f"{name}.json")
    saved["workflow"]["extra"].pop("ds", None)  # where somebody looked at last
    tidy(saved["workflow"])
    _write(source, saved["workflow"])
    _write(WORKFLOWS / "api" / f"{name}.json", saved["prompt"])
    if not draws:
        return
    if name in RUN:
        ended = page("run", source, folder / "run.json")
        assert ended["end"] == "execution_success", ended
    else:
        page("screenshot", source, folder / "run.png")
    with Image.open(folder / "run.png") as opened:
        picture = opened.convert("RGB")
    if name == README_PICTURE[0]:
        README_PICTURE[1].parent.mkdir(parents=True, exist_ok=True)
        picture.quantize(128).save(README_PICTURE[1], optimize=True)
    picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=85)


def tidy(workflow: dict[str, Any]) -> None:
    """Close up what stands below one another in a group, fit each group around its nodes, and what stands below a group to it."""
    nodes = workflow["nodes"]
    groups = [(group, [node for node in nodes if _inside(node, group["bounding"])]) for group in workflow["groups"]]
    for node in nodes:
        draws = any(slot["name"] == "lora" and slot.get("link") is not None for slot in node.get("inputs", ()))
        node["size"][1] = max(node["size"][1], DRAWING if draws else TALL.get(node["type"], 0))
    grouped = [node for _, inside in groups for node in inside]
    for column in {node["pos"][0] for node in grouped}:
        free = None
        for node in sorted((n for n in grouped if n["pos"][0] == column), key=lambda n: n["pos"][1]):
            node["pos"][1] = node["pos"][1] if free is None else free
            free = node["pos"][1] + node["size"][1] + GAP
    below = {
        id(node): [group for group, _ in groups if _is_below(node, group["bounding"])]
        for node in nodes
        if node not in grouped
    }
    bottom = max((n["pos"][1] + n["size"][1] for n in grouped), default=0) + MARGIN
    for group, inside in groups:
        x, y, width, _ = group["bounding"]
        own = max(n["pos"][1] + n["size"][1] for n in inside) + MARGIN
        alone = not any(x <= n["pos"][0] < x + width and n not in inside for n in nodes)
        group["bounding"] = [x, y, width, (bottom if alone else own) - y]
    for node in nodes:
        if above := below.get(id(node)):
            node["pos"][1] = max(group["bounding"][1] + group["bounding"][3] for group in above) + GAP


def _is_below(node: dict[str, Any], box: list[float]) -> bool:
    (left, top), (x, y, width, height) = node["pos"], box
    return top >= y + height - GAP and left < x + width and x < left + node["size"][0]


def _inside(node: dict[str, Any], box: list[float]) -> bool:
    (left, top), (x, y, width, height) = node["pos"], box
    return x <= left < x + width and y <= top < y + height


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    draws = "--files" not in sys.argv
    names = [word for word in sys.argv[1:] if word != "--files"] or sorted(
        path.stem for path in WORKFLOWS.glob("*.json")
    )
    comfyui = fixtures()
    comfyui.RUN_SECONDS = 1800  # a training to its end
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, tempfile.TemporaryDirectory() as folder:
        server = comfyui.start(comfyui.root_of(*comfyui.CURRENT), Path(base))
        for file in FILES:
            path = Path(base) / "models" / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        try:
            for name in names:
                refresh(comfyui.open_page(server), name, Path(folder), draws)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
