"""Takes docs/images/live.png and sidebar.png, a run on its node and in the sidebar: `python tests/comfyui/run_images.py`

A real ComfyUI trains the demo for some minutes (scenario `views` of live.mjs). Look at the images afterwards.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from PIL import Image
from refresh import PROJECT, WORKFLOWS, load_module

NAMES = ("live", "sidebar")


def main() -> None:
    comfyui = load_module(Path(__file__).with_name("conftest.py"))
    vars(comfyui)["RUN_SECONDS"] = 3600
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, tempfile.TemporaryDirectory() as folder:
        vars(comfyui)["ARTIFACTS"] = Path(folder)
        server = comfyui.start(comfyui.root_of(*comfyui.CURRENT), Path(base))
        try:
            workflow = json.loads((WORKFLOWS / "first-lora.json").read_text("utf-8"))
            print(comfyui.open_page(server).live("views", workflow)["state"])
        finally:
            server.stop()
        for name in NAMES:
            with Image.open(Path(folder, "views", f"{name}.png")) as opened:
                opened.convert("RGB").save(PROJECT / "docs" / "images" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
