"""ComfyUI's own loader takes every key of every kind and format of file, and makes the weights that were trained."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.families.chroma import ChromaFamily
from chroma_trainer.trainer_core.lora.contract import AdapterLayer
from chroma_trainer.trainer_core.lora.export import export_lora
from chroma_trainer.trainer_core.lora.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.lora.keys import original_place
from chroma_trainer.trainer_core.lora.targets import resolve_targets
from chroma_trainer.trainer_core.registry import load, names
from safetensors.torch import load_file, save_file

from .conftest import original_weights

pytestmark = pytest.mark.comfyui
WIDTH = 64
ENDS = re.compile(r"\.(lora_|lokr_|hada_|alpha|dora_scale).*")
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # fp32 products, in another order
KINDS: dict[str, type[AdapterLayer]] = {name: load("adapter", name) for name in names("adapter")}
CASES = [(kind, "default", form) for kind, layer in KINDS.items() for form in layer.formats]
CASES += [("lora", "pissa", "universal"), ("dora", "olora", "comfyui"), ("rslora", "orthogonal", "kohya")]
FAMILY = ChromaFamily()


@dataclass(frozen=True)
class Base:
    """The tiny Chroma as a file for the probe node, and its fused weights."""

    file: Path
    config: str
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    weights = original_weights(FAMILY.load_transformer(tiny_model), WIDTH)
    file = tmp_path_factory.mktemp("base") / "weights.safetensors"
    save_file(weights, file)
    config = (Path(tiny_model.repo) / "transformer" / "config.json").read_text("utf-8")
    return Base(file, json.dumps(json.loads(config)), weights)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize(("kind", "init", "form"), CASES)
def test_the_loaded_weights_are_the_trained_ones(each_comfyui, tiny_model, base, kind, init, form, strength):
    transformer = FAMILY.load_transformer(tiny_model)
    targets = resolve_targets(transformer, FAMILY, "all+ffs+embedder")
    draw = torch.Generator().manual_seed(3)
    layers = inject_(transformer, targets, 4, 6.0, init, draw, AdapterConfig(kind=kind, lokr_factor=4))
    with torch.no_grad():
        for _, parameter in trainable_parameters(layers):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    name = f"{kind}-{init}-{form}"
    saved = export_lora(layers, transformer, each_comfyui.output / "loras" / f"{name}.safetensors", {}, form=form)
    history = each_comfyui.run({
        "chroma": {"class_type": "ProbeChroma", "inputs": {"config": base.config, "weights": str(base.file)}},
        "loader": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["chroma", 0], "lora_name": f"{name}.safetensors", "strength_model": strength},
        },
        "delta": {"class_type": "ProbeDelta", "inputs": {"model": ["loader", 0], "name": f"{name}-{strength}", "whole": True}},
    })  # fmt: skip
    (num_patches,) = history["outputs"]["delta"]["patches"]
    keys = load_file(each_comfyui.output / "loras" / f"{name}.safetensors").keys()
    assert num_patches == len({ENDS.sub("", key) for key in keys}) and saved.num_keys == len(keys)
    # peft's way of saying what dora_scale says; ComfyUI names the key and goes on.
    assert all(line.endswith("lora_magnitude_vector") for line in re.findall(r"lora key not loaded: (\S+)", each_comfyui.log))
    found = load_file(each_comfyui.output / f"{name}-{strength}.safetensors")
    wanted = {key: base.weights[key].double() for key in found}
    for module, layer in layers.items():
        place = original_place(module)
        wanted[f"{place.module}.weight"][place.rows(WIDTH)] += strength * layer.delta()
    for key, weight in found.items():
        assert (weight - base.weights[key]).abs().max() > 1e-3
        torch.testing.assert_close(weight.double(), wanted[key], rtol=RELATIVE, atol=ABSOLUTE)
