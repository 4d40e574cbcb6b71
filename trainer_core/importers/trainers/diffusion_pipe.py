"""diffusion-pipe: its main TOML, and the TOML of its dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.adapter import FULL
from ..option_table import LOAD, Folder, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values
from ..source_files import ConfigFile, SourceFiles
from ..value_readers import (
    FAMILIES,
    all_linears,
    aspect_list,
    base_model,
    betas,
    blocks_to_swap,
    file_name,
    flag,
    flatten,
    if_on,
    is_off,
    model_file,
    number,
    one_of,
    optimizer,
    precision,
    refuse,
    same,
    shorten,
    text,
    unless_zero,
    whole,
)

RANGE = ("min_ar", "max_ar", "num_ar_buckets")
MOST_BUCKETS = 50


def _family(options: Mapping[str, Any]) -> str:
    return str(options.get("model.type", "")).lower()


def _batch(value: Any, options: Mapping[str, Any]) -> int:
    if isinstance(value, list):
        raise NotThere("a batch size for each resolution is not there; batch_size is 1")
    return whole(value)


def _density(value: Any, options: Mapping[str, Any]) -> Values:
    name = one_of({"logit_normal": "logit-normal", "uniform": "uniform"})(value, options)
    return Values(
        {
            "sigma_density": name,
            "shift": 0.0
            if flag(options.get("model.flux_shift") or False)
            else number(options.get("model.shift") or 1.0),
        }
    )


def _checkpointing(value: Any, options: Mapping[str, Any]) -> Values:
    if str(value) == "unsloth":
        return Values({"gradient_checkpointing": True}, "see activation_offload of MemorySettings for the rest")
    return Values({"gradient_checkpointing": flag(value)})


def _transformer_dtype(value: Any, options: Mapping[str, Any]) -> str:
    levels = {"float8": "fp8-native", "float8_e4m3fn": "fp8-native", "float8_e5m2": "fp8-native", "nf4": "nf4-bnb"}
    return one_of({**levels, **dict.fromkeys(("bfloat16", "float16"), NothingToSet("not quantized"))})(value, options)


def _huber(value: Any, options: Mapping[str, Any]) -> Values:
    c = number(value)
    if not c:
        raise NothingToSet("0: mse")
    note = "the same up to a factor, which does not change the steps of Adam"
    return Values({"loss": "huber", "huber_c": c}, note)


TABLE = Table(
    rows=(
        Row("model.diffusers_path", LOAD, "folder", base_model(_family)),
        Row("model.transformer_path", LOAD, "diffusion_model", base_model(_family)),
        Row("model.vae_path", LOAD, "vae", model_file("vae")),
        Row("model.t5_path|model.t5xxl_path", LOAD, "t5", model_file("t5")),
        Row("model.clip_path|model.clip_l_path", LOAD, "clip", model_file("clip")),
        Row("model.dtype", LOAD, "dtype", precision),
        Row("model.guidance", LOAD, "guidance", number),
        Row("model.transformer_dtype", "QuantizeModel", "level", _transformer_dtype),
        Row("output_dir", "LoRATrainer", "name", lambda value, _: file_name(value) or "my-lora"),
        Row("adapter.rank", "LoRATrainer", "rank", lambda value, _: min(whole(value), 512)),
        Row("adapter.type", "LoRATrainer", "targets", all_linears),
        Row("adapter.kind", "AdapterSettings", "kind", same("lora", "lokr", FULL, instead="not there; lora is used")),
        Row("adapter.decompose_factor", "AdapterSettings", "lokr_factor", whole),
        Row("adapter.dropout", "AdapterSettings", "dropout", number),
        Row(
            "adapter.init_from_existing",
            "AdapterSettings",
            "init_lora",
            lambda value, _: f"{file_name(value).removesuffix('.safetensors')}.safetensors",
        ),
        Row("save_dtype", "AdapterSettings", "precision", precision),
        Row("epochs", "LoRATrainer", "epochs", unless_zero),
        Row("max_steps", "LoRATrainer", "steps", unless_zero),
        Row("micro_batch_size_per_gpu", "LoRATrainer", "batch_size", _batch),
        Row("gradient_accumulation_steps", "LoRATrainer", "accumulation", unless_zero),
        Row("gradient_clipping", "LoRATrainer", "max_grad_norm", number),
        Row("warmup_steps", "LoRATrainer", "warmup_steps", whole),
        Row(
            "lr_scheduler",
            "LoRATrainer",
            "lr_schedule",
            same("constant", "linear", "cosine", instead="not there; it stays constant"),
        ),
        Row("optimizer.lr", "LoRATrainer", "learning_rate", number),
        Row("optimizer.weight_decay", "LoRATrainer", "weight_decay", number),
        Row("model.timestep_sample_method", "LoRATrainer", "sigma_density", _density),
        Row("activation_checkpointing", "LoRATrainer", "gradient_checkpointing", _checkpointing),
        Row("save_every_n_steps|checkpoint_every_n_steps", "LoRATrainer", "checkpoint_every", unless_zero),
        Row("monitoring.enable_wandb", "LoRATrainer", "trackers", if_on("wandb")),
        Row("pseudo_huber_c", "LoRATrainer", "huber_c", _huber),
        Row("optimizer.type", "OptimizerSettings", "optimizer", optimizer),
        Row("optimizer.betas", "OptimizerSettings", "beta1", betas),
        Row("optimizer.eps", "OptimizerSettings", "eps", number),
        Row("optimizer.d0", "OptimizerSettings", "prodigy_d0", number),
        Row("optimizer.d_coef", "OptimizerSettings", "prodigy_d_coef", number),
        Row("optimizer.use_bias_correction", "OptimizerSettings", "prodigy_bias_correction", if_on(True)),
        Row("optimizer.safeguard_warmup", "OptimizerSettings", "prodigy_safeguard_warmup", if_on(True)),
        Row("blocks_to_swap", "MemorySettings", "group_offload", blocks_to_swap),
        Row("compile", "MemorySettings", "compile", flag),
    ),
    equal={
        "dataset": "its folders are listed below",
        "model.type": "LoadChroma or LoadFlux",
        "adapter.alpha": "the rank, as alpha 0 here",
        "adapter.dtype": "LoRA weights are trained in fp32",
        "model.flux_shift": "in shift",
        "model.shift": "in shift",
        "pipeline_stages": "one GPU",
        "partition_method": "one GPU",
        "partition_split": "one GPU",
        "caching_batch_size": "chosen by itself",
        "map_num_proc": "chosen by itself",
        "steps_per_print": "logs are in the run's folder",
        "video_clip_mode": "is for videos",
        "save_every_n_epochs": "see checkpoint_every",
        "checkpoint_every_n_*": "see checkpoint_every",
        "eval_*": "see holdout and eval_images",
        "disable_block_swap_for_eval": "chosen by itself",
        "monitoring.*": "set WANDB_PROJECT and WANDB_NAME",
        "reentrant_activation_checkpointing": "never needed",
        "x_axis_examples": "charts count steps",
        "image_*": "images are all there is",
        "optimizer.stabilize": "see optimi-stableadamw",
        "model.bypass_guidance_embedding": "off",
        "save_every_n_examples": "see checkpoint_every",
    },
    missing={
        "force_constant_lr": "would have replaced the learning rate",
        "fuse_adapters": "would have merged LoRAs",
        "adapter.*": "would have tuned the adapter",
        "optimizer.*": "would have tuned the optimizer",
        "model.*": "would have changed the model",
        "huggingface_repo": "would have uploaded the LoRA",
        "upload_hf_from_epoch": "would have uploaded the LoRA",
        "eval_datasets": "see holdout",
    },
    defaults={"warmup_steps": 0, "model.timestep_sample_method": "logit_normal"},
    usual={"model.bypass_guidance_embedding": False},
)


def _edge(value: Any, options: Mapping[str, Any]) -> float:
    if isinstance(value, list):
        edges = [number(edge) for edge in value]
        return round(abs(edges[0] * edges[1]) ** 0.5) if len(edges) > 1 else edges[0] if edges else 512.0
    return number(value)


def _buckets(value: Any, options: Mapping[str, Any]) -> Any:
    """Return the aspect ratios that images are cropped to: those of ar_buckets, or num_ar_buckets from min_ar to max_ar."""
    if not flag(value):
        return "square"
    given = options.get("ar_buckets")
    if given is None and not any(is_off(options.get(name)) for name in RANGE):
        low, high, count = (number(options[name]) for name in RANGE)
        last = round(count) - 1
        if low > 0 and high > 0 and 0 <= last < MOST_BUCKETS:
            given = [low * (high / low) ** (i / max(last, 1)) for i in range(last + 1)]
    if aspects := aspect_list(given):
        return Values({"aspects": aspects, "crop_aspect": "closest"}, "others are cropped to the nearest, as there")
    return "preserve"


FOLDERS = Table(
    rows=(
        Row("path", "DatasetBackend", "folder", text),
        Row("resolution", "DatasetBackend", "resolution", _edge),
        Row("num_repeats", "DatasetBackend", "repeats", whole),
        Row("mask_path", "DatasetBackend", "masks", text),
        Row("control_path", "DatasetBackend", "references", text),
        Row("caption_prefix", "DatasetBackend", "caption_prefix", text),
        Row("enable_ar_bucket", "DatasetBackend", "crop_aspect", _buckets),
        Row("cache_shuffle_num", "DatasetBackend", "tag_orders", unless_zero),
        Row("shuffle_tags", "DatasetBackend", "tag_orders", if_on(8)),
    ),
    equal={
        "resolutions": "one DatasetBackend for each",
        "ar_buckets": "in aspects",
        "min_ar": "in aspects",
        "max_ar": "in aspects",
        "num_ar_buckets": "in aspects",
        "frame_buckets": "is for videos",
        "cache_shuffle_delimiter": "tags are separated by commas",
        "skip_empty_caption": "see on_broken",
    },
    missing={
        "size_buckets": "would have set the buckets",
    },
    defaults={"resolution": 512, "enable_ar_bucket": False},
)


def _is_main(value: Any) -> bool:
    model = value.get("model") if isinstance(value, dict) else None
    return isinstance(model, dict) and "type" in model and ("dataset" in value or "adapter" in value)


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    options = flatten(file.value)
    family = _family(options)
    if family not in ("chroma", "flux"):
        raise refuse(file.path.name, "model.type", options.get("model.type"), FAMILIES)
    options["adapter.kind"] = options.get("adapter.type", FULL)  # without an adapter the whole model is trained
    settings = Settings(family, options)
    if not is_off(options.get("dataset")):
        _add_folders(settings, files.referenced(options["dataset"], file, "dataset").value)
    return settings


def _add_folders(settings: Settings, config: Any) -> None:
    """Add each directory once for each resolution. A directory's options go before those of the file."""
    shared = dict(config) if isinstance(config, dict) else {}
    directories = shared.pop("directory", None)
    for i, directory in enumerate(directories if isinstance(directories, list) else []):
        own = {**shared, **directory} if isinstance(directory, dict) else shared
        resolutions = own.get("resolutions")
        several = resolutions if isinstance(resolutions, list) and resolutions else [None]
        for resolution in several:
            place = f"directory[{i}] at {shorten(resolution)}" if len(several) > 1 else f"directory[{i}]"
            settings.folders.append(
                Folder(place, {**own, **({"resolution": resolution} if resolution is not None else {})})
            )


TRAINER = Trainer("diffusion-pipe", _is_main, _read, TABLE, FOLDERS)
