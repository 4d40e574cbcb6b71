"""ComfyUI's own Radiance says what ours says, and loads every key of a LoRA of ours."""

from __future__ import annotations

import json
import re

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.models.radiance.family import RadianceFamily
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_RADIANCE, radiance_model, write_tiny_radiance

pytestmark = pytest.mark.comfyui
FAMILY = RadianceFamily()
VARIANTS = {
    "linear": {},
    "conv": {"conv_head": True},
    "x0": {"conv_head": True, "x0": True},
    "sequential": {"conv_head": True, "x0": True, "sequential": True},
}


@pytest.fixture
def base(tmp_path, tiny_chroma):
    def write(**variant):
        file = tmp_path / "radiance.safetensors"
        write_tiny_radiance(file, **variant)
        inputs = {"config": json.dumps(TINY_RADIANCE), "weights": str(file)}
        return {"class_type": "ProbeRadiance", "inputs": inputs}, FAMILY.load_transformer(
            radiance_model(file, tiny_chroma)
        )

    return write


@pytest.mark.parametrize("name", VARIANTS)
def test_comfyuis_radiance_says_what_ours_says(comfyui, base, tmp_path, name):
    draw = torch.Generator().manual_seed(2)
    x, sigma = torch.randn(2, 3, 64, 48, generator=draw), torch.tensor([0.37, 0.8])
    context = torch.randn(2, 9, 32, generator=draw)
    file = tmp_path / "given.safetensors"
    save_file({"x": x, "sigma": sigma, "context": context, "y": torch.zeros(2, 1), "guidance": torch.zeros(2)}, file)
    probe, transformer = base(**VARIANTS[name])
    output = f"radiance-{name}"
    inputs = {"model": ["base", 0], "file": str(file), "name": output}
    comfyui.run({"base": probe, "velocity": {"class_type": "ProbeVelocity", "inputs": inputs}})
    theirs = load_file(comfyui.output / f"{output}.safetensors")["velocity"]
    with torch.no_grad():
        ours = FAMILY.predict(transformer, x, sigma, list(context))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["universal", "comfyui", "kohya"])
def test_comfyui_loads_every_key(comfyui, base, form):
    probe, transformer = base(conv_head=True, x0=True)
    targets = resolve_targets(transformer, FAMILY, "*")
    layers = inject_(transformer, targets, 4, 4.0, "default", torch.Generator().manual_seed(3))
    for _, parameter in trainable_parameters(layers):
        torch.nn.init.normal_(parameter)
    name = f"radiance-{form}.safetensors"
    saved = export_lora(layers, transformer, comfyui.output / "loras" / name, {}, form=form)
    inputs = {"model": ["base", 0], "lora_name": name, "strength_model": 1.0}
    history = comfyui.run({
        "base": probe,
        "loader": {"class_type": "LoraLoaderModelOnly", "inputs": inputs},
        "delta": {"class_type": "ProbeDelta", "inputs": {"model": ["loader", 0], "name": f"radiance-{form}"}},
    })  # fmt: skip
    (num_patches,) = history["outputs"]["delta"]["patches"]
    modules = {re.sub(r"\.(lora_|alpha).*", "", key) for key in load_file(comfyui.output / "loras" / name)}
    assert num_patches == len(modules) and saved.applied == saved.num_keys
    assert len(layers) == len(targets) and not re.findall(r"lora key not loaded: \S+", comfyui.log)
    deltas = load_file(comfyui.output / f"radiance-{form}.safetensors")
    assert all(delta.abs().max() > 1e-3 for delta in deltas.values())
