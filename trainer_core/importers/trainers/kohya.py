"""kohya's sd-scripts: command lines, --config_file and dataset TOML of flux_train_network.py; GUI files through it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...storage.bounded_files import Unusable
from ..option_table import LOAD, Folder, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values
from ..source_files import ConfigFile, SourceFiles
from ..value_readers import (
    all_linears,
    alpha_of_rank,
    base_model,
    betas,
    blocks_to_swap,
    bucketed,
    cfg_scale,
    flag,
    huber_loss,
    huber_option,
    huber_schedule,
    if_on,
    is_off,
    model_file,
    number,
    often,
    one_of,
    optimizer,
    pairs,
    precision,
    prompt_text,
    round_edge,
    same,
    schedule,
    shorten,
    shuffled_tags,
    table_file,
    text,
    unless_zero,
    whole,
)

MODULES = {
    "networks.lora_flux": "lora",
    "networks.lora": "lora",
    "lycoris.kohya": "lora",
    "networks.oft_flux": "oft",
    "networks.oft": "oft",
}
PROMPT_OPTION = re.compile(r"\s--([a-z]+)\s+([^-][^\s]*(?:\s(?!--)[^\s]+)*)")
SECTIONS = ("general", "datasets")


def family_of(options: Mapping[str, Any]) -> str:
    return "chroma" if str(options.get("model_type", "")).lower() == "chroma" else "flux"


def _sampling(value: Any, options: Mapping[str, Any]) -> Values:
    name = text(value).lower()
    if name not in ("sigma", "uniform", "sigmoid", "shift", "flux_shift"):
        raise NotThere("not there; auto is used")
    given = options.get("discrete_flow_shift")
    shift = {"uniform": 1.0, "sigmoid": 1.0, "flux_shift": 0.0}.get(name)
    shift = number(3.0 if given is None else given) if shift is None else shift
    if name == "sigma":  # the sigmas of a scheduler, which are shifted, drawn as weighting_scheme says
        density = {"logit_normal": "logit-normal", "mode": "mode"}.get(str(options.get("weighting_scheme")), "uniform")
        return Values({"sigma_density": density, "shift": shift}, "by weighting_scheme and discrete_flow_shift")
    return Values({"sigma_density": "uniform" if name == "uniform" else "logit-normal", "shift": shift})


def _guidance(value: Any, options: Mapping[str, Any]) -> float:
    guidance = number(value)
    if family_of(options) == "chroma" or guidance == 0:
        raise NothingToSet("Chroma has no guidance embedding")
    return guidance


def _learning_rate(value: Any, options: Mapping[str, Any]) -> float:
    return number(value[0] if isinstance(value, list) and value else value)


def _mask(value: Any, options: Mapping[str, Any]) -> str:
    if not flag(value):
        raise NothingToSet("off")
    if family_of(options) == "chroma":
        raise NothingToSet("Chroma's text is trimmed, which equals the mask")
    return "on"


attention_mode = one_of(
    {"torch": "native", "sdpa": "native", "flash": "flash"}, "not there in training; torch's kernels are used"
)


def _steps(value: Any, options: Mapping[str, Any]) -> int:
    if not is_off(options.get("max_train_epochs")):
        raise NothingToSet("max_train_epochs counts")
    return unless_zero(value, options)


def _indices(kind: str) -> Any:
    def convert(value: Any, options: Mapping[str, Any]) -> str:
        raise NotThere(f"set targets to {kind}.N.* for each block, or block_lr of AdapterSettings to 0 for the others")

    return convert


def _warmup(value: Any, options: Mapping[str, Any]) -> int:
    steps, total = number(value), number(options.get("max_train_steps") or 0)
    return round(steps * total) if 0 < steps < 1 else whole(steps)


def _weighting(value: Any, options: Mapping[str, Any]) -> str:
    kind = text(options.get("model_prediction_type") or "sigma_scaled")
    if kind != "sigma_scaled":
        raise NothingToSet(f"weights no loss with model_prediction_type {kind}")
    return WEIGHTING(value, options)


WEIGHTING = one_of(
    {
        "none": "none",
        "sigma_sqrt": "sigma_sqrt",
        "cosmap": "cosmap",
        "logit_normal": NothingToSet("of the density: see sigma_density"),
        "mode": NothingToSet("of the density: see sigma_density"),
    },
    "not there; none is used",
)

TABLE = Table(
    rows=(
        Row("pretrained_model_name_or_path", LOAD, "folder", base_model(family_of)),
        Row("t5xxl", LOAD, "t5", model_file("t5")),
        Row("clip_l", LOAD, "clip", model_file("clip")),
        Row("ae|vae", LOAD, "vae", model_file("vae")),
        Row("mixed_precision", LOAD, "dtype", precision),
        Row("guidance_scale", LOAD, "guidance", _guidance),
        Row("apply_t5_attn_mask", LOAD, "attention_mask", _mask),
        Row("t5xxl_max_token_length", LOAD, "text_tokens", whole),
        Row("sample.g", LOAD, "drawn_guidance", _guidance),
        Row("fp8_base|fp8_base_unet", "QuantizeModel", "level", if_on("fp8-native")),
        Row("output_name", "LoRATrainer", "name", text),
        Row("network_dim", "LoRATrainer", "rank", whole),
        Row("network_alpha", "LoRATrainer", "alpha", alpha_of_rank("network_dim", 4, "network_args.algo")),
        Row("network_module", "LoRATrainer", "targets", all_linears),
        Row("max_train_steps", "LoRATrainer", "steps", _steps),
        Row("max_train_epochs", "LoRATrainer", "epochs", unless_zero),
        Row("train_batch_size|batch_size", "LoRATrainer", "batch_size", whole),
        Row("gradient_accumulation_steps", "LoRATrainer", "accumulation", unless_zero),
        Row("unet_lr|learning_rate", "LoRATrainer", "learning_rate", _learning_rate),
        Row("lr_scheduler", "LoRATrainer", "lr_schedule", schedule),
        Row("lr_warmup_steps", "LoRATrainer", "warmup_steps", _warmup),
        Row("optimizer_args.weight_decay", "LoRATrainer", "weight_decay", number),
        Row("max_grad_norm", "LoRATrainer", "max_grad_norm", number),
        Row("gradient_checkpointing", "LoRATrainer", "gradient_checkpointing", flag),
        Row("timestep_sampling", "LoRATrainer", "sigma_density", _sampling),
        Row("loss_type", "LoRATrainer", "loss", huber_loss),
        Row("huber_c", "LoRATrainer", "huber_c", huber_option("loss_type", number)),
        Row("huber_schedule", "LoRATrainer", "huber_c", huber_option("loss_type", huber_schedule)),
        Row("weighting_scheme", "LoRATrainer", "loss_weighting", _weighting),
        Row("seed", "LoRATrainer", "seed", whole),
        Row("save_every_n_steps", "LoRATrainer", "checkpoint_every", unless_zero),
        Row("save_last_n_steps_state", "LoRATrainer", "keep_checkpoints", unless_zero),
        Row("sample_every_n_steps", "LoRATrainer", "validate_every", unless_zero),
        Row("validation_split", "LoRATrainer", "holdout", number),
        Row(
            "log_with",
            "LoRATrainer",
            "trackers",
            one_of({"tensorboard": "tensorboard", "wandb": "wandb", "all": "tensorboard+wandb"}),
        ),
        Row(
            "network_args.algo",
            "AdapterSettings",
            "kind",
            same("lora", "loha", "lokr", instead="not there; lora is used"),
        ),
        Row("kind", "AdapterSettings", "kind", text),
        Row("network_args.dora_wd", "AdapterSettings", "kind", if_on("dora")),
        Row("network_args.factor", "AdapterSettings", "lokr_factor", whole),
        Row("network_args.train_double_block_indices", "AdapterSettings", "block_lr", _indices("transformer_blocks")),
        Row(
            "network_args.train_single_block_indices",
            "AdapterSettings",
            "block_lr",
            _indices("single_transformer_blocks"),
        ),
        Row("network_weights", "AdapterSettings", "init_lora", model_file("init_lora")),
        Row("network_dropout", "AdapterSettings", "dropout", number),
        Row("save_precision", "AdapterSettings", "precision", precision),
        Row("optimizer_type", "OptimizerSettings", "optimizer", optimizer),
        Row("optimizer_args.betas", "OptimizerSettings", "beta1", betas),
        Row("optimizer_args.eps", "OptimizerSettings", "eps", number),
        Row("optimizer_args.d_coef", "OptimizerSettings", "prodigy_d_coef", number),
        Row("optimizer_args.d0", "OptimizerSettings", "prodigy_d0", number),
        Row("optimizer_args.use_bias_correction", "OptimizerSettings", "prodigy_bias_correction", if_on(True)),
        Row("optimizer_args.safeguard_warmup", "OptimizerSettings", "prodigy_safeguard_warmup", if_on(True)),
        Row("optimizer_args.scale_parameter", "OptimizerSettings", "adafactor_scale_parameter", flag),
        Row("lr_scheduler_num_cycles", "OptimizerSettings", "lr_num_cycles", whole),
        Row("lr_scheduler_power", "OptimizerSettings", "lr_power", number),
        Row("lr_scheduler_min_lr_ratio", "OptimizerSettings", "lr_min_ratio", number),
        Row("blocks_to_swap", "MemorySettings", "group_offload", blocks_to_swap),
        Row("cpu_offload_checkpointing", "MemorySettings", "activation_offload", flag),
        Row("torch_compile", "MemorySettings", "compile", flag),
        Row("attn_mode", "MemorySettings", "attention", attention_mode),
        Row("sample.prompts", "ValidateSampler", "prompts", text),
        Row("sample.n", "ValidateSampler", "negative_prompt", text),
        Row("sample.s", "ValidateSampler", "steps", whole),
        Row("sample.l", "ValidateSampler", "cfg", cfg_scale),
        Row("sample.d", "ValidateSampler", "seed", whole),
        Row("sample.sizes", "ValidateSampler", "resolutions", text),
    ),
    equal={
        "model_type": "LoadChroma or LoadFlux",
        "discrete_flow_shift": "in shift",
        "sdpa": "torch's kernels are the default",
        "cache_*": "caches need no settings",
        "vae_batch_size": "chosen by itself",
        "network_train_unet_only": "text encoders are never trained",
        "save_model_as": ".safetensors",
        "output_dir": "files are in output/loras",
        "dataset_config": "its folders are listed below",
        "config_file": "its options are listed",
        "sample_prompts": "its prompts are taken over",
        "optimizer_args": "its entries are listed",
        "network_args": "its entries are listed",
        "max_data_loader_n_workers": "chosen by itself",
        "persistent_data_loader_workers": "chosen by itself",
        "full_bf16": "see the optimizer adamw_bf16",
        "highvram": "chosen by itself",
        "lowram": "chosen by itself",
        "logging_dir": "in the run's folder",
        "log_prefix": "the run's name",
        "log_tracker_*": "set WANDB_PROJECT",
        "wandb_*": "set WANDB_NAME",
        "no_metadata": "metadata has no paths and no date",
        "training_comment": "the workflow is in the file",
        "caption_extension": "in captions",
        "reg_data_dir": "see prior_preservation",
        "train_data_dir": "its folder is listed below",
        "resolution": "of the folders",
        "enable_bucket": "images always go to buckets",
        "min_bucket_reso": "by the resolution",
        "max_bucket_reso": "by the resolution",
        "bucket_no_upscale": "see min_size",
        "bucket_reso_steps": "of the folders",
        "shuffle_caption": "of the folders",
        "keep_tokens": "of the folders",
        "save_every_n_epochs": "see checkpoint_every",
        "sample_every_n_epochs": "see validate_every",
        "save_state": "every checkpoint can be resumed from",
        "save_state_on_train_end": "always",
        "resume": "a run with the same settings resumes by itself",
        "prior_loss_weight": "see prior_preservation",
        "masked_loss": "in masks",
        "caption_dropout_rate": "of the folders",
        "metadata_*": "title and trigger are in the file",
        "huber_*": "of a loss that is not used",
        "no_half_vae": "the VAE's precision is right by itself",
        "sample_sampler": "as in ComfyUI",
        "model_prediction_type": "raw: the model predicts the velocity",
        "disable_mmap_load_safetensors": "chosen by itself",
        "sigmoid_scale": "1",
        "sample_at_first": "always",
        "optimizer_args.relative_step": "off",
        "optimizer_args.warmup_init": "off",
        "optimizer_args.decouple": "on",
        "network_args.preset": "in targets",
        "network_args.split_qkv": "always: each of q, k and v has its own LoRA",
        "network_args.conv_*": "there are no convolutions",
        "text_encoder_lr": "text encoders are never trained",
        "num_cpu_threads_per_process": "chosen by itself",
        "gpu_ids": "see --device",
        "mem_eff_attn": "torch's kernels are the default",
        "console_log_*": "logs are in the run's folder",
    },
    missing={
        "xformers": "would have used other kernels; torch's are used",
        "noise_offset*": "would have added an offset to the noise",
        "ip_noise_gamma*": "would have added noise to the input",
        "multires_noise_*": "would have changed the noise",
        "min_snr_gamma": "is not for flow matching",
        "scale_weight_norms": "would have limited the weights",
        "network_args.train_t5xxl": "would have trained T5",
        "network_args.*": "would have tuned the network",
        "optimizer_args.*": "would have tuned the optimizer",
        "fused_backward_pass": "would have saved memory",
        "controlnet_*": "would have used a ControlNet",
        "train_t5xxl": "would have trained T5",
        "blockwise_fused_optimizers": "would have saved memory",
        "huggingface_*": "would have uploaded the LoRA",
        "flip_aug": "of the folders",
        "caption_prefix": "of the folders",
        "caption_suffix": "of the folders",
        "caption_tag_dropout_rate": "of the folders",
        "in_json": "see table of DatasetBackend",
        "color_aug": "would have changed colors",
        "random_crop": "of the folders",
        "logit_*": "would have shaped the density",
        "mode_scale": "would have shaped the density",
        "base_weights*": "would have merged LoRAs into the base",
        "max_token_length": "is for Stable Diffusion",
        "clip_skip": "is for Stable Diffusion",
        "sample.*": "would have changed the validation images",
        "ddp_*": "would have used several GPUs",
        "multi_gpu": "would have used several GPUs",
        "alpha_mask": "would have used transparency as a mask",
        "secondary_separator": "would have split captions",
        "wildcard": "would have chosen words",
        "lr_*": "would have shaped the learning rate",
        "min_timestep": "would have limited the sigmas",
        "max_timestep": "would have limited the sigmas",
    },
    defaults={
        "network_dim": 4,
        "network_alpha": 1.0,
        "max_train_steps": 1600,
        "lr_warmup_steps": 0,
        "timestep_sampling": "sigma",
    },
    usual={
        "sigmoid_scale": 1,
        "model_prediction_type": "raw",
        "network_train_unet_only": True,
    },
)


def _resolution(value: Any, options: Mapping[str, Any]) -> float:
    edges = value if isinstance(value, list) else re.split(r"[,x]", str(value))
    numbers = [number(edge) for edge in edges] or [1024.0]
    return numbers[0] if len(numbers) < 2 else round(abs(numbers[0] * numbers[1]) ** 0.5)


def _extension(value: Any, options: Mapping[str, Any]) -> str:
    if text(value).lower().lstrip(".") != "txt":
        raise NotThere("captions are .txt files here; rename them")
    return "textfile"


def _class_tokens(value: Any, options: Mapping[str, Any]) -> Values:
    if options.get("caption_extension"):
        raise NothingToSet("is for images without a caption; those are handled by on_broken")
    return Values({"instance_prompt": text(value), "captions": "instance prompt"})


FOLDERS = Table(
    rows=(
        Row("image_dir", "DatasetBackend", "folder", text),
        Row("caption_extension", "DatasetBackend", "captions", _extension),
        Row("class_tokens", "DatasetBackend", "instance_prompt", _class_tokens),
        Row("caption_prefix", "DatasetBackend", "caption_prefix", text),
        Row("caption_suffix", "DatasetBackend", "caption_suffix", text),
        Row("metadata_file", "DatasetBackend", "table", table_file),
        Row("resolution", "DatasetBackend", "resolution", _resolution),
        Row("num_repeats", "DatasetBackend", "repeats", whole),
        Row(
            "bucket_reso_steps",
            "DatasetBackend",
            "bucket_step",
            same("64", "32", "16", instead="not there; auto is used"),
        ),
        Row("enable_bucket", "DatasetBackend", "crop_aspect", bucketed),
        Row("random_crop", "DatasetBackend", "crop_style", if_on("random")),
        Row("flip_aug", "DatasetBackend", "flip", often),
        Row("caption_tag_dropout_rate", "DatasetBackend", "tag_dropout", number),
        Row("shuffle_caption", "DatasetBackend", "tag_orders", shuffled_tags),
        Row("keep_tokens", "DatasetBackend", "kept_tags", whole),
        Row("is_reg", "DatasetBackend", "prior_preservation", flag),
        Row("conditioning_data_dir", "DatasetBackend", "masks", text),
        Row("caption_dropout_rate", "LoRATrainer", "caption_dropout", number),
        Row("batch_size", "LoRATrainer", "batch_size", whole),
        Row("validation_split", "LoRATrainer", "holdout", number),
    ),
    equal={
        "min_bucket_reso": "by the resolution",
        "max_bucket_reso": "by the resolution",
        "cache_info": "caches need no settings",
        "bucket_no_upscale": "see min_size",
        "validation_seed": "of the run",
        "interpolation_type": "as resized by Lanczos",
        "resize_interpolation": "as resized by Lanczos",
    },
    missing={
        "color_aug": "would have changed colors",
        "face_crop_aug_range": "would have cropped around faces; see crop_style boxes",
        "caption_dropout_every_n_epochs": "would have left out captions",
        "keep_tokens_separator": "see kept_tags",
        "caption_separator": "tags are separated by commas",
        "secondary_separator": "would have split captions",
        "enable_wildcard": "several lines in a caption do that",
        "alpha_mask": "would have used transparency as a mask",
        "token_warmup_*": "would have revealed tags",
        "skip_image_resolution": "see min_size",
        "network_multiplier": "would have scaled the LoRA",
        "custom_attributes": "would have been for scripts; see class_word for diff_output_preservation",
    },
    defaults={"resolution": 512, "caption_dropout_rate": 0.0, "enable_bucket": False},
)


def is_main(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    names = {str(name) for name in value} | {
        str(key) for part in value.values() if isinstance(part, dict) for key in part
    }
    return bool(names & {"network_module", "network_dim", "dataset_config", "config_file"}) and "LoRA_type" not in names


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    options = _flat(file.value)
    if not is_off(options.get("config_file")):
        name = text(options["config_file"])
        name = name if name.endswith(".toml") else f"{name}.toml"
        options = {**_flat(files.referenced(name, file, "config_file").value), **options}
    return read_options(options, file, files)


def _flat(value: Any) -> dict[str, Any]:
    """Return the options of a --config_file, whose sections have no meaning, or of a command line."""
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        flat.update(item if isinstance(item, dict) and key not in SECTIONS else {key: item})
    return flat


def read_options(options: dict[str, Any], file: ConfigFile, files: SourceFiles) -> Settings:
    """Return the settings of flux_train_network.py's options."""
    module = str(options.get("network_module", "networks.lora_flux"))
    if module not in MODULES:
        raise UserError.at(f"{file.path.name}: network_module", f"{shorten(module)} is not for Flux or Chroma")
    settings = Settings(family_of(options), options)
    for name in ("network_args", "optimizer_args"):
        options.update({f"{name}.{key}": value for key, value in pairs(options.get(name)).items()})
    if MODULES[module] != "lora" and "network_args.algo" not in options:
        options["kind"] = MODULES[module]
    _add_prompts(settings, file, files)
    if not is_off(options.get("dataset_config")):
        config = files.referenced(options["dataset_config"], file, "dataset_config").value
        add_datasets(settings, config if isinstance(config, dict) else {})
    elif isinstance(options.get("train_data_dir"), str):
        _add_directory(settings)
    return settings


def _add_prompts(settings: Settings, file: ConfigFile, files: SourceFiles) -> None:
    name = settings.options.get("sample_prompts")
    if is_off(name):
        return
    try:
        lines = files.lines(text(name), file)
    except (OSError, Unusable, UnicodeDecodeError):
        settings.missing.append(
            ("sample_prompts", f"{shorten(name)} can't be read, so no validation images are sampled")
        )
        return
    add_prompt_lines(settings, lines)


def add_prompt_lines(settings: Settings, lines: list[str]) -> None:
    """Take over prompts with their options, such as `a cat --w 1024 --h 1024`. Options of the first count."""
    prompts, sizes = [], []
    for line in filter(None, (line.strip() for line in lines)):
        if line.startswith("#"):
            continue
        found = dict(PROMPT_OPTION.findall(line))
        prompts.append(re.split(r"\s--", line)[0].strip())
        if found.get("w", "").isdecimal() and found.get("h", "").isdecimal():
            sizes.append("x".join(str(round_edge(int(found[side][:6]))) for side in ("w", "h")))
        for key, value in found.items():
            if key not in ("w", "h"):
                settings.options.setdefault(f"sample.{key}", value)
    if prompts:
        settings.options["sample.prompts"] = prompt_text(prompts, "prompt", keeps_copies=True)
    if sizes:
        settings.options["sample.sizes"] = ", ".join(dict.fromkeys(sizes))


def add_datasets(settings: Settings, config: Mapping[str, Any]) -> None:
    """Add the folders of a dataset TOML. A subset's options go before its dataset's, and these before [general]."""
    general = config.get("general")
    shared: dict[str, Any] = general if isinstance(general, dict) else {}
    datasets = config.get("datasets")
    for i, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        own = {**shared, **dataset} if isinstance(dataset, dict) else {}
        subsets = own.pop("subsets", None)
        for j, subset in enumerate(subsets if isinstance(subsets, list) else []):
            if isinstance(subset, dict):
                options = {**own, **subset}
                settings.folders.append(Folder(f"datasets[{i}].subsets[{j}]", options))
    has_own_size = any(folder.options.get("batch_size") is not None for folder in settings.folders)
    if has_own_size and (size := settings.options.pop("train_batch_size", None)) is not None:
        settings.equal.append(("train_batch_size", f"{shorten(size)}: the datasets have their own, which counts"))


def _add_directory(settings: Settings) -> None:
    """Add --train_data_dir. Its subfolders are named REPEATS_NAME, which here are one folder."""
    names = {row.theirs for row in FOLDERS.rows} - {"batch_size", "validation_split"}
    shared = {name: settings.options[name] for name in names if settings.options.get(name) is not None}
    options = {**shared, "image_dir": settings.options["train_data_dir"]}
    for name in names:
        settings.options.pop(name, None)
    text_line = "subfolders named REPEATS_NAME are read as one folder; add a DatasetBackend for each, with its repeats"
    settings.missing.append(("train_data_dir", text_line))
    settings.folders.append(Folder("train_data_dir", options))


TRAINER = Trainer("kohya", is_main, _read, TABLE, FOLDERS)
