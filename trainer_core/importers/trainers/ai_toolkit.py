"""ai-toolkit: the YAML or JSON of a job of the type extension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ..option_table import LOAD, Convert, Folder, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values
from ..source_files import ConfigFile, SourceFiles
from ..value_readers import (
    FAMILIES,
    MAX_RANK,
    base_model,
    betas,
    cfg_scale,
    file_name,
    flag,
    flatten,
    if_on,
    is_off,
    model_file,
    number,
    often,
    one_of,
    optimizer,
    precision,
    prompt_text,
    refuse,
    round_edge,
    same,
    schedule,
    shorten,
    shuffled_tags,
    substrings,
    text,
    unless_zero,
    whole,
)

ARCHITECTURES = {"chroma": "chroma", "flux": "flux", "flux_kontext": "flux", "flex1": "", "flux_dev": "flux"}
QTYPES = {
    "qfloat8": "fp8-quanto",
    "float8": "fp8-native",
    "qint8": "int8-quanto",
    "int8": "int8-torchao",
    "qint4": "int4-quanto",
    "uint4": "int4-quanto",
    "qint2": "int2-quanto",
    "uint8": "int8-torchao",
}


def _family(options: Mapping[str, Any]) -> str:
    arch = str(options.get("model.arch") or "").lower()
    return ARCHITECTURES.get(arch, "") if arch else "flux" if not is_off(options.get("model.is_flux")) else ""


def _quantized(kind: str) -> Any:
    def convert(value: Any, options: Mapping[str, Any]) -> str:
        if not flag(value):
            raise NothingToSet("not quantized")
        return one_of(QTYPES, "not there; the model is not quantized")(options.get(kind) or "qfloat8", options)

    return convert


def _arch(value: Any, options: Mapping[str, Any]) -> str:
    if str(value).lower() == "flux_kontext":
        return "kontext"
    raise NothingToSet("LoadChroma or LoadFlux, and its flavour by the model's name")


def _density(value: Any, options: Mapping[str, Any]) -> Values:
    named = {
        "sigmoid": ("logit-normal", 1.0),
        "linear": ("uniform", 1.0),
        "shift": ("uniform", 0.0),
        "flux_shift": ("uniform", 0.0),
        "lumina2_shift": ("uniform", 0.0),
    }
    if text(value).lower() not in named:
        raise NotThere("not there; sigmoid there is logit-normal here; auto is used")
    density, shift = named[text(value).lower()]
    return Values({"sigma_density": density, "shift": shift})


def _ema(value: Any, options: Mapping[str, Any]) -> float:
    if not flag(options.get("train.ema_config.use_ema") or False):
        raise NothingToSet("use_ema is off")
    return number(value)


def _guidance(value: Any, options: Mapping[str, Any]) -> float:
    if _family(options) != "flux":
        raise NothingToSet("the CFG scale of Chroma, in ValidateSampler")
    return number(value)


kind = same("lora", "dora", "lokr", instead="not there; lora is used")
attention = one_of(
    {"native": "native", "flash": "flash", "sdpa": "native"}, "not there in training; torch's kernels are used"
)


def _rate(value: Any, options: Mapping[str, Any]) -> float:
    return number(value)


def _is_whole(options: Mapping[str, Any]) -> bool:
    """Return whether the matrices of a LoKr are whole, whatever the rank and alpha."""
    is_lokr = str(options.get("network.type", "")).lower() == "lokr"
    return is_lokr and flag(options.get("network.lokr_full_rank") or False)


def _rank(value: Any, options: Mapping[str, Any]) -> Values:
    if _is_whole(options):
        return Values({"rank": MAX_RANK}, "lokr_full_rank: whole matrices, here up to 1024 features")
    return Values({"rank": whole(value)})


def _alpha(value: Any, options: Mapping[str, Any]) -> Values:
    if _is_whole(options):
        return Values({"alpha": 0.0}, "lokr_full_rank: whole matrices are not scaled")
    return Values({"alpha": number(value)})


def _micro_steps(options: Mapping[str, Any]) -> int:
    """Return how many of its steps are one step of the optimizer. gradient_accumulation is not counted: a step has all of it."""
    value = options.get("train.gradient_accumulation_steps")
    return 1 if value is None else max(1, whole(value))


def _accumulation(value: Any, options: Mapping[str, Any]) -> int:
    unless_zero(value, options)
    own = options.get("train.gradient_accumulation")
    return _micro_steps(options) * (1 if own is None else max(1, whole(own)))


def _steps(field: str) -> Convert:
    """Return a converter of a number of steps, which are those of the optimizer here."""

    def convert(value: Any, options: Mapping[str, Any]) -> Values:
        steps, each = whole(value), _micro_steps(options)
        note = f"{each} steps there are one here, by gradient_accumulation_steps" if each > 1 and steps else ""
        return Values({field: -(-steps // each)}, note)

    return convert


def _offload(value: Any, options: Mapping[str, Any]) -> Values:
    if not flag(value):
        raise NothingToSet("off")
    share = options.get("model.layer_offloading_transformer_percent")
    values = {"group_offload": "block", "offload_share": min(max(number(1.0 if share is None else share), 0.01), 1.0)}
    return Values(values, "by blocks")


loss = one_of({"mse": "mse", "mae": "mae", "pseudo_huber": "huber"}, "not there; mse is used")


def _preservation(value: Any, options: Mapping[str, Any]) -> float:
    return _weight(value, options, "train.diff_output_preservation_multiplier")


def _blank_preservation(value: Any, options: Mapping[str, Any]) -> float:
    return _weight(value, options, "train.blank_prompt_preservation_multiplier")


def _weight(value: Any, options: Mapping[str, Any], name: str) -> float:
    if not flag(value):
        raise NothingToSet("off")
    weight = options.get(name)
    return 1.0 if weight is None else number(weight)


TABLE = Table(
    rows=(
        Row("model.name_or_path", LOAD, "folder", base_model(_family)),
        Row("model.arch", LOAD, "flavour", _arch),
        Row("train.dtype", LOAD, "dtype", precision),
        Row("model.assistant_lora_path", LOAD, "assistant", lambda value, _: _assistant(value)),
        Row("sample.guidance_scale", LOAD, "drawn_guidance", _guidance),
        Row("model.quantize", "QuantizeModel", "level", _quantized("model.qtype")),
        Row("model.quantize_te", "QuantizeModel", "text_encoder", _quantized("model.qtype_te")),
        Row("model.low_vram", "QuantizeModel", "quantize_via", if_on("cpu")),
        Row("name", "LoRATrainer", "name", text),
        Row("network.linear|network.rank", "LoRATrainer", "rank", _rank),
        Row("network.linear_alpha|network.alpha", "LoRATrainer", "alpha", _alpha),
        Row("network.network_kwargs.only_if_contains", "LoRATrainer", "targets", substrings),
        Row("network.type", "AdapterSettings", "kind", kind),
        Row("network.lokr_factor", "AdapterSettings", "lokr_factor", whole),
        Row("network.dropout", "AdapterSettings", "dropout", number),
        Row("network.pretrained_lora_path", "AdapterSettings", "init_lora", model_file("init_lora")),
        Row("save.dtype", "AdapterSettings", "precision", precision),
        Row("train.ema_config.ema_decay", "AdapterSettings", "ema_decay", _ema),
        Row("train.steps", "LoRATrainer", "steps", _steps("steps")),
        Row("train.batch_size", "LoRATrainer", "batch_size", whole),
        Row("train.gradient_accumulation", "LoRATrainer", "accumulation", _accumulation),
        Row("train.gradient_accumulation_steps", "LoRATrainer", "accumulation", _accumulation),
        Row("train.lr", "LoRATrainer", "learning_rate", _rate),
        Row("train.lr_scheduler", "LoRATrainer", "lr_schedule", schedule),
        Row(
            "train.lr_scheduler_params.warmup_steps|train.lr_scheduler_params.num_warmup_steps",
            "LoRATrainer",
            "warmup_steps",
            _steps("warmup_steps"),
        ),
        Row("train.optimizer_params.weight_decay", "LoRATrainer", "weight_decay", number),
        Row("train.max_grad_norm", "LoRATrainer", "max_grad_norm", number),
        Row("train.gradient_checkpointing", "LoRATrainer", "gradient_checkpointing", flag),
        Row("train.timestep_type", "LoRATrainer", "sigma_density", _density),
        Row("train.loss_type", "LoRATrainer", "loss", loss),
        Row("train.diff_output_preservation", "LoRATrainer", "preservation", _preservation),
        Row("train.blank_prompt_preservation", "LoRATrainer", "preservation", _blank_preservation),
        Row("train.optimal_noise_pairing_samples", "LoRATrainer", "noise_choice", whole),
        Row("train.seed|training_seed", "LoRATrainer", "seed", whole),
        Row("save.save_every", "LoRATrainer", "checkpoint_every", _steps("checkpoint_every")),
        Row("save.max_step_saves_to_keep", "LoRATrainer", "keep_checkpoints", whole),
        Row("sample.sample_every", "LoRATrainer", "validate_every", _steps("validate_every")),
        Row("logging.use_wandb", "LoRATrainer", "trackers", if_on("wandb")),
        Row("train.optimizer", "OptimizerSettings", "optimizer", optimizer),
        Row("train.optimizer_params.betas", "OptimizerSettings", "beta1", betas),
        Row("train.optimizer_params.eps", "OptimizerSettings", "eps", number),
        Row("train.optimizer_params.d_coef", "OptimizerSettings", "prodigy_d_coef", number),
        Row("train.optimizer_params.d0", "OptimizerSettings", "prodigy_d0", number),
        Row("train.optimizer_params.use_bias_correction", "OptimizerSettings", "prodigy_bias_correction", if_on(True)),
        Row("train.optimizer_params.safeguard_warmup", "OptimizerSettings", "prodigy_safeguard_warmup", if_on(True)),
        Row("train.lr_scheduler_params.num_cycles", "OptimizerSettings", "lr_num_cycles", whole),
        Row("model.layer_offloading", "MemorySettings", "group_offload", _offload),
        Row("model.compile", "MemorySettings", "compile", flag),
        Row("train.attention_backend", "MemorySettings", "attention", attention),
        Row(
            "sample.prompts|sample.samples",
            "ValidateSampler",
            "prompts",
            lambda value, options: _prompts(value, options),
        ),
        Row("sample.neg", "ValidateSampler", "negative_prompt", text),
        Row("sample.sample_steps", "ValidateSampler", "steps", whole),
        Row("sample.cfg", "ValidateSampler", "cfg", cfg_scale),
        Row("sample.size", "ValidateSampler", "resolutions", text),
        Row("sample.seed", "ValidateSampler", "seed", whole),
    ),
    equal={
        "type": "sd_trainer",
        "training_folder": "files are in output/loras",
        "device": "see --device",
        "performance_log_every": "logs are in the run's folder",
        "trigger_word": "of each folder",
        "network.conv*": "there are no convolutions",
        "save.push_to_hub": "nothing is uploaded",
        "save.save_format": ".safetensors",
        "train.train_unet": "always",
        "train.noise_scheduler": "flow matching",
        "train.ema_config.use_ema": "in ema_decay",
        "train.disable_sampling": "in ValidateSampler",
        "train.skip_first_sample": "the base model's images are the comparison",
        "train.force_first_sample": "always",
        "train.cache_text_embeddings": "always",
        "train.unload_text_encoder": "always",
        "train.content_or_style": "balanced",
        "train.diff_output_preservation_*": "in preservation, and class_word of DatasetBackend",
        "train.blank_prompt_preservation_*": "in preservation",
        "model.is_flux": "LoadFlux",
        "model.qtype*": "in level",
        "model.quantize_kwargs*": "chosen by itself",
        "model.layer_offloading_*": "in offload_share",
        "sample.sampler": "as in ComfyUI",
        "sample.width": "in resolutions",
        "sample.height": "in resolutions",
        "sample.walk_seed": "every prompt has the same seed",
        "sample.sample_start_step": "from the start",
        "sample.num_frames": "is for videos",
        "sample.fps": "is for videos",
        "model.model_kwargs*": "is for other models",
        "logging.*": "set WANDB_PROJECT and WANDB_NAME",
        "sqlite_db_path": "is for its page",
        "network.lokr_full_rank": "in the rank",
        "sample.network_multiplier": "1",
        "network.old_lokr_format": "the file's format is ComfyUI's",
        "save.hf_*": "nothing is uploaded",
        "network.transformer_only": "see targets",
    },
    missing={
        "train.train_text_encoder": "would have trained the text encoders",
        "train.linear_timesteps*": "would have weighted the loss",
        "train.min_denoising_steps": "would have limited the sigmas",
        "train.max_denoising_steps": "would have limited the sigmas",
        "train.timestep_weighing_scheme": "would have weighted the loss",
        "network.network_kwargs.ignore_if_contains": "would have left out layers; see targets",
        "network.network_kwargs.*": "would have tuned the network",
        "network.*": "would have tuned the network",
        "train.noise_offset": "would have added an offset to the noise",
        "train.optimizer_params.*": "would have tuned the optimizer",
        "train.lr_scheduler_params.*": "would have tuned the schedule",
        "train.bypass_guidance_embedding": "would have left out the guidance embedding",
        "model.accuracy_recovery_adapter": "would have repaired the quantization",
        "train.validat*": "would have measured a validation loss; see holdout",
        "validation.*": "would have measured a validation loss; see holdout",
        "train.switch_boundary_every": "is for other models",
        "slider*": "would have trained a slider",
        "train.*": "would have changed the training",
        "model.*": "would have changed the model",
        "sample.*": "would have changed the validation images",
        "save.*": "would have changed the file",
    },
    defaults={
        "network.linear_alpha": 1.0,
        "train.batch_size": 1,
        "train.timestep_type": "sigmoid",
        "train.lr_scheduler_params.warmup_steps": 0,
    },
    usual={"train.content_or_style": "balanced"},
)


def _assistant(value: Any) -> Values:
    name = text(value)
    if name.lower().endswith(".safetensors"):
        return Values({"assistant": file_name(name)}, "by its name in models/loras")
    return Values({"assistant": "by flavour"}, "found by itself for schnell")


def _prompts(value: Any, options: Mapping[str, Any]) -> Any:
    trigger = text(options.get("trigger_word") or "")
    entries = value if isinstance(value, list) else [value]
    prompts = []
    for entry in entries:
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        words = text(prompt).split()
        if " ".join(words):
            prompts.append(" ".join(words).replace("[trigger]", trigger or "[trigger]"))
    if not prompts:
        raise NothingToSet("empty")
    return prompt_text(prompts, "prompt")


def _extension(value: Any, options: Mapping[str, Any]) -> str:
    if text(value).lower().lstrip(".") == "json":
        return "json file"
    if text(value).lower().lstrip(".") not in ("txt", ""):
        raise NotThere("captions are .txt or .json files here; rename them")
    return "textfile"


FOLDERS = Table(
    rows=(
        Row("folder_path|dataset_path", "DatasetBackend", "folder", text),
        Row("caption_ext", "DatasetBackend", "captions", _extension),
        Row("default_caption", "DatasetBackend", "instance_prompt", text),
        Row("trigger_word", "DatasetBackend", "trigger", text),
        Row("resolution", "DatasetBackend", "resolution", number),
        Row("num_repeats", "DatasetBackend", "repeats", whole),
        Row("random_crop", "DatasetBackend", "crop_style", if_on("random")),
        Row("flip_x", "DatasetBackend", "flip", often),
        Row("token_dropout_rate", "DatasetBackend", "tag_dropout", number),
        Row("class_word", "DatasetBackend", "class_word", text),
        Row("shuffle_tokens", "DatasetBackend", "tag_orders", shuffled_tags),
        Row("keep_tokens", "DatasetBackend", "kept_tags", whole),
        Row("mask_path", "DatasetBackend", "masks", text),
        Row("mask_min_value", "DatasetBackend", "unmasked_weight", number),
        Row("control_path", "DatasetBackend", "references", lambda value, _: _control(value)),
        Row("is_reg|prior_reg", "DatasetBackend", "prior_preservation", flag),
        Row("caption_dropout_rate", "LoRATrainer", "caption_dropout", number),
    ),
    equal={
        "cache_*": "caches need no settings",
        "type": "image",
        "bucket_tolerance": "see bucket_step",
        "buckets": "images always go to buckets",
        "enable_ar_bucket": "images always go to buckets",
        "num_frames": "is for videos",
        "fps": "is for videos",
        "do_i2v": "is for videos",
        "shrink_video_to_frames": "is for videos",
        "network_weight": "1",
        "square_crop": "in crop_aspect",
        "extra_values": "none",
        "shrink*": "is for videos",
    },
    missing={
        "flip_y": "would have flipped images",
        "flip_*": "would have flipped images",
        "scale": "would have scaled images",
        "random_scale": "would have scaled images",
        "augments": "would have changed images",
        "augmentations": "would have changed images",
        "random_triggers*": "would have added triggers",
        "alpha_mask": "would have used transparency as a mask",
        "invert_mask": "would have inverted the masks",
        "loss_multiplier": "would have weighted the folder; use repeats, or a column loss_weight of a table",
        "control_path_*": "would have used several references",
        "clip_image_*": "is for other models",
        "inpaint_path": "is for other models",
        "poi": "would have cropped to a point",
    },
    defaults={"resolution": 512, "caption_dropout_rate": 0.0},
    usual={"network_weight": 1.0},
)


def _control(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1:
            raise NotThere(f"{len(value)} references for an image are not there")
        value = value[0]
    return text(value)


def _is_main(value: Any) -> bool:
    config = value.get("config") if isinstance(value, dict) else None
    return isinstance(config, dict) and isinstance(config.get("process"), list)


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    config = file.value["config"]
    process = config["process"][0] if config["process"] else None
    if not isinstance(process, dict):
        raise UserError.at(
            f"{file.path.name}: config.process", "has no process; there should be one of the type sd_trainer"
        )
    sections = {str(name): value for name, value in process.items() if name != "datasets"}
    options = flatten(sections)
    options["name"] = config.get("name") or "my-lora"
    family = _family(options)
    if not family:
        raise refuse(file.path.name, "model.arch", options.get("model.arch"), FAMILIES)
    settings = Settings(family, options)
    if len(config["process"]) > 1:
        settings.missing.append(("config.process", "only the first process is imported"))
    for name in (name for name in file.value if name not in ("config", "job")):
        settings.equal.append((str(name), "titles and versions are not needed"))
    _add_sizes(settings)
    datasets = process.get("datasets")
    for i, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        if isinstance(dataset, dict):
            _add_folders(settings, dataset, f"datasets[{i}]")
    return settings


def _add_sizes(settings: Settings) -> None:
    options = settings.options
    if not is_off(options.get("train.disable_sampling")):
        for name in ("sample.prompts", "sample.samples"):
            options.pop(name, None)
    width, height = options.get("sample.width"), options.get("sample.height")
    if isinstance(width, int) and isinstance(height, int) and not isinstance(width, bool):
        options["sample.size"] = f"{round_edge(width)}x{round_edge(height)}"
    if settings.family == "chroma" and options.get("sample.guidance_scale") is not None:
        options["sample.cfg"] = options["sample.guidance_scale"]


def _add_folders(settings: Settings, dataset: Mapping[str, Any], label: str) -> None:
    """Add a folder once for each of its resolutions."""
    resolutions = dataset.get("resolution")
    several = resolutions if isinstance(resolutions, list) else [resolutions]
    trigger = settings.options.get("trigger_word")
    is_preserving = not is_off(settings.options.get("train.diff_output_preservation"))
    class_word = settings.options.get("train.diff_output_preservation_class", "person") if is_preserving else None
    for resolution in several:
        options: dict[str, Any] = {
            **({"trigger_word": trigger} if trigger else {}),
            **({"class_word": class_word} if class_word else {}),
            **dataset,
            "resolution": resolution,
        }
        place = f"{label} at {shorten(resolution)}" if len(several) > 1 else label
        settings.folders.append(Folder(place, options))


TRAINER = Trainer("ai-toolkit", _is_main, _read, TABLE, FOLDERS)
