"""ComfyUI's own loader takes every key of every kind and format of file, and makes the weights that were trained."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.keys import original_place
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.layer import AdapterLayer
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.models.flux.text_encoder import join
from chroma_trainer.trainer_core.registry import load, names
from safetensors.torch import load_file, save_file

from .conftest import original_weights

pytestmark = pytest.mark.comfyui
WIDTH = 64
ENDS = re.compile(r"\.(lora_|lokr_|hada_|oft_|alpha|dora_scale).*")
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # fp32 products, in another order
KINDS: dict[str, type[AdapterLayer]] = {name: load("adapter", name) for name in names("adapter")}
CASES = [(kind, "default", form) for kind, layer in KINDS.items() for form in layer.formats]
CASES += [("lora", "pissa", "universal"), ("dora", "olora", "comfyui"), ("rslora", "orthogonal", "kohya")]
CHROMA = [("chroma", *case, strength) for case in CASES for strength in (1.0, 0.5)]
# Beside what Chroma proves: modulations, embedders, and the last modulation's exchanged halves.
FLUX = [("flux", *case, 1.0) for case in CASES if case[1] == "default" and case[0] in ("lora", "dora", "loha", "lokr")]
TARGETS = {"chroma": "all+ffs+embedder", "flux": "ai-toolkit,*_embedder*,proj_out"}


@dataclass(frozen=True)
class Base:
    """A tiny model as a file for the probe node, and its fused weights."""

    family: Any
    model: ModelConfig
    file: Path
    config: str
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(request, tmp_path_factory):
    found = {}
    for name in ("chroma", "flux"):
        family, model = load("family", name)(), request.getfixturevalue(f"tiny_{name}_model")
        weights = original_weights(family.load_transformer(model), WIDTH)
        file = tmp_path_factory.mktemp("base") / f"{name}.safetensors"
        save_file(weights, file)
        config = (Path(model.repo) / "transformer" / "config.json").read_text("utf-8")
        found[name] = Base(family, model, file, json.dumps(json.loads(config)), weights)
    return found


def probe_of(base: Base) -> dict[str, Any]:
    return {
        "class_type": f"Probe{base.family.name.title()}",
        "inputs": {"config": base.config, "weights": str(base.file)},
    }


@pytest.mark.parametrize(("family", "kind", "init", "form", "strength"), CHROMA + FLUX)
def test_the_loaded_weights_are_the_trained_ones(each_comfyui, bases, family, kind, init, form, strength):
    base = bases[family]
    transformer = base.family.load_transformer(base.model)
    # ComfyUI exchanges the halves of a product, but not those of a DoRA's norms (docs/lora-files.md).
    more = ",norm_out.linear" if family == "flux" and kind != "dora" else ""
    targets = resolve_targets(transformer, base.family, TARGETS[family] + more)
    draw = torch.Generator().manual_seed(3)
    layers = inject_(transformer, targets, 4, 6.0, init, draw, AdapterConfig(kind=kind, lokr_factor=4))
    with torch.no_grad():
        for _, parameter in trainable_parameters(layers):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    name = f"{family}-{kind}-{init}-{form}"
    saved = export_lora(layers, transformer, each_comfyui.output / "loras" / f"{name}.safetensors", {}, form=form)
    history = each_comfyui.run({
        "base": probe_of(base),
        "loader": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["base", 0], "lora_name": f"{name}.safetensors", "strength_model": strength},
        },
        "delta": {"class_type": "ProbeDelta", "inputs": {"model": ["loader", 0], "name": f"{name}-{strength}", "whole": True}},
    })  # fmt: skip
    (num_patches,) = history["outputs"]["delta"]["patches"]
    keys = load_file(each_comfyui.output / "loras" / f"{name}.safetensors").keys()
    assert num_patches == len({ENDS.sub("", key) for key in keys}) and saved.num_keys == len(keys)
    # peft's way of saying what dora_scale says, in universal files alone; ComfyUI names the key and goes on.
    unread = re.findall(r"lora key not loaded: (\S+)", each_comfyui.log)
    assert all(key.startswith("transformer.") and key.endswith("lora_magnitude_vector") for key in unread)
    found = load_file(each_comfyui.output / f"{name}-{strength}.safetensors")
    wanted = {key: base.weights[key].double() for key in found}
    for module, layer in layers.items():
        place = original_place(module)
        delta = layer.delta()
        delta = delta.roll(len(delta) // 2, 0) if place.is_swapped else delta
        factor = strength**2 if kind == "oft" else strength  # ComfyUI multiplies a rotation's change twice
        wanted[f"{place.module}.weight"][place.rows(WIDTH)] += factor * delta
    for key, weight in found.items():
        assert (weight - base.weights[key]).abs().max() > 1e-3
        torch.testing.assert_close(weight.double(), wanted[key], rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("starts", [False, True], ids=["text", "reference"])
def test_comfyuis_flux_says_what_ours_says(each_comfyui, bases, tmp_path, starts):
    """Guidance, pooled text, modulations, the order of the last one's halves; and kontext's picture to start from."""
    base, draw = bases["flux"], torch.Generator().manual_seed(2)
    x, sigma = torch.randn(1, 16, 8, 6, generator=draw), torch.tensor([0.37])
    tokens, pooled = torch.randn(9, 32, generator=draw), torch.randn(16, generator=draw)
    beside = {"reference": torch.randn(1, 16, 8, 6, generator=draw)} if starts else {}
    file, name = tmp_path / "given.safetensors", f"flux-velocity-{starts}"
    given = {"x": x, "sigma": sigma, "context": tokens[None], "y": pooled[None], "guidance": torch.tensor([3.5])}
    save_file({**given, **beside}, file)
    history = each_comfyui.run({
        "base": probe_of(base),
        "velocity": {"class_type": "ProbeVelocity", "inputs": {"model": ["base", 0], "file": str(file), "name": name}},
    })  # fmt: skip
    assert history["status"]["completed"]
    transformer = base.family.load_transformer(base.model)
    with torch.no_grad(), base.family.drawing(transformer):
        ours = base.family.predict(transformer, x, sigma, [join(tokens, pooled)], **beside)
    theirs = load_file(each_comfyui.output / f"{name}.safetensors")["velocity"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
