"""OneTrainer: its configuration or preset, its concepts and its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.adapter import FULL
from ...errors import UserError
from ..option_table import LOAD, Convert, Folder, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values
from ..source_files import ConfigFile, SourceFiles
from ..value_readers import (
    all_linears,
    alpha_of_rank,
    attention,
    base_model,
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
    schedule,
    shorten,
    shuffled_tags,
    substrings,
    text,
    unless_zero,
    whole,
)

FAMILIES = {"CHROMA_1": "chroma", "FLUX_DEV_1": "flux"}
NOT_QUANTIZED = NothingToSet("not quantized")
WEIGHTS = {
    "float_8": "fp8-native",
    "int_8": "int8-torchao",
    "nfloat_4": "nf4-bnb",
    "int_w8a8": "int8-torchao",
    "float_w8a8": "fp8-native",
    "float_16": NOT_QUANTIZED,
    "bfloat_16": NOT_QUANTIZED,
    "float_32": NOT_QUANTIZED,
    "none": NOT_QUANTIZED,
}
quantized = one_of(WEIGHTS, "not there; it is not quantized")
PARABOLA = 7.7  # noising_weight of Chroma's own density
MODEL_PARTS = (
    "text_encoder_3",
    "text_encoder_4",
    "unet",
    "prior",
    "effnet_encoder",
    "decoder",
    "decoder_text_encoder",
    "decoder_vqgan",
    "unconditional_transformer",
    "embedding",
    "cloud",
    "secrets",
    "additional_embeddings",
    "optimizer_defaults",
)


def _family(options: Mapping[str, Any]) -> str:
    return FAMILIES.get(str(options.get("model_type")), "")


def _density(value: Any, options: Mapping[str, Any]) -> Values:
    name = text(value).upper()
    weight, bias = number(options.get("noising_weight") or 0.0), number(options.get("noising_bias") or 0.0)
    if name == "INVERTED_PARABOLA":
        note = "" if (weight, bias) == (PARABOLA, 0.0) else f"with noising_weight {PARABOLA} and noising_bias 0"
        return Values({"sigma_density": "chroma"}, note)
    known = {
        "UNIFORM": "uniform",
        "LOGIT_NORMAL": "logit-normal",
        "BETA": "beta",
        "COS_MAP": "cosmap",
        "HEAVY_TAIL": "mode",
    }
    if name not in known:
        raise NotThere("not there; auto is used")
    plain = name in ("UNIFORM", "COS_MAP") or (weight, bias) == (0.0, 0.0)
    return Values({"sigma_density": known[name]}, "" if plain else "with noising_weight and noising_bias 0")


def _shift(value: Any, options: Mapping[str, Any]) -> float:
    if flag(options.get("dynamic_timestep_shifting") or False):
        raise NothingToSet("dynamic_timestep_shifting counts")
    return number(value)


def _resolutions(text: Any) -> list[str]:
    return [part.strip() for part in str(text or 512).split(",") if part.strip()]


def _epochs(value: Any, options: Mapping[str, Any]) -> Values:
    """Return the epochs: with several resolutions an image is trained at one of them in each epoch there, at all here."""
    epochs, count = unless_zero(value, options), max(1, len(_resolutions(options.get("resolution"))))
    note = f"an epoch has every image at each of {count} resolutions here, at one of them there" if count > 1 else ""
    return Values({"epochs": -(-epochs // count)}, note)


def _filter(value: Any, options: Mapping[str, Any]) -> Any:
    if flag(options.get("layer_filter_regex") or False) and text(value):
        raise NotThere("regular expressions are not there; the default targets are used")
    if not text(value).strip():
        if _is_full(options):
            raise NothingToSet("the whole model is trained")
        return all_linears(value, options)
    return substrings(value, options)


def _is_full(options: Mapping[str, Any]) -> bool:
    return str(options.get("training_method")).upper() == "FINE_TUNE"


def _method(value: Any, options: Mapping[str, Any]) -> str:
    if not _is_full(options):
        raise NothingToSet("the kind is that of peft_type")
    return FULL


def _kind(value: Any, options: Mapping[str, Any]) -> Any:
    if _is_full(options):
        raise NothingToSet("is only for LoRAs")
    if str(value).upper() == "LORA" and flag(options.get("lora_decompose") or False):
        return "dora"
    return one_of({"lora": "lora", "loha": "loha", "oft_2": "oft", "lokr": "lokr"})(value, options)


def _kind_field(name: str, converter: Any = whole) -> Any:
    def convert(value: Any, options: Mapping[str, Any]) -> Any:
        if str(options.get("peft_type", "LORA")).upper() != name:
            raise NothingToSet(f"is only for {name}")
        return converter(value)

    return convert


def _ema(value: Any, options: Mapping[str, Any]) -> float:
    if str(options.get("ema") or "OFF").upper() == "OFF":
        raise NothingToSet("ema is off")
    return number(value)


def _checkpointing(value: Any, options: Mapping[str, Any]) -> bool:
    return str(value).upper() not in ("OFF", "FALSE", "NONE")


def _activations(value: Any, options: Mapping[str, Any]) -> bool:
    if not flag(value):
        raise NothingToSet("off")
    return True


def _share(value: Any, options: Mapping[str, Any]) -> Values:
    share = number(value)
    if share <= 0:
        raise NothingToSet("0, not used")
    return Values(
        {"group_offload": "block", "offload_share": min(max(round(share, 2), 0.01), 1.0)}, "share of the blocks"
    )


def _steps_only(unit: str) -> Any:
    def convert(value: Any, options: Mapping[str, Any]) -> int:
        kind = str(options.get(unit) or "").upper()
        if kind in ("NEVER", "ALWAYS"):
            raise NothingToSet(kind.lower())
        if kind != "STEP":
            raise NotThere("is counted in steps here, not in epochs or minutes")
        return whole(value)

    return convert


def _warmup(value: Any, options: Mapping[str, Any]) -> int:
    steps = number(value)
    if 0 < steps <= 1:
        raise NotThere("a share of the run is not there; use steps")
    return round(steps)


def _guidance(value: Any, options: Mapping[str, Any]) -> float:
    if _family(options) == "chroma":
        raise NothingToSet("Chroma has no guidance embedding")
    return number(value)


def _mask(value: Any, options: Mapping[str, Any]) -> str:
    return if_on("on")(value, options)


def _te_weights(part: str) -> Any:
    """Return a converter for a text encoder: T5 is the second of Flux and the only one of Chroma."""

    def convert(value: Any, options: Mapping[str, Any]) -> Any:
        if part != ("text_encoder" if _family(options) == "chroma" else "text_encoder_2"):
            raise NothingToSet(
                "CLIP is small, and is not quantized" if part == "text_encoder" else "is not in this model"
            )
        return quantized(value, options)

    return convert


LOSSES = ("mse_strength", "mae_strength", "huber_strength", "log_cosh_strength")


def _loss(name: str, ours: str) -> Convert:
    """Return a converter of the weight of a loss: it is taken over where it is the only one."""

    def convert(value: Any, options: Mapping[str, Any]) -> str:
        strengths = {key: number(options.get(key) or 0) for key in LOSSES}
        strengths["mse_strength"] = number(1.0 if options.get("mse_strength") is None else options["mse_strength"])
        if not strengths[name]:
            raise NothingToSet("0, not used")
        if any(strength for key, strength in strengths.items() if key != name):
            raise NotThere("a sum of losses is not there; mse is used")
        return ours

    return convert


def _delta(value: Any, options: Mapping[str, Any]) -> Values:
    try:
        _loss("huber_strength", "huber")(options.get("huber_strength") or 0, options)
    except (NothingToSet, NotThere) as error:
        raise NothingToSet("of a loss that is not used") from error
    return Values({"huber_c": number(value)}, "the smooth form of Huber's loss")


def _weight_function(value: Any, options: Mapping[str, Any]) -> str:
    names = {"CONSTANT": "none", "SIGMA": "sigma"}
    return one_of({name.lower(): ours for name, ours in names.items()}, "not there; none is used")(value, options)


TABLE = Table(
    rows=(
        Row("base_model_name", LOAD, "folder", base_model(_family)),
        Row("transformer.model_name", LOAD, "diffusion_model", lambda value, options: _part(value, options)),
        Row("vae.model_name", LOAD, "vae", model_file("vae")),
        Row("train_dtype", LOAD, "dtype", precision),
        Row("transformer.guidance_scale", LOAD, "guidance", _guidance),
        Row("transformer.attention_mask", LOAD, "attention_mask", _mask),
        Row("transformer.weight_dtype", "QuantizeModel", "level", quantized),
        Row("text_encoder.weight_dtype", "QuantizeModel", "text_encoder", _te_weights("text_encoder")),
        Row("text_encoder_2.weight_dtype", "QuantizeModel", "text_encoder", _te_weights("text_encoder_2")),
        Row(
            "output_model_destination",
            "LoRATrainer",
            "name",
            lambda value, _: file_name(value).removesuffix(".safetensors") or "my-lora",
        ),
        Row("lora_rank", "LoRATrainer", "rank", whole),
        Row("lora_alpha", "LoRATrainer", "alpha", alpha_of_rank("lora_rank", 16)),
        Row("layer_filter", "LoRATrainer", "targets", _filter),
        Row("epochs", "LoRATrainer", "epochs", _epochs),
        Row("batch_size", "LoRATrainer", "batch_size", whole),
        Row("gradient_accumulation_steps", "LoRATrainer", "accumulation", unless_zero),
        Row("learning_rate", "LoRATrainer", "learning_rate", number),
        Row("transformer.learning_rate", "LoRATrainer", "learning_rate", number),
        Row("learning_rate_scheduler", "LoRATrainer", "lr_schedule", schedule),
        Row("learning_rate_warmup_steps", "LoRATrainer", "warmup_steps", _warmup),
        Row("optimizer.weight_decay", "LoRATrainer", "weight_decay", number),
        Row("clip_grad_norm", "LoRATrainer", "max_grad_norm", number),
        Row("gradient_checkpointing", "LoRATrainer", "gradient_checkpointing", _checkpointing),
        Row("transformer.gradient_checkpointing", "LoRATrainer", "gradient_checkpointing", _checkpointing),
        Row("timestep_distribution", "LoRATrainer", "sigma_density", _density),
        Row("timestep_shift", "LoRATrainer", "shift", _shift),
        Row("dynamic_timestep_shifting", "LoRATrainer", "shift", if_on(0.0)),
        Row("text_encoder.dropout_probability", "LoRATrainer", "caption_dropout", number),
        Row("save_every", "LoRATrainer", "checkpoint_every", _steps_only("save_every_unit")),
        Row("backup_after", "LoRATrainer", "checkpoint_every", _steps_only("backup_after_unit")),
        Row("rolling_backup_count", "LoRATrainer", "keep_checkpoints", whole),
        Row("sample_after", "LoRATrainer", "validate_every", _steps_only("sample_after_unit")),
        Row("tensorboard", "LoRATrainer", "trackers", if_on("tensorboard")),
        Row("seed", "LoRATrainer", "seed", whole),
        Row("mae_strength", "LoRATrainer", "loss", _loss("mae_strength", "mae")),
        Row("huber_strength", "LoRATrainer", "loss", _loss("huber_strength", "huber")),
        Row("huber_delta", "LoRATrainer", "huber_c", _delta),
        Row("loss_weight_fn", "LoRATrainer", "loss_weighting", _weight_function),
        Row("peft_type", "AdapterSettings", "kind", _kind),
        Row("training_method", "AdapterSettings", "kind", _method),
        Row("lokr_dim", "LoRATrainer", "rank", _kind_field("LOKR")),
        Row("oft_block_size", "LoRATrainer", "rank", _kind_field("OFT_2")),
        Row("lokr_decompose_factor", "AdapterSettings", "lokr_factor", _kind_field("LOKR")),
        Row("lokr_decompose_both", "AdapterSettings", "lokr_decompose_both", _kind_field("LOKR", flag)),
        Row("lora_model_name", "AdapterSettings", "init_lora", model_file("init_lora")),
        Row("dropout_probability", "AdapterSettings", "dropout", number),
        Row("ema_decay", "AdapterSettings", "ema_decay", _ema),
        Row("output_dtype", "AdapterSettings", "precision", precision),
        Row("optimizer.optimizer", "OptimizerSettings", "optimizer", optimizer),
        Row("optimizer.beta1", "OptimizerSettings", "beta1", number),
        Row("optimizer.beta2", "OptimizerSettings", "beta2", number),
        Row("optimizer.eps", "OptimizerSettings", "eps", number),
        Row("optimizer.d_coef", "OptimizerSettings", "prodigy_d_coef", number),
        Row("optimizer.d0", "OptimizerSettings", "prodigy_d0", number),
        Row("optimizer.use_bias_correction", "OptimizerSettings", "prodigy_bias_correction", if_on(True)),
        Row("optimizer.safeguard_warmup", "OptimizerSettings", "prodigy_safeguard_warmup", if_on(True)),
        Row(
            "learning_rate_cycles", "OptimizerSettings", "lr_num_cycles", lambda value, _: max(1, round(number(value)))
        ),
        Row("learning_rate_min_factor", "OptimizerSettings", "lr_min_ratio", number),
        Row("transformer.offload_fraction|layer_offload_fraction", "MemorySettings", "group_offload", _share),
        Row("transformer.activation_offloading", "MemorySettings", "activation_offload", _activations),
        Row(
            "enable_activation_offloading",
            "MemorySettings",
            "activation_offload",
            lambda value, options: _offloaded(value, options),
        ),
        Row("compile", "MemorySettings", "compile", flag),
        Row(
            "attention_mechanism",
            "MemorySettings",
            "attention",
            lambda value, options: attention({"SDP": "sdpa"}.get(text(value), value), options),
        ),
        Row("sample.prompts", "ValidateSampler", "prompts", text),
        Row("sample.negative_prompt", "ValidateSampler", "negative_prompt", text),
        Row("sample.diffusion_steps", "ValidateSampler", "steps", whole),
        Row("sample.cfg_scale", "ValidateSampler", "cfg", lambda value, options: _cfg(value, options)),
        Row("sample.sizes", "ValidateSampler", "resolutions", text),
        Row("sample.seed", "ValidateSampler", "seed", lambda value, _: max(0, whole(value))),
    ),
    equal={
        "model_type": "LoadChroma or LoadFlux",
        "concept_file_name": "its folders are listed below",
        "sample_definition_file_name": "its prompts are taken over",
        "resolution": "of each folder",
        "masked_training": "of each folder",
        "unmasked_weight": "of each folder",
        "normalize_masked_area_loss": "always",
        "custom_conditioning_image": "see references",
        "layer_filter_preset": "in targets",
        "layer_filter_regex": "in targets",
        "noising_weight": "in sigma_density",
        "noising_bias": "in sigma_density",
        "output_model_format": "the file loads everywhere",
        "lora_decompose*": "in kind",
        "lora_weight_dtype": "LoRA weights are trained in fp32",
        "ema": "in ema_decay",
        "ema_update_step_interval": "at every step",
        "weight_dtype": "of each part",
        "transformer.*": "always so",
        "text_encoder.*": "text encoders are never trained",
        "text_encoder_2.*": "text encoders are never trained",
        "text_encoder_sequence_length": "by the model",
        "text_encoder_2_sequence_length": "by the model",
        "text_encoder_*": "text encoders are never trained",
        "vae.*": "the VAE's precision is right by itself",
        "quantization.*": "blocks are quantized",
        "workspace_dir": "files are in output",
        "cache_dir": "caches need no settings",
        "image_caching": "always",
        "text_caching": "always",
        "latent_caching": "always",
        "clear_cache_before_training": "caches need no settings",
        "only_cache": "caches need no settings",
        "caching_threads": "chosen by itself",
        "dataloader_threads": "chosen by itself",
        "prefetch_next_batch": "always",
        "train_device": "see --device",
        "temp_device": "RAM",
        "fallback_train_dtype": "not needed",
        "enable_autocast_cache": "not needed",
        "async_offloading": "see offload_stream",
        "enable_async_offloading": "see offload_stream",
        "aspect_ratio_bucketing": "always",
        "mse_strength": "1",
        "vb_loss_strength": "is for other models",
        "loss_scaler": "averages, as here",
        "loss_weight_strength": "of a weighting that is not used",
        "frames": "is for videos",
        "backup_after_unit": "steps",
        "save_every_unit": "steps",
        "sample_after_unit": "steps",
        "validate_after*": "at every checkpoint",
        "rolling_backup": "always",
        "backup_before_save": "always",
        "continue_last_backup": "a run with the same settings resumes by itself",
        "save_filename_prefix": "see name",
        "save_skip_first": "not needed",
        "sample_*": "base images are always sampled first",
        "samples_to_tensorboard": "always",
        "non_ema_sampling": "the weights of the file are sampled",
        "tensorboard_*": "see trackers",
        "include_train_config": "the workflow is in the file",
        "prevent_overwrites": "another run's LoRA is kept",
        "optimizer.fused_back_pass": "always so with kind full",
        "optimizer.stochastic_rounding": "always so where weights are in bf16",
        "optimizer.*": "beta1, beta2, eps, weight_decay and Prodigy's d0, d_coef and switches are taken over",
        "oft_*": "in rank",
        "dora_oft": "is only for OFT_2",
        "lokr_*": "is only for LOKR",
        "__version": "not needed",
        "gradient_reduce_precision": "one GPU",
        "fused_gradient_reduce": "one GPU",
        "async_gradient_reduce*": "one GPU",
        "device_indexes": "see --device",
        "min_noising_strength": "0",
        "max_noising_strength": "1",
        "debug_*": "logs are in the run's folder",
        "custom_learning_rate_scheduler": "not used",
        "scheduler_params": "not used",
        "bundle_additional_embeddings": "there are none",
        "preserve_embedding_norm": "there are none",
        "embedding_*": "there are none",
        "learning_rate_scaler": "none",
        "unmasked_probability": "see unmasked_weight",
        "validation": "see holdout",
        **{f"{name}*": "is not in this model, or not used for LoRAs" for name in MODEL_PARTS},
    },
    missing={
        "log_cosh_strength": "would have used another loss",
        "offset_noise_weight": "would have added an offset to the noise",
        "perturbation_noise_weight": "would have added noise to the input",
        "generalized_offset_noise": "would have changed the noise",
        "multi_gpu": "would have used several GPUs",
        "masked_prior_preservation_weight": "see prior_preservation",
        "force_*": "is for other models",
        "rescale_noise_scheduler_to_zero_terminal_snr": "is for other models",
        "cep_gamma": "would have changed the noise",
    },
    defaults={
        "epochs": 100,
        "lora_alpha": 1.0,
        "lora_rank": 16,
        "learning_rate": 3e-6,
        "learning_rate_warmup_steps": 200,
        "timestep_distribution": "UNIFORM",
        "timestep_shift": 1.0,
        "text_encoder.dropout_probability": 0.0,
        "layer_filter": "",
    },
    usual={
        "learning_rate_scaler": "NONE",
        "loss_scaler": "NONE",
        "min_noising_strength": 0.0,
        "max_noising_strength": 1.0,
        "validation": False,
    },
)


def _part(value: Any, options: Mapping[str, Any]) -> Any:
    return model_file("diffusion_model", "from the base model")(value, options)


def _cfg(value: Any, options: Mapping[str, Any]) -> float:
    if _family(options) == "flux":
        raise NothingToSet("for Flux it is the guidance embedding: drawn_guidance of LoadFlux")
    return cfg_scale(value, options)


def _offloaded(value: Any, options: Mapping[str, Any]) -> bool:
    if flag(value) and str(options.get("gradient_checkpointing")).upper() == "CPU_OFFLOADED":
        return True
    raise NothingToSet("only with CPU_OFFLOADED")


def _source(value: Any, options: Mapping[str, Any]) -> str:
    return one_of(
        {"sample": "textfile", "filename": "filename"},
        "one file of captions is not there; write them to instance_prompt",
    )(value, options)


def _repeats(value: Any, options: Mapping[str, Any]) -> Values:
    if str(options.get("balancing_strategy") or "REPEATS").upper() != "REPEATS":
        raise NotThere("a number of samples is not there; repeats is 1")
    count = number(value)
    return Values(
        {"repeats": max(1, round(count))}, "" if count == round(count) and count >= 1 else "rounded to a whole number"
    )


def _tag_dropout(value: Any, options: Mapping[str, Any]) -> float:
    if not flag(value):
        raise NothingToSet("off")
    if str(options.get("text.tag_dropout_mode") or "FULL").upper() != "RANDOM":
        raise NotThere("of the modes, RANDOM alone is there: each tag by itself; no tags are left out")
    return number(options.get("text.tag_dropout_probability") or 0.0)


FOLDERS = Table(
    rows=(
        Row("path", "DatasetBackend", "folder", text),
        Row("text.prompt_source", "DatasetBackend", "captions", _source),
        Row("resolution", "DatasetBackend", "resolution", number),
        Row("balancing|repeats", "DatasetBackend", "repeats", _repeats),
        Row("image.enable_crop_jitter", "DatasetBackend", "crop_style", if_on("random")),
        Row("image.enable_random_flip", "DatasetBackend", "flip", often),
        Row("text.tag_dropout_enable", "DatasetBackend", "tag_dropout", _tag_dropout),
        Row("text.enable_tag_shuffling", "DatasetBackend", "tag_orders", shuffled_tags),
        Row("text.keep_tags_count", "DatasetBackend", "kept_tags", whole),
        Row("masks", "DatasetBackend", "masks", text),
        Row("unmasked_weight", "DatasetBackend", "unmasked_weight", number),
        Row("type", "DatasetBackend", "prior_preservation", lambda value, _: _concept_type(value)),
    ),
    equal={
        "name": "not needed",
        "seed": "of the run",
        "enabled": "is used",
        "include_subdirectories": "always",
        "image_variations": "see crop_style",
        "text_variations": "see tag_orders",
        "balancing_strategy": "in repeats",
        "loss_weight": "1",
        "concept_stats*": "not needed",
        "validation_concept": "not used",
        "text.prompt_path": "see captions",
        "text.tag_delimiter": "tags are separated by commas",
        "image.resolution_override": "in resolution",
        "image.enable_resolution_override": "in resolution",
        "image.*_max_*": "of a change that is not used",
        "text.tag_dropout_*": "in tag_dropout",
        "text.caps_randomize_*": "of a change that is not used",
        "__version": "not needed",
        "image.random_*": "of a change that is not used",
        "image.__version": "not needed",
        "text.__version": "not needed",
    },
    missing={
        "image.enable_random_*": "would have changed images",
        "image.enable_fixed_*": "would have changed images",
        "text.caps_randomize_enable": "would have changed captions",
    },
    defaults={"resolution": 512, "image.enable_crop_jitter": True},
    usual={"loss_weight": 1.0},
)


def _concept_type(value: Any) -> bool:
    if text(value).upper() != "PRIOR_PREDICTION":
        raise NothingToSet("images to train on")
    return True


def _is_main(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and "model_type" in value
        and bool({"training_method", "base_model_name", "concepts"} & value.keys())
    )


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    value = dict(file.value)
    if value.get("training_method", "LORA") not in ("LORA", "FINE_TUNE"):
        shown = shorten(value["training_method"])
        text = f"{shown} is not imported; only configurations of LoRAs and of full fine-tunes (FINE_TUNE) are"
        raise UserError.at(f"{file.path.name}: training_method", text)
    concepts, samples = value.pop("concepts", None), value.pop("samples", None)
    options = flatten(value)
    family = _family(options)
    if not family:
        raise refuse(file.path.name, "model_type", options.get("model_type"), f"there is {', '.join(FAMILIES)}")
    settings = Settings(family, options)
    concepts = _list_of(concepts, "concept_file_name", file, files, "path")
    for i, concept in enumerate(concepts):
        _add_folders(settings, concept, str(concept.get("name") or f"concepts[{i}]"))
    _add_samples(settings, _list_of(samples, "sample_definition_file_name", file, files, "prompt"))
    return settings


def _list_of(value: Any, option: str, file: ConfigFile, files: SourceFiles, key: str) -> list[dict[str, Any]]:
    """Return a list that is in the file, or in another one: one that it names, or one that the user gave."""
    if not isinstance(value, list):
        others = [item for item in files.files if item is not file and isinstance(item.value, list)]
        given = next(
            (item for item in others if any(isinstance(entry, dict) and key in entry for entry in item.value)), None
        )
        if given:
            files.used.add(given.path)
            value = given.value
        elif not is_off(file.value.get(option)) and key == "path":
            value = files.referenced(file.value[option], file, option).value
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _add_folders(settings: Settings, concept: Mapping[str, Any], label: str) -> None:
    """Add a concept once for each resolution."""
    options = flatten(concept)
    if concept.get("enabled") is False:
        settings.equal.append((label, "is not enabled"))
        return
    if concept.get("validation_concept") is True or concept.get("type") == "VALIDATION":
        settings.missing.append((label, "a concept for validation; see holdout of LoRATrainer"))
        return
    override = flag(options.get("image.enable_resolution_override") or False)
    resolution = options.get("image.resolution_override") if override else settings.options.get("resolution")
    if flag(settings.options.get("masked_training") or False) and isinstance(options.get("path"), str):
        options["masks"], options["unmasked_weight"] = options["path"], settings.options.get("unmasked_weight", 0.1)
    several = _resolutions(resolution)
    if override and len(several) != len(_resolutions(settings.options.get("resolution"))):
        text = f"{shorten(resolution)}: every image is trained at each of them in an epoch here, at one of them there"
        settings.missing.append((f"{label}.image.resolution_override", text))
    for part in several:
        edge = part.split("x")[0] if "x" in part else part
        settings.folders.append(
            Folder(f"{label} at {part}" if len(several) > 1 else label, {**options, "resolution": edge})
        )


def _add_samples(settings: Settings, samples: list[dict[str, Any]]) -> None:
    samples = [sample for sample in samples if sample.get("enabled", True) and str(sample.get("prompt") or "").strip()]
    if not samples:
        return
    prompts = [" ".join(str(sample["prompt"]).split()) for sample in samples]
    settings.options["sample.prompts"] = prompt_text(prompts, "sample")
    for name in ("negative_prompt", "diffusion_steps", "cfg_scale", "seed"):
        if samples[0].get(name) is not None:
            settings.options[f"sample.{name}"] = samples[0][name]
    sizes = []
    for sample in samples:
        edges = (sample.get("width"), sample.get("height"))
        if all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges):
            sizes.append("x".join(str(round_edge(whole(edge))) for edge in edges))
    if sizes:
        settings.options["sample.sizes"] = ", ".join(dict.fromkeys(sizes))


TRAINER = Trainer("OneTrainer", _is_main, _read, TABLE, FOLDERS)
