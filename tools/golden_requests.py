"""What tools/golden.py runs: small trainings of every kind, as workflows, with tiny models and pictures."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITERS = Path(__file__).resolve().parents[1] / "tests" / "conftest.py"  # of tiny models
CAPTIONS = ("a red cat", "the blue dog\na dog", "a photo of the red dog, and of a cat", "x")

Workflow = dict[str, dict[str, Any]]

TRAINING = {
    "name": "golden", "rank": 4, "alpha": 4, "targets": "all+ffs", "steps": 6, "batch_size": 2, "learning_rate": 0.01,
    "warmup_steps": 0, "gradient_checkpointing": False, "caption_dropout": 0.1, "checkpoint_every": 2, "seed": 5,
}  # fmt: skip
PICTURES = {"folder": "pictures", "resolution": 32, "trigger": "sks"}
LARGE = {**PICTURES, "resolution": 640}  # a tile has 512 pixels
MASKED = {**PICTURES, "masks": "masks", "unmasked_weight": 0.2}
PAIRS = {**PICTURES, "references": "starts"}
MENDED = {**PICTURES, "degrade": "shrink 2-4 + jpeg 10-30"}
TAGGED = {**PICTURES, "folder": "tags", "tag_orders": 3, "kept_tags": 1}
OTHERS = {"folder": "others", "resolution": 32, "prior_preservation": True}
ODD = {**PICTURES, "folder": "odd", "crop_style": "random", "captions": "filename", "repeats": 2}
SQUARE = {**PICTURES, "captions": "instance prompt", "instance_prompt": "a cat || a dog", "crop_aspect": "square"}
DRAWN = {"prompts": "a red cat\nthe blue dog", "resolutions": "32x48", "steps": 3, "cfg": 2.0, "seed": 3}
DRAWN_FROM = {**DRAWN, "cfg": 1.0, "reference": "starts/0.jpg"}
CHROMA = {"class_type": "LoadChroma", "folder": "tiny-chroma", "dtype": "fp32"}
SINGLE_FILES = {**CHROMA, "diffusion_model": "tiny.safetensors", "text_encoder": "tiny.safetensors"}
FLUX = {"class_type": "LoadFlux", "folder": "tiny-flux", "flavour": "dev", "dtype": "fp32", "text_tokens": 24}
SCHNELL = {**FLUX, "folder": "tiny-schnell", "flavour": "schnell"}
KONTEXT = {**FLUX, "flavour": "kontext"}
BLOCKS_AWAY = {"group_offload": "block", "activation_offload": True, "text_encoder": "blocks"}
FEW = tuple(f"LoRATrainer.{setting}" for setting in ("steps=4", "warmup_steps=1", "checkpoint_every=2"))


@dataclass(frozen=True)
class Call:
    """One call of `chroma-trainer run`.

    Args:
        workflow: nodes by id, or the name of a shipped workflow.
        settings: values for --set.
        cancel_at: the run is cancelled when the checkpoint of this step appears; 0: never.
    """

    workflow: Workflow | str
    settings: tuple[str, ...] = ()
    cancel_at: int = 0


def requests() -> dict[str, list[Call]]:
    """Every request by name: the calls it consists of."""
    trainings = {**models(), **adapters(), **data(), **optimizers(), **ways()}
    cut = Call(graph(), cancel_at=2)
    return {name: [Call(workflow)] for name, workflow in trainings.items()} | {
        "init-lora": [Call(first()), Call(graph(name="second", adapter={"init_lora": "first.safetensors"}))],
        "flux-assistant": [
            Call(first(FLUX)), Call(graph(name="second", model={**FLUX, "assistant": "first.safetensors"})),
        ],
        "resumed": [cut, Call(graph())],
        "adopted": [cut, Call(graph(learning_rate=0.005, on_change="adopt"))],
        "shipped-first-lora": [Call("first-lora.json", (*FEW, "4.steps=1", "6.steps=1"))],
        "shipped-compare-checkpoints": [Call("api/compare-checkpoints.json", (*FEW, "ValidateSampler.steps=1"))],
    }  # fmt: skip


def models() -> dict[str, Workflow]:
    return {
        "chroma": graph(),
        "chroma-bf16": graph(model={**CHROMA, "dtype": "bf16"}),
        "chroma-single-files": graph(model=SINGLE_FILES),
        "flux": graph(model=FLUX),
        "flux-schnell": graph(model=SCHNELL),
        "flux-masked-text": graph(model={**SCHNELL, "flavour": "libreflux"}, shift=0.0),
        "flux-references": graph(model=KONTEXT, datasets=[PAIRS], validation=DRAWN_FROM),
        "flux-degraded": graph(model=KONTEXT, datasets=[MENDED], holdout=0.25),
        "int8-quanto": graph(quantized={"level": "int8-quanto", "text_encoder": "int8-quanto"}),
        "int8-products": graph(quantized={"level": "int8-quanto", "products": "int8"}),
        "int4-quanto": graph(model=FLUX, quantized={"level": "int4-quanto"}),
        "int4-loftq": graph(quantized={"level": "int4-quanto"}, init="loftq"),
        "fp8-native": graph(quantized={"level": "fp8-native"}),
    }


def adapters() -> dict[str, Workflow]:
    return {
        "dora": graph(adapter={"kind": "dora"}),
        "rslora": graph(adapter={"kind": "rslora", "format": "comfyui", "precision": "bf16"}, init="gaussian"),
        "lokr": graph(adapter={"kind": "lokr"}),
        "lokr-both": graph(adapter={"kind": "lokr", "lokr_factor": 8, "lokr_decompose_both": True}, rank=2),
        "loha": graph(adapter={"kind": "loha"}),
        "format-kohya": graph(adapter={"format": "kohya", "precision": "fp16"}),
        "format-kohya-flux": graph(model=FLUX, adapter={"kind": "dora", "format": "kohya"}),
        "init-pissa": graph(init="pissa"),
        "init-olora": graph(init="olora"),
        "init-orthogonal": graph(init="orthogonal"),
        "init-eva": graph(init="eva", adapter={"eva_batches": 2}),
        "block-rates": graph(adapter={"block_lr": "transformer_blocks.0=0; single_transformer_blocks.*=0.5"}),
        "ema": graph(adapter={"ema_decay": 0.9}, validation=DRAWN, validate_every=3),
    }


def data() -> dict[str, Workflow]:
    return {
        "masks": graph(datasets=[MASKED]),
        "prior-preservation": graph(datasets=[PICTURES, OTHERS]),
        "tags-caption-dropout": graph(datasets=[TAGGED], caption_dropout=0.5),
        "chained-folders": graph(datasets=[ODD, SQUARE], steps=0, epochs=2),
    }


def optimizers() -> dict[str, Workflow]:
    """Each with another schedule of the rate, or another density of noise levels."""
    chosen = {
        "schedule-free": ({"optimizer": "schedulefree-adamw"}, {"sigma_density": "uniform"}),
        "prodigy": ({"optimizer": "prodigy", "prodigy_d0": 1e-3}, {"learning_rate": 1, "sigma_density": "sigmoid"}),
        "adafactor": ({"optimizer": "adafactor"}, {"lr_schedule": "cosine", "sigma_density": "logit-normal"}),
        "came": ({"optimizer": "came"}, {"lr_schedule": "linear", "warmup_steps": 2, "sigma_density": "beta"}),
        "lion": ({"optimizer": "optimi-lion"}, {"lr_schedule": "cosine_with_restarts", "sigma_density": "mode"}),
        "stable-adamw": ({"optimizer": "optimi-stableadamw"}, {"lr_schedule": "polynomial", "sigma_density": "cosmap"}),
        "adamw-bf16": ({"optimizer": "adamw_bf16"}, {"lr_schedule": "wsd", "sigma_density": "quadratic_tail"}),
        "adamw-bf16-kahan": ({"optimizer": "adamw_bf16", "kahan": True}, {"sigma_density": "quadratic_tail_legacy"}),
    }  # fmt: skip
    return {name: graph(optimizer=optimizer, **training) for name, (optimizer, training) in chosen.items()}


def ways() -> dict[str, Workflow]:
    """What else may be different in the course of a run."""
    return {
        "dropout-accumulation": graph(adapter={"dropout": 0.2}, batch_size=1, accumulation=3),
        "rollouts": graph(rollout_probability=0.5, rollout_steps=2),
        "routed-tokens": graph(routed_share=0.5, route_first=1, route_last=-2),
        "holdout": graph(holdout=0.25, learning_rate=0.05, checkpoint_every=1, keep_checkpoints=1, keep_every=3),
        "validation": drawn_afterwards(),
        "checkpointing-offload": graph(
            memory={**BLOCKS_AWAY, "checkpointing_interval": 2}, gradient_checkpointing=True
        ),
        "leaf-offload": graph(model=FLUX, memory={"group_offload": "leaf", "offload_to_disk": True}, validation=DRAWN),
        "vae-tiles": graph(datasets=[LARGE], memory={"vae_tiling": True, "vae_slicing": True}, steps=2, batch_size=1),
        "attention-math": graph(memory={"attention": "math"}),
    }  # fmt: skip


def graph(
    model: dict[str, Any] = CHROMA,
    datasets: Sequence[dict[str, Any]] = (PICTURES,),
    quantized: dict[str, Any] | None = None,
    validation: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    **training: Any,
) -> Workflow:
    """A training. Datasets are chained; without MemorySettings what is free on this machine would decide."""
    nodes = {"model": node(**model), "memory": node("MemorySettings", **(memory or {}))}
    sockets = {"model": ["model", 0], "memory": ["memory", 0]}
    if quantized:
        nodes["quantized"] = node("QuantizeModel", model=["model", 0], **quantized)
        sockets["model"] = ["quantized", 0]
    for i, dataset in enumerate(datasets):
        before = {"dataset": sockets["dataset"]} if i else {}
        nodes[f"dataset-{i}"] = node("DatasetBackend", **dataset, **before)
        sockets["dataset"] = [f"dataset-{i}", 0]
    if validation:
        nodes["validation"] = node("ValidateSampler", **validation)
        sockets["validation"] = ["validation", 1]
    for name, settings in (("adapter", adapter), ("optimizer", optimizer)):
        if settings:
            nodes[name] = node(f"{name.capitalize()}Settings", **settings)
            sockets[name] = [name, 0]
    return {**nodes, "trainer": node("LoRATrainer", **sockets, **{**TRAINING, **training})}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def first(model: dict[str, Any] = CHROMA) -> Workflow:
    """A training that makes first.safetensors, for one that needs a LoRA."""
    return graph(model=model, name="first", steps=2)


def drawn_afterwards() -> Workflow:
    """A training that draws, and a sampler after it that compares its checkpoints and saves what it draws."""
    shown = {**DRAWN, "lora_strength": "0.5, 1.0"}
    live = {**shown, "guidance": "adaptive", "threshold": 0.9, "scheduler": "simple"}
    after = {**shown, "checkpoints": "all", "negative_prompt": "a dog", "lora": ["trainer", 0]}
    saver = node("SaveImage", images=["after", 0], filename_prefix="drawn/picture")
    return {**graph(validation=live, validate_every=2), "after": node("ValidateSampler", **after), "saver": saver}


def write_models(folder: Path) -> None:
    """Tiny random models from a seed, as ComfyUI's models folder; two parts of the Chroma as single files as well."""
    tiny, diffusers = _load_writers(), folder / "diffusers"
    tiny.write_tiny_chroma(diffusers / "tiny-chroma")
    tiny.write_tiny_flux(diffusers / "tiny-flux")
    tiny.write_tiny_flux(diffusers / "tiny-schnell", seed=2, guidance_embeds=False)
    parts = {"diffusion_models": "transformer/diffusion_pytorch_model", "text_encoders": "text_encoder/model"}
    for kind, part in parts.items():
        (folder / kind).mkdir()
        shutil.copy(diffusers / "tiny-chroma" / f"{part}.safetensors", folder / kind / "tiny.safetensors")


def _load_writers() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_models", WRITERS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_datasets(folder: Path) -> None:
    """Small pictures with captions; masks and starts for `pictures`. Of `odd` one is broken and one is there twice."""
    from PIL import Image, ImageOps

    for name in ("pictures", "masks", "starts", "tags", "others", "odd"):
        (folder / name).mkdir(parents=True)
    for i, caption in enumerate(CAPTIONS):
        picture = draw_picture(i, (96, 32) if i == 3 else (32, 32))
        _save(picture, folder / "pictures" / f"{i}.png", caption)
        _save(picture, folder / "tags" / f"{i}.png", f"sks, cat, red, {i} of 4, photo")
        ImageOps.invert(picture).resize((80, 64)).save(folder / "starts" / f"{i}.jpg", quality=95)
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, picture.width // 2, picture.height))
        mask.save(folder / "masks" / f"{i}.png")
    for i in (4, 5):
        _save(draw_picture(i, (48, 32)), folder / "others" / f"{i}.png", "a photo")
    for i, size in enumerate([(75, 50), (40, 90), (130, 61)]):
        draw_picture(i, size).save(folder / "odd" / f"a cat number {i}.png")
    draw_picture(0, (75, 50)).save(folder / "odd" / "the same cat.png")
    (folder / "odd" / "broken.png").write_bytes(b"no picture")


def draw_picture(i: int, size: tuple[int, int]) -> Any:
    """A rectangle on a ground, in colours of this number."""
    from PIL import Image

    image = Image.new("RGB", size, (50 * i, 200 - 30 * i, 30))
    image.paste((255 - 40 * i, 20, 40 * i), (4, 4, 20, 28 - 3 * i))
    return image


def _save(picture: Any, path: Path, caption: str) -> None:
    picture.save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
