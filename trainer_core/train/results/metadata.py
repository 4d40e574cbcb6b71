"""The record in every written file: the request, the workflow, versions, the dataset's digest, the trigger.

It holds no date and no path: equal requests write equal bytes (docs/decisions/0002-no-date-in-files.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

from ...data.sample_table import columns
from ...host import Paths
from ...runs.portable import portable
from ...version import VERSION
from ..prepare import RunPlan
from ..step.state import TrainState
from .parents import parents_of

RECORDED = ("request", "versions", "dataset", "trigger", "parents")  # what of a run's record its LoRA holds
PACKAGES = ("torch", "diffusers", "transformers", "optimum-quanto", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that decide numerical results."""
    packages = {"chroma-trainer": VERSION}
    for name in PACKAGES:
        try:
            packages[name] = _version_of(name)
        except metadata.PackageNotFoundError:
            continue
    return packages


@lru_cache
def _version_of(package: str) -> str:
    """Read once: it parses the package's whole metadata, and a run asks several times."""
    return metadata.version(package)


def make_record(plan: RunPlan, prompt: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    """Return the record of a run as JSON values: request, workflow, versions, dataset and trigger.

    It may be published: names stand in place of the paths of this machine.
    """
    parents = parents_of(plan.request)
    return {
        "request": portable(plan.request.as_json(), paths),
        "workflow": portable(dict(prompt), paths),
        "versions": versions(),
        "dataset": {"digest": plan.index.digest, "images": len(plan.index.samples)},
        "trigger": trigger_of(plan),
        **({"parents": parents} if parents else {}),
    }


def trigger_of(plan: RunPlan) -> str:
    """Return the distinct trigger words of the dataset's parts, separated by commas."""
    return ", ".join(dict.fromkeys(part.trigger.strip() for part in plan.request.dataset.parts if part.trigger.strip()))


def lora_metadata(plan: RunPlan, state: TrainState, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of the safetensors header.

    It holds what ComfyUI, kohya's tools and model browsers read, and this trainer's own record.
    """
    layer = next(iter(state.layers.values()))
    architecture = state.family.labels(plan.request.model)["modelspec.architecture"]
    return {
        "ss_network_dim": str(layer.file_rank),
        "ss_network_alpha": f"{layer.file_alpha:g}",
        **layer.network,
        **_common_metadata(plan, state, record),
        "modelspec.architecture": architecture,
    }


def model_metadata(plan: RunPlan, state: TrainState, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a whole model: as that of a LoRA, without a network."""
    architecture = state.family.labels(plan.request.model)["modelspec.architecture"]
    return {**_common_metadata(plan, state, record), "modelspec.architecture": architecture.removesuffix("/lora")}


def _common_metadata(plan: RunPlan, state: TrainState, record: Mapping[str, Any]) -> dict[str, str]:
    config, labels = state.config, state.family.labels(plan.request.model)
    largest = int(columns(state.samples)["bucket"].max())
    return {
        "ss_base_model_version": labels["ss_base_model_version"],
        "ss_output_name": config.name,
        "ss_steps": str(state.step),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": config.name,
        "modelspec.resolution": f"{largest}x{largest}",
        "modelspec.trigger_phrase": record["trigger"],
        "prompt": json.dumps(record["workflow"], sort_keys=True),
        "chroma_trainer": json.dumps(
            {key: record[key] for key in RECORDED if key in record} | {"step": state.step},
            sort_keys=True,
        ),
    }
