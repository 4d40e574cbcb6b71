"""Saves the shipped workflows anew, as a real ComfyUI's page saves and draws them: `python tests/comfyui/refresh.py [NAME ...]`

For each workflows/NAME.json: the page loads it, runs it to its end where the small model is enough for that, and writes workflows/NAME.json,
its API export workflows/api/NAME.json and its thumbnail workflows/NAME.jpg; first-lora also gives docs/images/graph.png. Look at the pictures afterwards.
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
README_PICTURE = ("first-lora", PROJECT / "docs" / "images" / "graph.png")


def fixtures() -> ModuleType:
    """conftest.py as a module: pytest's tests have no package to import it from."""
    spec = importlib.util.spec_from_file_location("comfyui_fixtures", HERE / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def refresh(page: Any, name: str, folder: Path) -> None:
    source = WORKFLOWS / f"{name}.json"
    saved = page("prompt", source, folder / f"{name}.json")
    saved["workflow"]["extra"].pop("ds", None)  # where somebody looked at last
    _write(source, saved["workflow"])
    _write(WORKFLOWS / "api" / f"{name}.json", saved["prompt"])
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


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    comfyui = fixtures()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, tempfile.TemporaryDirectory() as folder:
        server = comfyui.start(comfyui.root_of(*comfyui.CURRENT), Path(base))
        for file in FILES:
            path = Path(base) / "models" / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        try:
            for name in names:
                refresh(comfyui.open_page(server), name, Path(folder))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
