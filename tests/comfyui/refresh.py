"""Saves the shipped workflows anew, as a real ComfyUI's page saves and draws them: `python tests/comfyui/refresh.py [--files] [NAME ...]`

For each workflows/NAME.json: the page loads it, runs it to its end where the small model is enough for that, and writes workflows/NAME.json,
its API export workflows/api/NAME.json and its thumbnail workflows/NAME.jpg, where no tool makes one of a result; first-lora also gives docs/images/graph.png, and two give
js/docs/images/NAME.jpg. Look at the pictures afterwards.
--files: without runs and pictures, for fields that are new.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
WORKFLOWS = PROJECT / "workflows"
THUMBNAIL_TOOLS = [
    (PROJECT / "tools" / "result_images.py", "THUMBNAILS"),
    (PROJECT / "tools" / "feature_thumbnails.py", "TEMPLATES"),
]
THUMBNAIL = (640, 640)  # pixels, at most
FILES = ("diffusion_models/Chroma1-HD", "text_encoders/t5xxl_fp16", "vae/ae")  # that the page shall find, not load
RUN = ("quick-lora", "first-lora", "compare-checkpoints")  # the others want Chroma in full size
GAP, APART, MARGIN, TITLE = 26, 50, 16, 30  # pixels: between nodes, between groups, within groups, and a node's title
HEIGHTS = {"PreviewImage": 470, "SaveImage": 470, "LossGraphNode": 300, "CLIPTextEncode": 130}  # where more than needed

# Columns from left to right: width, and the nodes from top to bottom, a note with its height. A group holds this many
# columns. A ValidateSampler that samples has room for its image. Together they are small enough to be read at 65 % of a window of 1600 x 1000 (test_page.py).
LAYOUTS: dict[str, tuple[list[tuple[int, list[Any]]], tuple[int, ...]]] = {
    "first-lora": (
        [(310, [(8, 500), 1, 2]), (300, [9, 3]), (300, [(4, 700)]), (370, [5]), (330, [(6, 776), (7, 240)])],
        (2, 2, 1),
    ),
    "compare-checkpoints": ([(330, [(7, 280), (8, 300), 1]), (320, [2, 3]), (380, [4]), (440, [(5, 780), (6, 300)])], ()),
    "first-flux-lora": ([(340, [(7, 400), 1, 2]), (330, [3, 4]), (390, [5]), (360, [6])], ()),
    "caption-then-train": (
        [(340, [(9, 400), (10, 400)]), (320, [1, 2]), (320, [(3, 150), 4, (6, 150)]), (340, [(5, 400), 7]), (360, [8])],
        (),
    ),
    "quick-lora": ([(360, [(2, 420)]), (400, [1]), (520, [(3, 560)])], ()),
    "low-vram": ([(340, [(7, 380), 1, 2]), (340, [3, 4]), (390, [5]), (360, [(8, 250), 6])], ()),
    "style-with-regularisation": (
        [(300, [(9, 320), 1, 2]), (300, [3, 4]), (300, [(10, 250), 5]), (370, [6]), (350, [(7, 780), (8, 300)])],
        (),
    ),
    "train-then-sample": (
        [
            (310, [(17, 300), 1, 2]), (310, [3, (18, 280)]), (370, [4]), (300, [5, 7, 8, 12, 13, 6]),
            (310, [9, 10, 11, 14, 15]), (340, [16]),
        ],
        (),
    ),
    "adaptive-guider": (
        [(320, [(16, 290), 1, 3, 4, 8]), (340, [2, 5, 6, 7]), (340, [(17, 250), 9, 10, 11, 12]), (400, [13, 14, 15])],
        (),
    ),
    "full-rank": ([(340, [(1, 480), 2, 3]), (340, [4, 5, (9, 300)]), (370, [6]), (390, [7]), (340, [8])], ()),
    "kontext-pairs": ([(350, [(1, 480), 2, 3]), (350, [4, (7, 380)]), (390, [5]), (340, [6])], ()),
    "merge-loras": ([(340, [(1, 440), 2, 3]), (340, [4, 5, (9, 320)]), (340, [6, (7, 300)]), (460, [(8, 470)])], ()),
}  # fmt: skip
README_PICTURE = ("first-lora", PROJECT / "docs" / "images" / "graph.png")
HELP_PICTURES = ("adaptive-guider", "train-then-sample")  # on the help pages of nodes (docs/nodes/tips)
HELP_SIZE = (960, 960)  # pixels, at most


def load_module(path: Path) -> ModuleType:
    """A file as a module: conftest.py and tools/ have no package to import them from."""
    spec = importlib.util.spec_from_file_location(f"refresh_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def refresh(server: Any, page: Any, name: str, folder: Path, draws: bool) -> None:
    source = WORKFLOWS / f"{name}.json"
    workflow = json.loads(source.read_text("utf-8"))
    widths = {
        entry[0] if isinstance(entry, tuple) else entry: width for width, ids in LAYOUTS[name][0] for entry in ids
    }
    for node in workflow["nodes"]:
        node["size"][0] = widths[node["id"]]
    _write(source, workflow)
    arrange(workflow, name, measure(server, page, source, folder))
    _write(source, workflow)
    saved = page("prompt", source, folder / f"{name}.json")
    saved["workflow"]["extra"].pop("ds", None)  # where somebody looked at last
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
    if name in HELP_PICTURES:
        on_page = picture.copy()
        on_page.thumbnail(HELP_SIZE, Image.Resampling.LANCZOS)
        on_page.save(PROJECT / "js" / "docs" / "images" / f"{name}.jpg", quality=85)
    if not any(name in getattr(load_module(path), table) for path, table in THUMBNAIL_TOOLS):
        picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
        picture.save(WORKFLOWS / f"{name}.jpg", quality=85)


def arrange(workflow: dict[str, Any], name: str, heights: Mapping[str, tuple[int, int]]) -> None:
    """Place the nodes in their columns, so that they lie apart as nodes of either kind, and the groups around them.

    heights: of each node, by id: on the canvas, and with its title as the taller of both kinds, while trainers show a run.
    """
    columns, groups = LAYOUTS[name]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    first_of_group = {sum(groups[:i]) for i in range(len(groups))}
    left, boxes = 40.0, []
    for i, (width, ids) in enumerate(columns):
        left += APART - GAP if i in first_of_group and i else 0
        top = 56.0 if groups else 40.0
        for entry in ids:
            node_id, height = entry if isinstance(entry, tuple) else (entry, 0)
            node = nodes[node_id]
            own, tallest = heights[str(node_id)]
            height = height or max(own, HEIGHTS.get(node["type"], 0))
            node["pos"], node["size"] = [left, top + TITLE], [width, height]
            top += max(height + TITLE, tallest) + GAP
        boxes.append((left, left + width, top - GAP))
        left += width + GAP
    bottom = max(box[2] for box in boxes) + MARGIN
    for group, start, num in zip(workflow["groups"], sorted(first_of_group), groups, strict=True):
        x = boxes[start][0] - MARGIN
        right = boxes[start + num - 1][1] + MARGIN
        group["bounding"] = [x, 0, right - x, bottom]


def measure(server: Any, page: Any, source: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """The heights that arrange() wants."""
    boxes = {}
    for kind in ("classic", "vue"):
        server.post("/settings/Comfy.VueNodes.Enabled", kind == "vue")
        boxes[kind] = page("least", source, folder / f"{kind}.json")
    server.post("/settings/Comfy.VueNodes.Enabled", False)
    return {
        node_id: (height, max(tallest, boxes["vue"][node_id][1]))
        for node_id, (height, tallest) in boxes["classic"].items()
    }


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    draws = "--files" not in sys.argv
    names = [word for word in sys.argv[1:] if word != "--files"] or sorted(
        path.stem for path in WORKFLOWS.glob("*.json")
    )
    comfyui = load_module(HERE / "conftest.py")
    vars(comfyui)["RUN_SECONDS"] = 1800  # a training to its end
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, tempfile.TemporaryDirectory() as folder:
        server = comfyui.start(comfyui.root_of(*comfyui.CURRENT), Path(base))
        for file in FILES:
            path = Path(base) / "models" / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        try:
            for name in names:
                refresh(server, comfyui.open_page(server), name, Path(folder), draws)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
