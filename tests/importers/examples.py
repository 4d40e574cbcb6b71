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
