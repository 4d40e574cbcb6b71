"""What ComfyUI's own package quantizes is decoded here to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.models.loading.weights import Kind, Weights
from safetensors.torch import load_file

from .conftest import CURRENT, root_of, skip_loudly

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    python = root_of(*CURRENT) / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    file = tmp_path_factory.mktemp("quantized") / "weights.safetensors"
    script = Path(__file__).with_name("quantize_weights.py")
    command = [str(python) if python.is_file() else sys.executable, str(script), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'comfy_kitchen'" in done.stderr:
        skip_loudly("this ComfyUI has no comfy_kitchen")
    assert done.returncode == 0, done.stderr
    return file


@pytest.mark.parametrize("form", ["int8_tensorwise", "int8_rows", "int8_rotated", "mxfp8", "nvfp4", "convrot_w4a4"])
def test_the_same_bits(quantized, form):
    weights = Weights([quantized], Kind("test", (f"{form}.weight",)))
    ours, theirs = weights.read(f"{form}.weight"), load_file(quantized)[f"{form}.decoded"]
    assert weights.shape(f"{form}.weight") == theirs.shape == (160, 192) and theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
    rows = slice(100, 150)
    torch.testing.assert_close(weights.read(f"{form}.weight", rows), theirs[rows])
