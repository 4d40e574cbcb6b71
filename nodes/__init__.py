"""The nodes, as data. nodes/comfy.py turns them into ComfyUI nodes; the CLI runs them as they are."""

from __future__ import annotations

from ..trainer_core.spec import NodeSpec
from . import dataset_backend, load_chroma, lora_trainer, quantize_model, validate_sampler

CATALOGUE: dict[str, NodeSpec] = {
    spec.id: spec
    for spec in (
        load_chroma.SPEC,
        quantize_model.SPEC,
        dataset_backend.SPEC,
        lora_trainer.SPEC,
        validate_sampler.SPEC,
    )
}
