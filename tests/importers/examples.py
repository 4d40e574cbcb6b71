"""Configurations of the forms that other trainers' guides have, written by hand with the same keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHROMA_GUIDE: dict[str, Any] = {
    "model_type": "lora", "model_family": "chroma", "model_flavour": "base", "output_dir": "/workspace/chroma-output",
    "network_rank": 16, "learning_rate": 2.0e-4, "mixed_precision": "bf16", "gradient_checkpointing": True,
    "pretrained_model_name_or_path": None, "data_backend_config": "config/multidatabackend.json",
}  # fmt: skip
CHROMA_EXAMPLE: dict[str, Any] = {
    "base_model_precision": "int8-quanto", "checkpoint_step_interval": 10, "controlnet": False,
    "data_backend_config": "config/multidatabackend.json", "disable_bucket_pruning": True, "flow_schedule_shift": 3,
    "fuse_qkv_projections": False, "grad_clip_method": "value", "gradient_checkpointing": True, "hub_model_id": "my-chroma-lora",
    "learning_rate": 1e-4, "lora_alpha": 16, "lora_rank": 16, "lora_type": "standard", "lr_scheduler": "constant",
    "max_train_steps": 100, "mixed_precision": "bf16", "model_family": "chroma", "model_type": "lora", "num_eval_images": 25,
    "num_train_epochs": 0, "optimizer": "adamw_bf16", "output_dir": "output/chroma", "push_checkpoints_to_hub": False,
    "push_to_hub": False, "quantize_via": "cpu", "report_to": "none", "seed": 42, "tracker_project_name": "lora-training",
    "tracker_run_name": "one", "train_batch_size": 1, "use_ema": False, "vae_batch_size": 1,
    "validation_disable_unconditional": True, "validation_guidance": 4.0, "validation_guidance_rescale": 0.0,
    "validation_negative_prompt": "ugly", "validation_num_inference_steps": 16, "validation_prompt": "a cat with a sign",
    "validation_prompt_library": False, "validation_resolution": "1024x1024", "validation_seed": 42, "validation_steps": 50,
}  # fmt: skip
FLUX_GUIDE: dict[str, Any] = {
    "--model_type": "lora", "--model_family": "flux", "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "--output_dir": "output/models", "--train_batch_size": 1, "--validation_resolution": "1024x1024,1280x768",
    "--validation_guidance": 3.0, "--validation_guidance_real": 1.0, "--validation_num_inference_steps": 20,
    "--validation_prompt": "a photo of sks", "--user_prompt_library": "config/user_prompt_library.json",
    "--lora_rank": 4, "--gradient_accumulation_steps": 2, "--optimizer": "optimi-lion", "--mixed_precision": "bf16",
    "--gradient_checkpointing": "true", "--gradient_checkpointing_interval": 2, "--base_model_precision": "int8-quanto",
    "--text_encoder_1_precision": "no_change", "--text_encoder_2_precision": "no_change", "--max_grad_norm": 1.0,
    "--grad_clip_method": "norm", "--base_model_default_dtype": "bf16", "--flux_lora_target": "all+ffs", "--lora_init_type": "pissa",
    "--num_train_epochs": 3, "--max_train_steps": 0, "--flow_schedule_auto_shift": True, "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100, "--learning_rate": "1e-4", "--flux_guidance_value": 1.0, "--flux_attention_masked_training": False,
    "--data_backend_config": "config/multidatabackend.json", "--caption_dropout_probability": 0.1, "--seed": 7,
    "--tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]},
    "--attention_mechanism": "sageattention", "--checkpoints_total_limit": 5, "--checkpointing_steps": 500,
}  # fmt: skip
LIBRARY = {"portrait": "a portrait of sks", "chef": "sks as a chef"}
BACKENDS: list[dict[str, Any]] = [
    {
        "id": "photos", "type": "local", "crop": True, "crop_aspect": "square", "crop_style": "center", "resolution": 512,
        "minimum_image_size": 512, "maximum_image_size": 512, "target_downsample_size": 512, "resolution_type": "pixel_area",
        "cache_dir_vae": "cache/vae/photos", "instance_data_dir": "datasets/photos", "disabled": False,
        "skip_file_discovery": "", "caption_strategy": "filename", "metadata_backend": "discovery", "repeats": 0,
        "is_regularisation_data": True,
    },
    {
        "id": "subject", "type": "local", "crop": False, "resolution": 1024, "minimum_image_size": 1024,
        "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution_type": "pixel_area",
        "cache_dir_vae": "cache/vae/subject", "instance_data_dir": "datasets/subject", "caption_strategy": "instanceprompt",
        "instance_prompt": "a photo of sks", "metadata_backend": "discovery", "repeats": 1000, "conditioning_data": "subject-masks",
    },
    {"id": "subject-masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "datasets/masks"},
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text", "write_batch_size": 128},
]  # fmt: skip


def write_simpletuner(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config").mkdir(exist_ok=True)
    for name, value in (("config", config), ("multidatabackend", BACKENDS), ("user_prompt_library", LIBRARY)):
        (folder / "config" / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder / "config" / "config.json"


FLUX_COMMAND = """#!/bin/bash
# a comment with --seed 3
accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py \\
  --pretrained_model_name_or_path="/models/flux1-dev.safetensors" --clip_l="/models/clip_l.safetensors" \\
  --t5xxl=/models/t5xxl_fp16.safetensors --ae='/models/ae.safetensors' --dataset_config="data.toml" \\
  --output_dir="out" --output_name="my_flux_lora" --save_model_as=safetensors --network_module=networks.lora_flux \\
  --network_dim=16 --network_alpha=1 --learning_rate=1e-4 --optimizer_type="AdamW8bit" \\
  --optimizer_args "weight_decay=0.1" "betas=0.9,0.99" --lr_scheduler="constant" --sdpa --max_train_epochs=10 \\
  --save_every_n_epochs=1 --mixed_precision="bf16" --gradient_checkpointing --guidance_scale=1.0 \\
  --timestep_sampling="flux_shift" --model_prediction_type="raw" --blocks_to_swap=18 --fp8_base \\
  --cache_text_encoder_outputs --cache_latents --sample_prompts="prompts.txt"
"""
DATASET_TOML = """
[general]
flip_aug = true
color_aug = false
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"

[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [1024, 1024]
  [[datasets.subsets]]
  image_dir = 'C:\\pictures\\cats'
  num_repeats = 3

[[datasets]]
batch_size = 3
enable_bucket = true
resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\\pictures\\cats'
  num_repeats = 1
"""
GUI: dict[str, Any] = {
    "LoRA_type": "Flux1", "adaptive_noise_scale": 0, "additional_parameters": "", "ae": "/models/ae.safetensors", "apply_t5_attn_mask": False,
    "bucket_no_upscale": True, "bucket_reso_steps": 64, "cache_latents": True, "caption_dropout_rate": 0, "caption_extension": ".txt",
    "clip_l": "/models/clip_l.safetensors", "color_aug": False, "discrete_flow_shift": 3, "enable_bucket": True, "epoch": 8, "flip_aug": False,
    "flux1_checkbox": True, "flux1_t5xxl": "/models/t5xxl.safetensors", "fp8_base": True, "guidance_scale": 1, "gradient_checkpointing": True,
    "keep_tokens": 0, "learning_rate": 0.0002, "lr_scheduler": "constant", "max_grad_norm": 0, "max_resolution": "768,768", "max_train_steps": 0,
    "mixed_precision": "bf16", "model_prediction_type": "raw", "network_alpha": 16, "network_dim": 32, "network_dropout": 0, "noise_offset": 0,
    "optimizer": "AdamW8bit", "output_name": "gui-lora", "output_dir": "/out", "pretrained_model_name_or_path": "/models/flux1-dev.safetensors",
    "rank_dropout": 0.1, "save_precision": "bf16", "sdxl": False, "seed": 5, "shuffle_caption": False, "timestep_sampling": "shift",
    "train_batch_size": 2, "train_data_dir": "/data/img", "unet_lr": 0.0002, "v2": False, "xformers": "sdpa", "vae": "",
}  # fmt: skip
AI_TOOLKIT = """---
job: extension
config:
  name: my_first_chroma_lora_v1
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: /path/to/images
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        attention_backend: flash
      model:
        name_or_path: lodestones/Chroma
        arch: chroma
        quantize: true
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] plays chess", "a horse as a DJ"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 25
meta:
  name: "[name]"
  version: '1.0'
"""
ONETRAINER_CHROMA: dict[str, Any] = {
    "base_model_name": "lodestones/Chroma1-HD", "batch_size": 2, "learning_rate": 0.0003, "model_type": "CHROMA_1", "resolution": "512",
    "dataloader_threads": 1, "transformer": {"train": True, "weight_dtype": "FLOAT_8", "offload_fraction": 0.6},
    "text_encoder": {"train": False, "weight_dtype": "FLOAT_8"}, "output_model_format": "DIFFUSERS_LORA", "training_method": "LORA",
    "vae": {"weight_dtype": "FLOAT_32"}, "train_dtype": "BFLOAT_16", "weight_dtype": "BFLOAT_16", "output_dtype": "BFLOAT_16",
    "timestep_distribution": "INVERTED_PARABOLA", "noising_weight": 7.7, "layer_filter": "attn,ff.net,proj_mlp", "layer_filter_preset": "attn-mlp",
    "quantization": {"layer_filter": "transformer_block", "layer_filter_preset": "blocks"},
}  # fmt: skip
ONETRAINER_FLUX: dict[str, Any] = {
    "backup_after": 10, "base_model_name": "black-forest-labs/FLUX.1-dev", "batch_size": 4, "learning_rate": 0.0003, "model_type": "FLUX_DEV_1",
    "output_model_destination": "models/lora.safetensors", "output_model_format": "DIFFUSERS_LORA", "resolution": "768",
    "transformer": {"train": True, "weight_dtype": "NFLOAT_4"}, "text_encoder": {"train": False, "weight_dtype": "BFLOAT_16"},
    "text_encoder_2": {"train": False, "weight_dtype": "NFLOAT_4"}, "training_method": "LORA", "vae": {"weight_dtype": "FLOAT_32"},
    "train_dtype": "BFLOAT_16", "timestep_distribution": "LOGIT_NORMAL", "dynamic_timestep_shifting": True,
}  # fmt: skip
ONETRAINER_CONCEPTS: list[dict[str, Any]] = [
    {
        "name": "cat", "path": "/data/cat", "seed": 1, "enabled": True, "include_subdirectories": False, "image_variations": 1, "text_variations": 1,
        "balancing": 3.0, "balancing_strategy": "REPEATS", "loss_weight": 1.0,
        "image": {"enable_crop_jitter": True, "enable_random_flip": True, "random_rotate_max_angle": 0.0, "enable_resolution_override": False, "resolution_override": "512"},
        "text": {"prompt_source": "sample", "prompt_path": "", "enable_tag_shuffling": False, "tag_delimiter": ",", "keep_tags_count": 1},
    },
    {"name": "held out", "path": "/data/eval", "validation_concept": True},
]  # fmt: skip
PIPE = """
output_dir = '/runs/my-run'
dataset = 'dataset.toml'
epochs = 100
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 4
gradient_clipping = 1.0
warmup_steps = 100
eval_every_n_epochs = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = true
pseudo_huber_c = 0.5
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
steps_per_print = 1
[model]
type = 'chroma'
diffusers_path = ''
transformer_path = '/models/Chroma1-HD.safetensors'
dtype = 'bfloat16'
transformer_dtype = 'float8'
flux_shift = true
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
[monitoring]
enable_wandb = false
"""
PIPE_DATASET = """
resolutions = [512, 1024]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1]
[[directory]]
path = '/data/images'
num_repeats = 5
"""
