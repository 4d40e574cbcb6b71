"""What we say of keys that ComfyUI and diffusers load is what both do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.adapters.files.keys import BLOCKS, OUTSIDE_NAMES, layers_of
from chroma_trainer.trainer_core.adapters.files.load import kohya_name
from chroma_trainer.trainer_core.lora_tools.reader import of_tensors
from chroma_trainer.trainer_core.lora_tools.report.loading_rules import unloaded_keys

from .conftest import diffusers_tensors, kohya_tensors, native_tensors

FORMS = {
    "universal": diffusers_tensors(),
    "comfyui": native_tensors(),
    "kohya": {key: tensor for key, tensor in kohya_tensors().items() if "linear" not in key},  # diffusers: width 3072 alone
    "peft": diffusers_tensors("base_model.model."),
    "bare": native_tensors(""),
    "bare diffusers": diffusers_tensors(""),
    "wrong prefix": native_tensors("transformer."),
    "bundled": native_tensors("model.diffusion_model."),
    "onetrainer": {
        key.replace(".", "_", key.count(".") - 2).replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for key, tensor in diffusers_tensors("lora_transformer_").items()
    },
    "kohya on diffusers": {
        key.replace(".", "_", key.count(".") - 2): tensor for key, tensor in diffusers_tensors("lora_unet_").items()
    },
    "adapter name": diffusers_tensors("transformer.", ".my_style"),
    "old names": {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for key, t in diffusers_tensors().items()},
}  # fmt: skip
# Loads in diffusers 0.42 by a conversion for other tools' files that the rules do not promise.
CAUTIOUS = {"kohya on diffusers", "bundled", "bare diffusers", "old names"}


@pytest.mark.parametrize("form", FORMS)
def test_diffusers(tiny_chroma, form):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer")
    make: Any = ChromaPipeline  # its parts are not optional by their types
    pipeline = make(transformer=transformer, scheduler=None, vae=None, text_encoder=None, tokenizer=None)
    try:
        pipeline.load_lora_weights({key: tensor.clone() for key, tensor in FORMS[form].items()})
        count = sum(
            ".lora_B." in name and not tensor.is_meta and bool(tensor.any())
            for name, tensor in transformer.named_parameters()
        )
    except (ValueError, KeyError, AttributeError, NotImplementedError, TypeError, IndexError):
        count = 0
    lora = of_tensors(FORMS[form])
    promised = len(lora.places) if not unloaded_keys(lora)["diffusers"] else 0
    assert count == promised or (form in CAUTIOUS and promised == 0)


PROBE = """
import json, logging, sys
sys.argv = ["probe", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.model_base, comfy.lora
class Config: unet_config = {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}
class Model(comfy.model_base.Flux):
    def __init__(self): torch.nn.Module.__init__(self); self.model_config = Config()
    def state_dict(self): return dict.fromkeys(names)
asked = json.loads(sys.stdin.read())
names = [f"diffusion_model.{name}.weight" for name in asked["names"]]
map = comfy.lora.model_lora_keys_unet(Model(), {})
results = {}
for form, keys in asked["forms"].items():
    seen = []
    logging.warning = lambda text, *more: seen.append(text.removeprefix("lora key not loaded: "))
    comfy.lora.load_lora({key: torch.ones(4, 4) if not key.endswith("alpha") else torch.tensor(1.0) for key in keys}, map)
    results[form] = seen
print(json.dumps(results))
"""


def original_names() -> list[str]:
    counts = {"double_blocks": 19, "single_blocks": 38}
    inside = [
        f"{original}.{index}.{leaf}"
        for original, table in BLOCKS.values() for leaf in {leaf for leaf, _ in table.values()} for index in range(counts[original])
    ]  # fmt: skip
    return [*inside, *OUTSIDE_NAMES]


@pytest.mark.comfyui
def test_comfyui():
    root = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    if not (root / "main.py").is_file():
        pytest.skip(f"no ComfyUI at {root}")
    own = root / ".venv" / "bin" / "python"
    asked = {"names": original_names(), "forms": {form: list(tensors) for form, tensors in FORMS.items()}}
    done = subprocess.run(
        [own if own.exists() else sys.executable, "-c", PROBE], cwd=root, input=json.dumps(asked), capture_output=True, text=True,
        encoding="utf-8", timeout=300, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for form, tensors in FORMS.items():
        assert set(results[form]) == set(unloaded_keys(of_tensors(tensors))["ComfyUI"]), form


def test_every_name_leads_to_its_layers_and_back():
    for name in original_names():
        layers = layers_of(name)
        assert layers and layers_of(kohya_name(name)) == layers, name
        for layer, _ in layers:
            assert layers_of(layer)[0][0] == layers_of(kohya_name(layer))[0][0] == layer
    assert layers_of("blocks.0.attn.qkv") == layers_of("lora_unet_input_blocks_1") == ()
