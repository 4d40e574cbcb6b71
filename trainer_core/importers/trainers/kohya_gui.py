"""The JSON of kohya_ss' GUI, and the file that FluxGym writes: the options of sd-scripts under other names."""

from __future__ import annotations

import re
from typing import Any

from ...errors import UserError
from ..option_table import Settings, Table, Trainer
from ..source_files import ConfigFile, SourceFiles, parse_words
from ..value_readers import is_off, shorten
from .kohya import FOLDERS, TABLE, add_prompt_lines, read_options

# GUI's name -> sd-scripts' option. Others are the same.
RENAMED = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "flux1_t5xxl": "t5xxl",
    "t5xxl": "t5xxl",
    "flux1_clip_l": "clip_l",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    "caption_dropout_rate": "caption_dropout_rate",
    "lr_scheduler_args": "lr_scheduler_args",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "loss_type": "loss_type",
    "cpu_offload_checkpointing": "cpu_offload_checkpointing",
    "flux_fused_backward_pass": "fused_backward_pass",
    "num_epochs": "max_train_epochs",
    "lora_name": "output_name",
    "base_model": "pretrained_model_name_or_path",
    "timestep_sampling": "timestep_sampling",
    "max_train_epochs": "max_train_epochs",
    "network_dim": "network_dim",
    "lr": "learning_rate",
    "vram": "vram",
}
MODULES = {
    "flux1": "networks.lora_flux",
    "standard": "networks.lora_flux",
    "lycoris/lokr": "lycoris.kohya",
    "lycoris/loha": "lycoris.kohya",
}
# Options of the GUI that only other models, or the GUI itself, have. They are in every file.
UNUSED = {
    name: "is for other models, or for the GUI itself"
    for name in (
        "LoRA_type",
        "LyCORIS_preset",
        "block_lr_zero_threshold",
        "clip_g*",
        "clip_skip",
        "dynamo_*",
        "extra_accelerate_launch_args",
        "flux1_checkbox",
        "gpu_ids",
        "lr_warmup_steps",
        "main_process_port",
        "main_training_function",
        "max_token_length",
        "model_list",
        "num_cpu_threads_per_process",
        "num_machines",
        "num_processes",
        "save_as_bool",
        "sd3_*",
        "sdxl*",
        "skip_cache_check",
        "split_mode",
        "stop_text_encoder_training*",
        "async_upload",
        "t5xxl_device",
        "t5xxl_dtype",
        "t5xxl_lr",
        "unit",
        "v2",
        "v_*",
        "dataset_preparation",
        "log_*",
        "clip_l_*",
        "conv_*",
        "logit_*",
        "mode_scale",
        "multires_noise_discount",
        "vae_batch_size",
        "lr_scheduler_args",
        "min_timestep",
        "max_timestep",
        "train_on_input",
        "factor",
    )
}
LOST = {
    "adaptive_noise_scale": "would have changed the noise",
    "rank_dropout*": "would have dropped ranks",
    "module_dropout": "would have dropped layers",
    "block_dims": "would have set ranks of blocks",
    "block_alphas": "would have set alphas of blocks",
    "img_*": "would have set ranks of layers",
    "txt_*": "would have set ranks of layers",
    "single_*": "would have set ranks of layers",
    "in_dims": "would have trained the embedders",
    "train_blocks": "see targets",
    "down_lr_weight": "see block_lr of AdapterSettings",
    "mid_lr_weight": "see block_lr of AdapterSettings",
    "up_lr_weight": "see block_lr of AdapterSettings",
    "loraplus_*": "would have used LoRA+",
    "full_fp16": "would have trained in fp16",
    "debiased_estimation_loss": "is not for flow matching",
    "weighted_captions": "would have weighted words",
    "bypass_mode": "chosen by itself here",
    "decompose_both": "see lokr_decompose_both of AdapterSettings",
    "use_*": "would have tuned LyCORIS",
    "rescaled": "would have tuned LyCORIS",
    "constrain": "would have tuned LyCORIS",
    "train_norm": "would have trained norms",
    "enable_all_linear": "see targets",
    "dim_from_weights": "would have read the rank",
    "save_last_n_*": "see keep_checkpoints",
    "extra_*": "would have been added to the command",
    "lr_warmup": "a share of the steps; see warmup_steps",
    "reg_data_dir": "see prior_preservation of a second DatasetBackend",
}
GUI_TABLE = Table(
    TABLE.rows,
    {**UNUSED, **TABLE.equal},
    {name: reason for name, reason in {**LOST, **TABLE.missing}.items() if name not in {**UNUSED, **TABLE.equal}},
    {**TABLE.defaults, "network_dim": 8},
    TABLE.usual,
)


def _is_main(value: Any) -> bool:
    return isinstance(value, dict) and ("LoRA_type" in value or {"lora_name", "network_dim"} <= value.keys())


def _read(file: ConfigFile, files: SourceFiles) -> Settings:
    options = {RENAMED.get(str(name), str(name)): _set(value) for name, value in file.value.items()}
    _settle_length(options)
    if is_off(options.get("unet_lr")):  # 0: learning_rate counts
        options.pop("unet_lr", None)
    kind = str(options.get("LoRA_type", "Flux1")).lower()
    if kind not in MODULES:
        raise UserError.at(f"{file.path.name}: LoRA_type", f"{shorten(options['LoRA_type'])} is not for Flux or Chroma")
    options["network_module"] = MODULES[kind]
    if kind.startswith("lycoris"):
        options["network_args.algo"] = kind.split("/")[1]
    if isinstance(options.get("additional_parameters"), str):
        options.update(parse_words(options.pop("additional_parameters").split()))
    for name in ("network_args", "optimizer_args"):
        if isinstance(options.get(name), str):
            options[name] = options[name].split()
    if options.get("attn_mode") is None and "xformers" in options:
        options["attn_mode"] = options.pop("xformers")
    prompts = options.pop("sample_prompts", None)
    settings = read_options(options, file, files)
    if isinstance(prompts, str):
        add_prompt_lines(settings, re.split(r"\n", prompts))
    return settings


def _settle_length(options: dict[str, Any]) -> None:
    """Keep what decides the length: the GUI counts `epoch` only where neither max_train_epochs nor max_train_steps is set."""
    epochs = options.pop("epoch", None)
    if is_off(options.get("max_train_epochs")):
        options.pop("max_train_epochs", None)
        if is_off(options.get("max_train_steps")) and is_off(options.get("dataset_config")) and not is_off(epochs):
            options["max_train_epochs"] = epochs


def _set(value: Any) -> Any:
    """Return a value, or None for what the GUI writes for an option that is not used."""
    return None if value == "" or (isinstance(value, int | float) and value < 0) else value


TRAINER = Trainer("kohya_ss", _is_main, _read, GUI_TABLE, FOLDERS)
