"""Definitions of all nodes. nodes/comfyui/extension.py converts them to ComfyUI nodes; the CLI runs them directly."""

from __future__ import annotations

from ..trainer_core.spec import NodeSpec
from . import (
    adapter_settings,
    adaptive_guider,
    dataset_backend,
    load_chroma,
    load_flux,
    lora_trainer,
    memory_settings,
    optimizer_settings,
    plan_run,
    publish_lora,
    quantize_model,
    validate_sampler,
)
from .datasets import check_dataset, save_dataset
from .lora_tools import (
    check_lora,
    extract_lora,
    load_lora_file,
    merge_lora,
    resize_lora,
    scale_lora,
)
from .runs import latest_checkpoint, sample_run, sweep_settings
from .wizard import quick_lora

CATALOGUE: dict[str, NodeSpec] = {
    spec.id: spec
    for spec in (
        quick_lora.SPEC,
        load_chroma.SPEC,
        load_flux.SPEC,
        quantize_model.SPEC,
        dataset_backend.SPEC,
        save_dataset.SPEC,
        check_dataset.SPEC,
        lora_trainer.SPEC,
        validate_sampler.SPEC,
        adapter_settings.SPEC,
        optimizer_settings.SPEC,
        memory_settings.SPEC,
        sweep_settings.SPEC,
        plan_run.SPEC,
        load_lora_file.SPEC,
        latest_checkpoint.SPEC,
        check_lora.SPEC,
        merge_lora.SPEC,
        resize_lora.SPEC,
        scale_lora.SPEC,
        extract_lora.SPEC,
        publish_lora.SPEC,
        sample_run.SPEC,
    )
}

# These nodes use ComfyUI's own objects, so they run only in ComfyUI.
COMFYUI_ONLY: dict[str, NodeSpec] = {spec.id: spec for spec in (adaptive_guider.SPEC,)}
ALL_NODES = {**CATALOGUE, **COMFYUI_ONLY}
