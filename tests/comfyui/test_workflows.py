"""Every shipped workflow runs, shortened: in ComfyUI with tiny models in the place of large files, and headless as far as that goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_
from chroma_trainer.trainer_core.adapters.inject import remove_
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.validation.euler import sample
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfyui
API = Path(__file__).resolve().parents[2] / "workflows" / "api"
TRAINING = sorted(path.stem for path in API.glob("*.json") if '"LoRATrainer"' in path.read_text("utf-8"))
SHORT = {  # fields of the shortened run, for every node type that has them
    "LoadChroma": {"flavour": "nano", "dtype": "fp32"},
    "LoadFlux": {"folder": "tiny-flux", "text_tokens": 32, "dtype": "fp32"},
    "QuantizeModel": {"level": "none"},
    "DatasetBackend": {"resolution": 64, "folder": "few"},
    "MemorySettings": {"group_offload": "none", "text_encoder": "device"},
    "LoRATrainer": {
        "steps": 4, "epochs": 0, "warmup_steps": 1, "batch_size": 2, "accumulation": 1, "checkpoint_every": 2,
        "keep_checkpoints": 4, "validate_every": 0, "rank": 4, "alpha": 4.0, "learning_rate": 0.02,
    },
    "ValidateSampler": {"steps": 2, "cfg": 1.0, "resolutions": "64x64"},
    "KSampler": {"steps": 4},
    "BasicScheduler": {"steps": 4},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
}  # fmt: skip
SCALE, SHIFT = 0.3611, 0.1159  # of ComfyUI's Flux latents
LARGE = ("CLIPLoader", "T5TokenizerOptions", "VAELoader", "VAEDecode", "SaveImage")


def shortened(name, chroma=None):
    """The API export in few steps; with `chroma`, the probe's nodes in the place of ComfyUI's loaders of large files."""
    prompt = json.loads((API / f"{name}.json").read_text("utf-8"))
    for node in prompt.values():
        fields = SHORT.get(node["class_type"], {})
        node["inputs"].update({key: value for key, value in fields.items() if key in node["inputs"]})
        if node["class_type"] == "LoRATrainer":
            node["inputs"]["name"] = f"short-{name}"
            if name == "full-rank":  # it has no rank but that of the extracted LoRA
                node["inputs"].update(rank=16, alpha=16.0)
        if node["class_type"] == "AdapterSettings":
            node["inputs"]["extract_rank"] = 4
    return with_probes(prompt, chroma) if chroma else prompt


def with_probes(prompt, chroma):
    texts = {"class_type": "ProbeConditioning", "inputs": {"file": str(chroma.folder / "texts.safetensors")}}
    probes = {
        "UNETLoader": {
            "class_type": "ProbeChroma",
            "inputs": {"config": json.dumps(chroma.config), "weights": str(chroma.folder / "weights.safetensors")},
        }
    }
    named = iter(("positive", "negative"))
    found = {}
    for node_id, node in prompt.items():
        kind = node["class_type"]
        if kind == "CLIPTextEncode":
            found[node_id] = {**texts, "inputs": {**texts["inputs"], "name": next(named)}}
        elif kind not in LARGE:
            found[node_id] = probes.get(kind, node)
        if kind == "LoadChroma":
            node["inputs"]["folder"] = "tiny-chroma"
        if kind == "VAEDecode":
            found["latent"] = {
                "class_type": "SaveLatent",
                "inputs": {"samples": node["inputs"]["samples"], "filename_prefix": "short"},
            }
    return found


def latents_of(server, history):
    found = history["outputs"]["latent"]["latents"][0]
    return (load_file(server.output / found["subfolder"] / found["filename"])["latent_tensor"] - SHIFT) * SCALE


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "train-then-sample"])
def test_a_training_runs_and_headless_writes_the_same_bytes(comfyui, headless, tiny_flux, name):
    shutil.copytree(tiny_flux, comfyui.base / "models" / "diffusers" / "tiny-flux", dirs_exist_ok=True)
    prompt = shortened(name)
    comfyui.run(prompt)
    headless_output = headless(prompt, "--models", str(comfyui.base / "models"))
    written = [path.relative_to(comfyui.output) for path in comfyui.output.glob(f"*/short-{name}*.safetensors")]
    assert {path.parent.name for path in written} == (
        {"diffusion_models", "loras"} if name == "full-rank" else {"loras"}
    )
    for path in written:
        assert sha256_of(comfyui.output / path) == sha256_of(headless_output / path), path


def save_tiny_lora(path: Path) -> None:
    generator = torch.Generator().manual_seed(len(path.stem))
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    shapes = {f"{layer}.lora_A.weight": (4, 3072), f"{layer}.lora_B.weight": (3072, 4)}
    path.parent.mkdir(exist_ok=True)
    save_file({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, path)


def test_two_loras_are_merged_and_checked(comfyui):
    for name in ("first", "second"):
        save_tiny_lora(comfyui.base / "models" / "loras" / f"{name}.safetensors")
    prompt = shortened("merge-loras")
    loaders = [node for node in prompt.values() if node["class_type"] == "LoadLoRAFile"]
    for node, name in zip(loaders, ("first", "second"), strict=True):
        node["inputs"]["lora"] = f"{name}.safetensors"
    outputs = comfyui.run(prompt)["outputs"]
    report = "\n".join(outputs[_id_of(prompt, "PreviewAny")]["text"])
    assert "nothing" in report, report
    assert outputs[_id_of(prompt, "PreviewImage")]["images"]
    assert (comfyui.output / "loras" / "merged.safetensors").is_file()


def test_compare_checkpoints_draws_a_grid_a_prompt(comfyui):
    prompt = shortened("compare-checkpoints")
    prompt["labels"] = {"class_type": "PreviewAny", "inputs": {"source": [_id_of(prompt, "ValidateSampler"), 3]}}
    history = comfyui.run(prompt)
    shown = next(history["outputs"][key] for key in history["outputs"] if "images" in history["outputs"][key])
    assert len(shown["images"]) == 2  # one a prompt
    labels = history["outputs"]["labels"]["text"]
    assert labels[0] == "base, cat face, 64x64" and "step 2 LoRA 0.5, cat face, 64x64" in labels
    assert len(labels) == (1 + 2 * 2) * 2  # base, and two checkpoints at two strengths, of two prompts


def _id_of(prompt, kind):
    return next(node_id for node_id, node in prompt.items() if node["class_type"] == kind)


def test_train_then_sample_draws_with_what_it_trained(each_comfyui, chroma, tiny_chroma, headless, monkeypatch):
    """The picture is that of our own sampler with the very LoRA; headless trains the same bytes and leaves the rest."""
    server = each_comfyui
    shutil.copytree(tiny_chroma, server.base / "models" / "diffusers" / "tiny-chroma", dirs_exist_ok=True)
    prompt = shortened("train-then-sample", chroma)
    latents = latents_of(server, server.run(prompt))
    lora = server.output / "loras" / "short-train-then-sample.safetensors"

    def ours():
        return sample(
            chroma.family, chroma.transformer, chroma.texts["positive"], chroma.texts["negative"], width=64, height=64,
            steps=4, cfg=3.5, seed=0, channels=16, factor=8,
        )  # fmt: skip

    base = ours()
    apply_lora_(chroma.transformer, lora)
    try:
        learnt = ours()
    finally:
        remove_(chroma.transformer)
    torch.testing.assert_close(latents, learnt, rtol=1e-4, atol=1e-4)
    assert (base - learnt).abs().max() > 100 * 1e-4

    left = headless(prompt, "--models", str(server.base / "models"))
    assert sha256_of(left / "loras" / lora.name) == sha256_of(lora)


def test_adaptive_guider_tells_what_it_saved(each_comfyui, chroma):
    prompt = shortened("adaptive-guider", chroma)
    guider = _id_of(prompt, "AdaptiveGuider")
    history = each_comfyui.run(prompt)
    assert latents_of(each_comfyui, history).isfinite().all()
    assert f"node {guider}: 3 of 4 negative passes skipped (75%), positive prompt only after step 1" in each_comfyui.log
