"""SimpleTuner: config.json or config.env, its multidatabackend.json and its prompt library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...config.adapter import FULL
from ...config.validation import CLIP, CLIP_REPO
from ...models.loading.locate import is_hub_id
from ..option_table import LOAD, Folder, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values, Wrong
from ..source_files import ConfigFile, SourceFiles, parse_words
from ..value_readers import (
    FAMILIES,
    MAX_RANK,
    alpha_of_rank,
    aspect_list,
    attention,
    base_model,
    cfg_scale,
    file_name,
    flag,
    huber_loss,
    huber_option,
    huber_schedule,
    if_on,
    is_off,
    model_file,
    number,
    one_of,
    optimizer,
    precision,
    refuse,
    same,
    schedule,
    shorten,
    sizes,
    table_file,
    text,
    unless_zero,
    whole,
)

# Names in config.env that are not the option's name in capitals.
ENVIRONMENT = {
    "model_name": "pretrained_model_name_or_path",
    "max_num_steps": "max_train_steps",
    "num_epochs": "num_train_epochs",
    "lr_schedule": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "train_batch_size": "train_batch_size",
    "dataloader_config": "data_backend_config",
    "training_seed": "seed",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "caption_dropout_probability": "caption_dropout_probability",
    "checkpointing_limit": "checkpoints_total_limit",
    "base_dir": "base_dir",
    "training_dynamo_backend": "dynamo_backend",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
ROUTE = {"selection_ratio": "routed_share", "start_layer_idx": "route_first", "end_layer_idx": "route_last"}
LEVELS = {
    **{
        name: name
        for name in (
            "int8-quanto",
            "int4-quanto",
            "int2-quanto",
            "fp8-quanto",
            "nf4-bnb",
            "int8-bnb",
            "int8-torchao",
            "fp8-torchao",
        )
    },
    "bnb-nf4": "nf4-bnb",
    "fp8uz-quanto": "fp8-quanto",
    "no_change": NothingToSet("not quantized"),
    "bf16": NothingToSet("not quantized"),
    "fp16": NothingToSet("not quantized"),
    "fp32": NothingToSet("not quantized"),
}
# Options of the main file that count for every backend without its own.
INHERITED = (
    "resolution", "resolution_type", "minimum_image_size", "caption_strategy", "instance_prompt", "aspect_bucket_alignment",
)  # fmt: skip
level = one_of(LEVELS, "not there; the model is not quantized")
DEFAULT_SHIFT = 3  # its Chroma remaps the noise levels by itself, and its guide says that no shift is needed
ROLLOUT_STEP = 40  # of their timesteps: 0.04 in sigma


def _family(options: Mapping[str, Any]) -> str:
    return str(options.get("model_family", "")).strip().lower()


def _steps(value: Any, options: Mapping[str, Any]) -> int:
    steps = whole(value)
    if steps <= 0:
        raise NothingToSet("num_train_epochs counts")
    return steps


def _rollout_steps(value: Any, options: Mapping[str, Any]) -> Values:
    steps = max(1, round(number(value) / ROLLOUT_STEP))
    return Values({"rollout_steps": steps}, "a step is 0.04 in sigma, as 40 there")


def _shift(value: Any, options: Mapping[str, Any]) -> float:
    shift = number(value)
    if shift <= 0:
        raise NothingToSet("no shift")
    if flag(options.get("flow_schedule_auto_shift") or False):
        raise NothingToSet("flow_schedule_auto_shift counts")
    return shift


def _warmup(value: Any, options: Mapping[str, Any]) -> int:
    if str(options.get("lr_scheduler")).lower() == "constant":
        return 0
    return whole(value)


def _density(value: Any, options: Mapping[str, Any]) -> str:
    """Return the density of the family, which model_family stands for."""
    for option, name in (("flow_use_uniform_schedule", "uniform"), ("flow_use_beta_schedule", "beta")):
        if flag(options.get(option) or False):
            return name
    return "quadratic_tail" if _family(options) == "chroma" else "logit-normal"


def _route(value: Any, options: Mapping[str, Any]) -> Values:
    try:
        config = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        config = None
    routes = config.get("routes") if isinstance(config, dict) else None
    if not isinstance(routes, list) or not routes or not isinstance(routes[0], dict):
        raise Wrong(f"{shorten(value)} has no list of routes")
    fields = {ROUTE[name]: number(item) for name, item in routes[0].items() if name in ROUTE}
    share = fields.get("routed_share", 0.0)
    note = f"the first of {len(routes)} routes" if len(routes) > 1 else ""
    return Values({**fields, "routed_share": share}, note)


def _is_full(options: Mapping[str, Any]) -> bool:
    return str(options.get("model_type")).lower() == FULL


def _model_type(value: Any, options: Mapping[str, Any]) -> str:
    if not _is_full(options):
        raise NothingToSet("the kind is that of lora_type")
    return FULL


def _tread_target(value: Any, options: Mapping[str, Any]) -> str:
    if _is_full(options):
        raise NothingToSet("the whole model is trained")
    name = text(value).strip()
    if name in ("fal", "controlnet", "all+ffs+embedder+controlnet"):
        raise NotThere("not there; the default, all, is used")
    return name


def _max_grad_norm(value: Any, options: Mapping[str, Any]) -> float:
    if str(options.get("grad_clip_method", "value")) == "value":
        raise NotThere("limits each element there; here the norm of the gradient is limited, to 1")
    return number(value)


PICKLED_CLIP = "openai/clip-vit-large-patch14-336"  # SimpleTuner's default, published without safetensors


def _score(value: Any, options: Mapping[str, Any]) -> Values:
    """Return which scores the validation images get. SimpleTuner's model is a pickle file unless another is set."""
    if is_off(value) or text(value).strip().lower() == "none":
        raise NothingToSet("none, as here")
    if text(value).strip().lower() != CLIP:
        raise NotThere("not there; there is clip")
    return Values({"score": CLIP}, "CLIP scores, and with holdout the likeness to held-out images")


def _score_model(value: Any, options: Mapping[str, Any]) -> Any:
    """Return the CLIP model of the scores: a repository. A folder there is none here."""
    if text(options.get("evaluation_type", "")).strip().lower() != CLIP:
        raise NothingToSet("images are not scored")
    name = text(value).strip()
    if name == PICKLED_CLIP:
        raise NotThere(f"is published as a pickle file, which is not read; {CLIP_REPO} scores the images")
    if not is_hub_id(name):
        raise NotThere(f"{shorten(name)} is not a Hugging Face repository; put its folder into models/clip_vision")
    return name


def _validation_guidance(value: Any, options: Mapping[str, Any]) -> float:
    if _family(options) == "chroma":
        raise NothingToSet("Chroma has no guidance embedding; validation_guidance_real is its CFG scale")
    return number(value)


trackers = one_of(
    {"none": NothingToSet("none"), "tensorboard": "tensorboard", "wandb": "wandb", "all": "tensorboard+wandb"},
    "not there; there is tensorboard and wandb",
)


def _ema(value: Any, options: Mapping[str, Any]) -> Any:
    if not flag(options.get("use_ema") or False):
        raise NothingToSet("use_ema is off")
    return number(value)


def _vae_file(value: Any, options: Mapping[str, Any]) -> Values:
    if str(value).lower().endswith(".safetensors"):
        return Values({"vae": file_name(value)}, "by its name in models/vae")
    raise NothingToSet("all flavours have the same VAE")


def _transformer(value: Any, options: Mapping[str, Any]) -> Values:
    name = text(value).strip()
    if not name or name.lower() == "none":
        raise NothingToSet("from the flavour")
    return Values({"diffusion_model": file_name(name) if name.lower().endswith(".safetensors") else name})


def _attention(value: Any, options: Mapping[str, Any]) -> Any:
    if str(value).startswith("sageattention"):
        raise NotThere("not there in training; set attention of ValidateSampler to sage for the validation images")
    return attention(value, options)


OFFLOAD = same("block", "leaf")
TABLE = Table(
    rows=(
        Row(
            "model_flavour",
            LOAD,
            "flavour",
            same(
                "hd",
                "base",
                "flash",
                "krea",
                "dev",
                "schnell",
                "kontext",
                "fluxbooru",
                "libreflux",
                instead="not there; set flavour of the loader to the nearest",
            ),
        ),
        Row("pretrained_model_name_or_path", LOAD, "folder", base_model(_family)),
        Row("pretrained_transformer_model_name_or_path", LOAD, "diffusion_model", _transformer),
        Row("pretrained_t5_model_name_or_path", LOAD, "t5", model_file("t5")),
        Row("pretrained_vae_model_name_or_path|vae_path", LOAD, "vae", _vae_file),
        Row("mixed_precision", LOAD, "dtype", precision),
        Row("base_model_default_dtype", LOAD, "dtype", precision),
        Row("flux_guidance_value|flux_guidance_scale", LOAD, "guidance", number),
        Row("flux_attention_masked_training", LOAD, "attention_mask", if_on("on")),
        Row("flux_t5_padding", LOAD, "t5_padding", same("unmodified", "zero")),
        Row("flux_fast_schedule", LOAD, "noise_levels", if_on("by flavour", "the densities below")),
        Row("assistant_lora_path", LOAD, "assistant", model_file("assistant")),
        Row("tokenizer_max_length", LOAD, "text_tokens", whole),
        Row("validation_guidance", LOAD, "drawn_guidance", _validation_guidance),
        Row("base_model_precision", "QuantizeModel", "level", level),
        Row("text_encoder_1_precision|text_encoder_2_precision", "QuantizeModel", "text_encoder", level),
        Row("quantize_via", "QuantizeModel", "quantize_via", same("accelerator", "cpu")),
        Row("lora_rank|network_rank", "LoRATrainer", "rank", whole),
        Row("lora_alpha", "LoRATrainer", "alpha", number),
        Row("flux_lora_target", "LoRATrainer", "targets", _tread_target),
        Row(
            "lora_init_type",
            "LoRATrainer",
            "init",
            same(
                "default",
                "gaussian",
                "pissa",
                "olora",
                "eva",
                "loftq",
                "orthogonal",
                instead="not there; default is used",
            ),
        ),
        Row("max_train_steps", "LoRATrainer", "steps", _steps),
        Row("num_train_epochs", "LoRATrainer", "epochs", unless_zero),
        Row("train_batch_size", "LoRATrainer", "batch_size", whole),
        Row("gradient_accumulation_steps", "LoRATrainer", "accumulation", unless_zero),
        Row("learning_rate", "LoRATrainer", "learning_rate", number),
        Row("lr_scheduler", "LoRATrainer", "lr_schedule", schedule),
        Row("lr_warmup_steps", "LoRATrainer", "warmup_steps", _warmup),
        Row("adam_weight_decay|weight_decay", "LoRATrainer", "weight_decay", number),
        Row("max_grad_norm", "LoRATrainer", "max_grad_norm", _max_grad_norm),
        Row("gradient_checkpointing", "LoRATrainer", "gradient_checkpointing", flag),
        Row("model_family", "LoRATrainer", "sigma_density", _density),
        Row("flow_schedule_shift|flux_schedule_shift", "LoRATrainer", "shift", _shift),
        Row("flow_schedule_auto_shift|flux_schedule_auto_shift", "LoRATrainer", "shift", if_on(0.0)),
        Row("caption_dropout_probability", "LoRATrainer", "caption_dropout", number),
        Row("seed", "LoRATrainer", "seed", whole),
        Row("checkpointing_steps|checkpoint_step_interval", "LoRATrainer", "checkpoint_every", whole),
        Row("checkpoints_total_limit", "LoRATrainer", "keep_checkpoints", whole),
        Row("validation_steps|validation_step_interval", "LoRATrainer", "validate_every", whole),
        Row("scheduled_sampling_probability", "LoRATrainer", "rollout_probability", number),
        Row("scheduled_sampling_max_step_offset", "LoRATrainer", "rollout_steps", _rollout_steps),
        Row("tread_config", "LoRATrainer", "routed_share", _route),
        Row("report_to", "LoRATrainer", "trackers", trackers),
        Row("num_eval_images", "LoRATrainer", "eval_images", whole),
        Row("loss_type", "LoRATrainer", "loss", huber_loss),
        Row("huber_c", "LoRATrainer", "huber_c", huber_option("loss_type", number)),
        Row("huber_schedule", "LoRATrainer", "huber_c", huber_option("loss_type", huber_schedule)),
        Row("lora_type", "AdapterSettings", "kind", one_of({"standard": "lora", "lycoris": "lokr"})),
        Row("use_dora", "AdapterSettings", "kind", if_on("dora")),
        Row(
            "lycoris_config.algo",
            "AdapterSettings",
            "kind",
            same("lokr", "loha", "lora", instead="not there; lora is used"),
        ),
        Row("lycoris_config.linear_dim", "LoRATrainer", "rank", lambda value, _: min(whole(value), MAX_RANK)),
        Row(
            "lycoris_config.linear_alpha",
            "LoRATrainer",
            "alpha",
            alpha_of_rank("lycoris_config.linear_dim", 16, "lycoris_config.algo"),
        ),
        Row("lycoris_config.factor", "AdapterSettings", "lokr_factor", whole),
        Row("model_type", "AdapterSettings", "kind", _model_type),
        Row("lora_format", "AdapterSettings", "format", one_of({"diffusers": "universal", "comfyui": "comfyui"})),
        Row("init_lora", "AdapterSettings", "init_lora", model_file("init_lora")),
        Row("lora_dropout", "AdapterSettings", "dropout", number),
        Row("ema_decay", "AdapterSettings", "ema_decay", _ema),
        Row("optimizer", "OptimizerSettings", "optimizer", optimizer),
        Row("adam_beta1|optimizer_beta1", "OptimizerSettings", "beta1", number),
        Row("adam_beta2|optimizer_beta2", "OptimizerSettings", "beta2", number),
        Row("adam_epsilon", "OptimizerSettings", "eps", number),
        Row(
            "prodigy_steps",
            "OptimizerSettings",
            "prodigy_d_coef",
            lambda value, _: _raise("not there; Prodigy adapts to the end"),
        ),
        Row("lr_num_cycles", "OptimizerSettings", "lr_num_cycles", whole),
        Row("lr_power", "OptimizerSettings", "lr_power", number),
        Row("gradient_checkpointing_interval", "MemorySettings", "checkpointing_interval", unless_zero),
        Row("enable_group_offload", "MemorySettings", "group_offload", if_on("block")),
        Row("group_offload_type", "MemorySettings", "group_offload", lambda value, all: _group(value, all)),
        Row("group_offload_blocks_per_group", "MemorySettings", "blocks_per_group", whole),
        Row("group_offload_use_stream", "MemorySettings", "offload_stream", flag),
        Row("group_offload_to_disk_path", "MemorySettings", "offload_to_disk", lambda value, _: not is_off(value)),
        Row("enable_model_cpu_offload", "MemorySettings", "model_offload", flag),
        Row("offload_during_startup", "MemorySettings", "text_encoder", if_on("blocks")),
        Row("vae_enable_tiling", "MemorySettings", "vae_tiling", flag),
        Row("vae_enable_slicing", "MemorySettings", "vae_slicing", flag),
        Row("dynamo_backend", "MemorySettings", "compile", lambda value, _: _compile(value)),
        Row("attention_mechanism", "MemorySettings", "attention", _attention),
        Row("prompts", "ValidateSampler", "prompts", text),
        Row("validation_negative_prompt", "ValidateSampler", "negative_prompt", text),
        Row("validation_num_inference_steps", "ValidateSampler", "steps", whole),
        Row("validation_guidance_real", "ValidateSampler", "cfg", cfg_scale),
        Row("validation_resolution", "ValidateSampler", "resolutions", sizes),
        Row("validation_seed", "ValidateSampler", "seed", whole),
        Row("evaluation_type", "ValidateSampler", "score", _score),
        Row("pretrained_evaluation_model_name_or_path", "ValidateSampler", "score_model", _score_model),
        Row("name", "LoRATrainer", "name", text),
    ),
    equal={
        "flow_use_uniform_schedule": "in sigma_density",
        "flow_use_beta_schedule": "in sigma_density",
        "flow_beta_schedule_*": "in sigma_density; both parameters are 2",
        "output_dir": "its last part is the LoRA's name; files are in output/loras",
        "hub_model_id": "its last part is the LoRA's name",
        "grad_clip_method": "in max_grad_norm",
        "resume_from_checkpoint": "a run with the same settings resumes by itself",
        "disable_bucket_pruning": "no image is dropped to fill a batch",
        "cache_*": "caches need no settings",
        "write_batch_size": "caches need no settings",
        "vae_batch_size": "chosen by itself",
        "vae_cache_ondemand": "caches need no settings",
        "text_cache_ondemand": "caches need no settings",
        "vae_cache_disable": "caches need no settings",
        "preserve_data_backend_cache": "caches need no settings",
        "max_workers": "chosen by itself",
        "read_batch_size": "chosen by itself",
        "image_processing_batch_size": "chosen by itself",
        "aspect_bucket_rounding": "bucket sizes are multiples of bucket_step",
        "resolution": "of the folders without their own",
        "resolution_type": "of the folders without their own",
        "minimum_image_size": "of the folders without their own",
        "aspect_bucket_alignment": "of the folders without their own",
        "caption_strategy": "of the folders without their own",
        "instance_prompt": "of the folders without their own",
        "data_backend_config": "its folders are listed below",
        "user_prompt_library": "its prompts are taken over",
        "validation_prompt": "one of the prompts",
        "validation_prompt_library": "the prompts that are named count",
        "validation_disable_unconditional": "no image without a prompt is sampled",
        "num_validation_images": "one for each prompt",
        "tracker_project_name": "set WANDB_PROJECT",
        "tracker_run_name": "set WANDB_NAME",
        "logging_dir": "in the run's folder",
        "use_ema": "in ema_decay",
        "ema_device": "chosen by itself",
        "ema_update_interval": "at every step",
        "pretrained_transformer_subfolder": "found by itself",
        "lycoris_config": "its entries are taken over",
        "lycoris_config.apply_preset*": "in targets",
        "lycoris_config.use_*": "as the kind of adapter does",
        "lycoris_config.multiplier": "1",
        "lycoris_config.full_matrix": "ranks are at most 512 here",
        "lycoris_config.bypass_mode": "chosen by itself",
        "flux_guidance_mode": "constant is what there is",
        "set_grads_to_none": "always",
        "allow_tf32": "always",
        "disable_tf32": "chosen by itself",
        "base_dir": "part of other paths",
        "disable_benchmark": "base images are sampled where a ValidateSampler is connected",
        "local_files_only": "set HF_HUB_OFFLINE",
        "validation_on_startup": "base images are always sampled first",
        "model_card_*": "there is no model card",
        "dynamo_*": "in compile",
        "push_to_hub_background": "nothing is uploaded",
        "i_know_what_i_am_doing": "not needed",
        "ignore_final_epochs": "steps count",
        "noise_offset_probability": "noise_offset is not there",
        "validation_torch_compile*": "as compile in training",
        "accelerator_cache_clear_interval": "chosen by itself",
        "debug_*": "logs are in the run's folder",
        "print_*": "logs are in the run's folder",
    },
    missing={
        "push_to_hub": "would have uploaded the LoRA",
        "push_checkpoints_to_hub": "would have uploaded checkpoints",
        "controlnet": "would have trained a ControlNet",
        "fuse_qkv_projections": "would have joined q, k and v; here by itself",
        "validation_guidance_rescale": "would have rescaled CFG",
        "noise_offset": "would have added an offset to the noise",
        "input_perturbation": "would have added noise to the input",
        "snr_gamma": "is not for flow matching",
        "flow_sigmoid_scale": "would have widened the bell of sigmas",
        "scheduled_sampling_*": "would have shaped the rollouts",
        "layersync_*": "would have aligned layers",
        "ramtorch*": "would have streamed layers; see group_offload",
        "deepspeed*": "would have used several GPUs",
        "fsdp*": "would have used several GPUs",
        "num_processes": "would have used several GPUs",
        "num_machines": "would have used several machines",
        "text_encoder_*": "would have set one of the text encoders",
        "train_text_encoder": "would have trained the text encoders",
        "webhook*": "would have sent messages",
        "hidream_*": "is of another family",
        "sd3_*": "is of another family",
        "offload_param_path": "would have offloaded to disk",
        "publishing_config": "would have uploaded the LoRA",
        "prodigy_*": "would have tuned Prodigy",
        "optimizer_config": "would have tuned the optimizer",
        "lycoris_config.*": "would have tuned LyCORIS",
        "crepa*": "would have aligned features",
        "lr_end": "see lr_min_ratio of OptimizerSettings",
        "lr_scale": "would have multiplied the learning rate by the batch size",
        "flux_guidance_*": "would have varied the guidance",
        "flux_beta_schedule_*": "would have shaped the density",
        "validation_*": "would have changed the validation images",
    },
    defaults={"lora_rank": 16, "caption_dropout_probability": 0.0},
)


def _raise(reason: str) -> Any:
    raise NotThere(reason)


def _group(value: Any, options: Mapping[str, Any]) -> str:
    if not flag(options.get("enable_group_offload") or False):
        raise NothingToSet("enable_group_offload is off")
    return OFFLOAD(text(value).removesuffix("_level"), options)


def _compile(value: Any) -> bool:
    if is_off(value):
        raise NothingToSet("off")
    return True


def _min_size(value: Any, options: Mapping[str, Any]) -> int:
    size = number(value)
    edge = (abs(size) * 1e6) ** 0.5 if options.get("resolution_type") == "area" and abs(size) <= 32 else size
    return round(min(max(edge, 0), 1e6))


def _crop_aspect(value: Any, options: Mapping[str, Any]) -> Any:
    name = text(value).lower()
    if name not in ("closest", "random"):
        return same("square", "preserve", instead="not there; preserve is used")(value, options)
    if aspects := aspect_list(options.get("crop_aspect_buckets")):
        return Values({"crop_aspect": name, "aspects": aspects})
    if name == "random":
        raise NotThere("without crop_aspect_buckets not there; preserve is used")
    return Values({"crop_aspect": "preserve"}, "the closest of all buckets")


def _columns(value: Any, options: Mapping[str, Any]) -> str:
    other = options.get("parquet.fallback_caption_column")
    return f"{text(value)} | {text(other)}" if other else text(value)


def _position(value: Any, options: Mapping[str, Any]) -> int:
    return whole(value)


FOLDERS = Table(
    rows=(
        Row("instance_data_dir", "DatasetBackend", "folder", text),
        Row(
            "caption_strategy",
            "DatasetBackend",
            "captions",
            one_of(
                {
                    "textfile": "textfile",
                    "filename": "filename",
                    "instanceprompt": "instance prompt",
                    "instance_prompt": "instance prompt",
                    "parquet": "table",
                    "csv": "table",
                    "huggingface": "table",
                },
                "not there; captions are read from text files",
            ),
        ),
        Row(
            "instance_prompt",
            "DatasetBackend",
            "instance_prompt",
            lambda value, _: " || ".join(text(item) for item in (value if isinstance(value, list) else [value])),
        ),
        Row("resolution", "DatasetBackend", "resolution", number),
        Row("resolution_type", "DatasetBackend", "resolution_type", same("pixel_area", "pixel", "area")),
        Row("crop", "DatasetBackend", "crop", flag),
        Row(
            "crop_style",
            "DatasetBackend",
            "crop_style",
            same(
                "center", "random", "corner", instead="faces are not found here; center is used, see crop_style boxes"
            ),
        ),
        Row("crop_aspect", "DatasetBackend", "crop_aspect", _crop_aspect),
        Row("minimum_aspect_ratio", "DatasetBackend", "min_aspect", number),
        Row("maximum_aspect_ratio", "DatasetBackend", "max_aspect", number),
        Row("parquet.path", "DatasetBackend", "table", table_file),
        Row("parquet.filename_column", "DatasetBackend", "file_column", text),
        Row("parquet.caption_column", "DatasetBackend", "caption_column", _columns),
        Row(
            "repeats",
            "DatasetBackend",
            "repeats",
            lambda value, _: Values({"repeats": whole(value) + 1}, "0 there is once"),
        ),
        Row("minimum_image_size", "DatasetBackend", "min_size", _min_size),
        Row(
            "aspect_bucket_alignment",
            "DatasetBackend",
            "bucket_step",
            same("64", "32", "16", instead="not there; auto is used"),
        ),
        Row("is_regularisation_data", "DatasetBackend", "prior_preservation", flag),
        Row("caption_shuffle.count", "DatasetBackend", "tag_orders", whole),
        Row("caption_shuffle.position_start", "DatasetBackend", "kept_tags", _position),
        Row("references", "DatasetBackend", "references", text),
        Row("masks", "DatasetBackend", "masks", text),
        Row("degrade", "DatasetBackend", "degrade", text),
    ),
    equal={
        "id": "a name is not needed",
        "type": "a local folder",
        "dataset_type": "images",
        "disabled": "is used",
        "maximum_image_size": "images are always resized before they are cropped",
        "target_downsample_size": "images are always resized before they are cropped",
        "cache_*": "caches need no settings",
        "metadata_backend": "images are found by themselves",
        "skip_file_discovery": "caches need no settings",
        "preserve_data_backend_cache": "caches need no settings",
        "vae_cache_*": "caches need no settings",
        "write_batch_size": "caches need no settings",
        "prepend_instance_prompt": "see trigger",
        "only_instance_prompt": "see captions",
        "conditioning_data": "in masks or references",
        "conditioning": "in degrade",
        "hash_filenames": "caches need no settings",
        "default": "not needed",
        "caption_shuffle.enable": "in tag_orders",
        "metadata_update_interval": "caches need no settings",
        "scan_for_errors": "every image is checked",
        "delete_*": "nothing is deleted",
        "vae_batch_size": "chosen by itself",
        "caption_shuffle.seed": "of the run",
        "crop_aspect_buckets": "in aspects",
        "parquet.fallback_caption_column": "in caption_column",
        "parquet.*": "columns of sizes are not needed, and names match with and without their endings",
        "metadata_*": "images are found by themselves, and their scan is remembered",
    },
    missing={
        "probability": "would have weighted the folder; use repeats",
        "max_upscale_threshold": "see max_upscale, which is a factor",
        "start_epoch": "would have used the folder later",
        "caption_filter_list": "would have removed words from captions",
        "caption_shuffle.*": "would have tuned the shuffling",
        "huggingface.*": "would have downloaded a dataset",
        "aws_*": "would have read from S3",
        "csv_*": "would have downloaded the images of a table",
        "video.*": "is for videos",
        "max_num_samples": "would have left out images",
    },
    defaults={"crop": False, "crop_style": "random", "crop_aspect": "square"},
)


def _is_main(value: Any) -> bool:
    names = {str(name).removeprefix("--").lower() for name in value} if isinstance(value, dict) else set()
    return "model_family" in names and not names & {"training_method", "network_module"}


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    options = {_name(name): value for name, value in file.value.items()}
    extra = options.pop("trainer_extra_args", None)
    if isinstance(extra, str):
        options.update(parse_words(extra.split()))
    family = _family(options)
    if family not in ("chroma", "flux"):
        raise refuse(file.path.name, "model_family", options["model_family"], FAMILIES)
    if str(options.get("model_type", "lora")).lower() not in ("lora", FULL):
        raise refuse(file.path.name, "model_type", options["model_type"], f"there is lora and {FULL}")
    settings = Settings(family, options)
    if options.get("lr_scheduler") is None:
        reason = "not set, and its default differs between versions; constant after 20 steps of warm-up is used"
        settings.missing.append(("lr_scheduler", reason))
    elif options["lr_scheduler"] == "constant":  # has no warm-up there
        options.setdefault("lr_warmup_steps", 0)
    if family == "flux" and not _says_shift(options):
        options["flow_schedule_shift"] = DEFAULT_SHIFT
    _add_lycoris(settings, file, files)
    _add_prompts(settings, file, files)
    if not is_off(options.get("data_backend_config")):
        backends = files.referenced(options["data_backend_config"], file, "data_backend_config").value
        _add_folders(settings, backends if isinstance(backends, list) else [])
    destination = options.get("hub_model_id") or options.get("output_dir")
    if isinstance(destination, str) and file_name(destination):
        settings.options["name"] = re.sub(r"[^\w.\- ]+", "-", file_name(destination)).strip(" .-") or "my-lora"
    return settings


def _says_shift(options: Mapping[str, Any]) -> bool:
    """Return whether the noise levels are shifted as an option says, instead of by the default."""
    instead = ("flow_schedule_auto_shift", "flux_schedule_auto_shift", "flux_fast_schedule")
    static = (options.get("flow_schedule_shift"), options.get("flux_schedule_shift"))
    return any(value not in (None, "") for value in static) or any(not is_off(options.get(name)) for name in instead)


def _name(name: Any) -> str:
    lower = str(name).removeprefix("--").lower()
    return ENVIRONMENT.get(lower, lower)


def _add_lycoris(settings: Settings, file: ConfigFile, files: SourceFiles) -> None:
    options = settings.options
    if str(options.get("lora_type", "")).lower() == "lycoris" and isinstance(options.get("lycoris_config"), str):
        content = files.referenced(options["lycoris_config"], file, "lycoris_config").value
        if isinstance(content, dict):
            options.update({f"lycoris_config.{name}": value for name, value in content.items()})


def _add_prompts(settings: Settings, file: ConfigFile, files: SourceFiles) -> None:
    options, library = settings.options, {}
    if not is_off(options.get("user_prompt_library")):
        content = files.referenced(options["user_prompt_library"], file, "user_prompt_library").value
        library = {name: str(prompt) for name, prompt in content.items()} if isinstance(content, dict) else {}
    prompt = options.get("validation_prompt")
    own = prompt if isinstance(prompt, str) and prompt.strip() else ""
    if library:
        named = {**({"validation": own} if own else {}), **library}
        options["prompts"] = json.dumps(named, ensure_ascii=False)
    elif own:
        options["prompts"] = " ".join(own.split())


def _add_folders(settings: Settings, backends: list[Any]) -> None:
    backends = [backend for backend in backends if isinstance(backend, dict)]
    by_id = {str(backend.get("id")): backend for backend in backends}
    for i, backend in enumerate(backends):
        label, kind = str(backend.get("id") or f"backend {i + 1}"), str(backend.get("dataset_type") or "image")
        if backend.get("disabled") in (True, "true"):
            settings.equal.append((label, "is disabled"))
        elif kind in ("text_embeds", "image_embeds", "conditioning"):
            settings.equal.append(
                (label, f"{kind}: caches need no settings; masks and references are with their images")
            )
        elif kind != "image":
            settings.missing.append(
                (label, f"a dataset of the type {kind}; see holdout of LoRATrainer for an eval loss")
            )
        else:
            settings.folders.append(Folder(label, _folder_options(backend, by_id, settings, label)))


def _folder_options(
    backend: Mapping[str, Any], by_id: Mapping[str, Any], settings: Settings, label: str
) -> dict[str, Any]:
    shared = {name: value for name in INHERITED if (value := settings.options.get(name)) is not None}
    options = {**shared, **backend}
    for name in ("caption_shuffle", "huggingface", "parquet", "video"):
        nested = options.pop(name, None)
        options.update({f"{name}.{key}": value for key, value in nested.items()} if isinstance(nested, dict) else {})
    if "caption_shuffle.enable" in options and is_off(options["caption_shuffle.enable"]):
        options.pop("caption_shuffle.count", None)
    _set_place(options, settings, label)
    linked = options.get("conditioning_data")
    for name in linked if isinstance(linked, list) else [linked] if linked else []:
        other = by_id.get(str(name), {})
        field = "masks" if "mask" in str(other.get("conditioning_type")) else "references"
        if isinstance(other.get("instance_data_dir"), str):
            options[field] = other["instance_data_dir"]
        else:
            settings.missing.append((f"{label}.conditioning_data", f"{shorten(name)} is not among the backends"))
    generators = options.get("conditioning")
    for entry in generators if isinstance(generators, list) else [generators] if generators else []:
        if steps := _degradation(entry):
            options["degrade"] = " + ".join(filter(None, (options.get("degrade"), steps)))
        else:
            settings.missing.append((f"{label}.conditioning", f"{shorten(entry)}: can't be made from an image here"))
    return options


def _set_place(options: dict[str, Any], settings: Settings, label: str) -> None:
    """Name a place that is no local folder as DatasetBackend does. Keys and addresses of servers go to the environment."""
    kind = str(options.get("type"))
    names = {"aws": ("aws_bucket_name", "aws_data_prefix"), "huggingface": ("dataset_name",), "csv": ("csv_file",)}
    parts = [str(options.pop(name)).strip("/") for name in names.get(kind, ()) if options.get(name)]
    if not parts:
        return
    scheme = {"aws": "s3://", "huggingface": "hf://", "csv": ""}[kind]
    options["instance_data_dir"] = place = scheme + "/".join(filter(None, parts))
    column = options.pop("csv_caption_column", None) or options.pop("huggingface.caption_column", None)
    if isinstance(column, str):
        options["parquet.caption_column"], options["caption_strategy"] = column, kind
    keys = [name for name in options if name.startswith("aws_") and options[name]]
    for name in keys:
        options.pop(name)
        variable = name.upper() if "region" not in name else "AWS_REGION"
        settings.missing.append((f"{label}.{name}", f"set the environment variable {variable} to it"))
    allowed = "the addresses in it" if kind == "csv" else place
    settings.missing.append((f"{label}.type", f"run with --allow-url for {allowed}, which is read from the network"))


def _degradation(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    try:
        if entry.get("type") == "jpeg_artifacts":
            quality = entry.get("quality_range", [10, 30])
            low, high = (whole(item) for item in (quality if isinstance(quality, list) else [quality, quality]))
            return " + ".join([f"jpeg {low}-{high}"] * min(whole(entry.get("compression_rounds", 1)), 8))
        if entry.get("type") == "superresolution":
            parts = {"blur": number(entry.get("blur_radius", 2)), "noise": number(entry.get("noise_level", 0.02))}
            return " + ".join(f"{kind} {strength:g}" for kind, strength in parts.items() if strength)
    except (Wrong, ValueError):
        return ""
    return ""


TRAINER = Trainer("SimpleTuner", _is_main, _read, TABLE, FOLDERS)
