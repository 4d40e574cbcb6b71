"""ComfyUI lists the model of a full-rank run, and its own loader takes every tensor of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.full_rank.model_file import base_weights, write_transformer
from chroma_trainer.trainer_core.registry import load
from safetensors.torch import load_file

from .conftest import original_weights

pytestmark = pytest.mark.comfyui
WIDTH = 64
TARGETS = {"chroma": "all+ffs+embedder", "flux": "ai-toolkit,*_embedder*,proj_out,norm_out.linear"}


@pytest.mark.parametrize("name", ["chroma", "flux"])
def test_its_model_loader_takes_the_trained_weights(comfyui, request, name):
    family, model = load("family", name)(), replace(request.getfixturevalue(f"tiny_{name}_model"), dtype="bf16")
    transformer, draw = family.load_transformer(model), torch.Generator().manual_seed(3)
    names = resolve_targets(transformer, family, TARGETS[name])
    layers = inject_(transformer, names, 16, 16.0, config=AdapterConfig(kind="full"))
    with torch.no_grad():
        for _, parameter in trainable_parameters(layers):
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype) * 0.05)
    file = comfyui.output / "diffusion_models" / "styles" / f"{name}-full.safetensors"
    write_transformer(file, transformer, base_weights(model, family), {"prompt": "{}"})
    (listed, *_) = comfyui.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    assert f"styles/{name}-full.safetensors" in [path.replace("\\", "/") for path in listed]
    config = json.dumps(json.loads((Path(model.repo) / "transformer" / "config.json").read_text("utf-8")))
    inputs = {"config": config, "unet_name": f"styles/{name}-full.safetensors"}
    assert comfyui.run({"model": {"class_type": "ProbeLoadModel", "inputs": inputs}})["status"]["completed"]
    assert "unet unexpected" not in comfyui.log and "unet missing" not in comfyui.log
    loaded = load_file(comfyui.output / f"loaded-{name}-full.safetensors")
    plain = family.load_transformer(replace(model, transformer_file=str(file)))
    for key, tensor in original_weights(plain, WIDTH).items():
        other = loaded[key] if key in loaded else loaded[key.replace(".scale", ".weight")]
        assert torch.equal(tensor.bfloat16(), other.bfloat16()), key
