"""CheckDataset in ComfyUI: its sheet is saved by ComfyUI's own node, and its text shown."""

from __future__ import annotations

import pytest
from PIL import Image

pytestmark = pytest.mark.comfyui


def test_the_report_and_the_sheet_reach_other_nodes(each_comfyui):
    prompt = {
        "data": {"class_type": "DatasetBackend", "inputs": {"folder": "plain-emoji", "resolution": 64}},
        "check": {"class_type": "CheckDataset", "inputs": {"dataset": ["data", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["check", 1], "filename_prefix": "sheet"}},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["check", 0]}},
    }
    history = each_comfyui.run(prompt)
    (file,) = history["outputs"]["save"]["images"]
    assert "56 of 56 images can be trained" in history["outputs"]["text"]["text"][0]
    with Image.open(each_comfyui.base / "output" / file["filename"]) as sheet:
        assert sheet.mode == "RGB" and sheet.width > 1000
