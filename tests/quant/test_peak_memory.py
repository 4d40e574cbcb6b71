"""The full weights never lie in memory together: peak memory of a process that loads a quantised base, beside one that does it at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.families.chroma_transformer import ChromaTransformer
from safetensors.torch import save_file

CONFIG = {
    "in_channels": 64, "num_layers": 12, "num_single_layers": 24, "attention_head_dim": 64, "num_attention_heads": 8,
    "joint_attention_dim": 64, "axes_dims_rope": [16, 24, 24], "approximator_num_channels": 64,
    "approximator_hidden_dim": 64, "approximator_layers": 2,
}  # fmt: skip

CHILD = """
import gc, json, sys
from pathlib import Path
import torch
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.families.chroma import ChromaFamily
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.quant import cache
from chroma_trainer.trainer_core.quant.loading import load_base
from chroma_trainer.trainer_core.quant.quanto import Int8Quanto

def kilobytes(name):  # not getrusage: its peak starts with that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
folder, cached, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
cache.SHARD_BYTES = 8 << 20
model = ModelConfig("chroma", "wide", str(folder), dtype="bf16", quantization=QuantizationConfig("int8-quanto", "cpu"))
host = SinkHost(paths=Paths(output=cached, cache=cached), sinks=(), device="cpu")
family = ChromaFamily()
Int8Quanto().layer(torch.nn.Linear(512, 512))
family.empty_transformer(model)
gc.collect()
resident = kilobytes("VmRSS")
if way == "at once":
    base = Int8Quanto().quantize_(family.load_transformer(model), family.full_precision)
else:
    base = load_base(family, model, host, torch.device("cpu"))
held = sum(p.numel() * p.element_size() for p in base.parameters())
print(json.dumps({"held": held, "peak": 1024 * (kilobytes("VmHWM") - resident)}))
"""


STATUS = Path("/proc/self/status").read_text(encoding="utf-8") if sys.platform.startswith("linux") else ""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Chroma of 151 million weights in bf16: 300 MB in small layers, so that one layer weighs little."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "transformer").mkdir()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ChromaTransformer.from_config(CONFIG).state_dict().items()}
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    state = {
        name: pattern.repeat(-(-shape.numel() // len(pattern)))[: shape.numel()].reshape(shape).clone()
        for name, shape in shapes.items()
    }
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.mark.skipif("VmHWM" not in STATUS, reason="this kernel doesn't say the peak of a process")
def test_peak_memory(wide: Path, tmp_path: Path):
    full = (wide / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size

    def measure(way: str) -> dict[str, int]:
        command = [sys.executable, "-c", CHILD, str(wide), str(tmp_path), way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    once, by_layer, cached = (measure(way) for way in ("at once", "by layer", "cached"))
    print({"full": full, "at once": once, "by layer": by_layer, "cached": cached})
    held = by_layer["held"]
    assert 0.49 * full < held < 0.53 * full and cached["held"] == once["held"] == held
    limit = 0.6 * (full + held)
    assert once["peak"] > limit  # the limit means something
    assert by_layer["peak"] < limit  # though it writes the cache meanwhile
    assert cached["peak"] < 1.2 * held
