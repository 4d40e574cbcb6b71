"""Find all problems of a request before a model is loaded.

`problems_of` needs no torch. `all_problems` adds what depends on the device and the model's modules, and imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.targets import choose_layers
from ..config.adapter import KIND_RULES, NO_LORA
from ..config.request import TrainRequest
from ..data.places.open_source import has_archives, is_remote
from ..data.source.folder import FolderBackend, no_images
from ..distributed.device_list import devices_for, idle_text, num_launched
from ..errors import Problem, UserError, reason_of
from ..host import Host, collect
from ..models.lora_targets import Linears
from ..quant.packages import missing_for_drawing, missing_for_optimizer, missing_packages
from ..registry import load
from ..runs.layout import MANIFEST
from ..storage.bounded_files import Unusable
from ..trackers.dispatch import parse_trackers
from ..validation.scores.score_model import score_problems
from .block_lr import rates_of
from .full_rank_check import full_rank_problems
from .model_check import (
    contradictions,
    refuse_other_layers,
    sampling_model_file_problems,
    sampling_model_problems,
)
from .tokenizer_files import is_checked_by_family, tokenizer_problems

if TYPE_CHECKING:  # so that checks of settings do not import torch
    import torch

    from ..models.family import Family
    from ..optim.optimizer import OptimizerPart

PLAIN_INITS = ("default", "gaussian")
OF_THE_STATE = (
    ("adapter", "kind"), ("training", "rank"), ("training", "alpha"), ("training", "targets"), ("optimizer", "optimizer"),
)  # fmt: skip
CANCELLING_INITS = ("orthogonal", "pissa", "olora", "loftq")  # rounding their factors changes the initial update


def all_problems(
    request: TrainRequest,
    host: Host,
    family: Family,
    optimizer: OptimizerPart,
    device: torch.device,
    needs_weights: bool = True,
) -> list[Problem]:
    """Return the problems of the settings, the model's files, the device and the adapter. No weights are loaded.

    Args:
        request: as resolved by the family, see resolve_for_model in train/prepare.py.
        device: the device of the run.
        needs_weights: False for a plan, see Family.problems.
    """
    from ..devices import DTYPES
    from ..quant.loading import quantization_problems
    from ..quant.low_precision_matmul import products_problems
    from ..validation.attention import drawing_problems
    from .attach_adapter import check_fit
    from .placement import device_problems

    dtype, quantization = DTYPES.get(request.model.dtype, DTYPES["fp32"]), request.model.quantization
    problems = [
        *problems_of(request, host),
        *family.problems(request.model, needs_weights),
        *device_problems(request.memory, device, dtype),
        *drawing_problems(request.validation, device, dtype),
        *quantization_problems(quantization, device),
        *products_problems(quantization, device),
        *sharding_problems(request),
    ]
    if not any(problem.field == "optimizer" for problem in problems):
        problems += optimizer_problems(optimizer, device)
    if not is_checked_by_family(request.model):
        problems += tokenizer_problems(request.model)
    if not problems:
        problems += sampling_model_file_problems(request, family, device, needs_weights)
    if not problems:  # the check of the adapter reads the files of the model
        collect(problems, check_fit, request, family)
        collect(problems, refuse_other_layers, request, family)
    return problems


def sharding_problems(request: TrainRequest) -> list[Problem]:
    """Return a problem where this torch can't share out weights."""
    if not request.training.is_sharded:
        return []
    from ..full_rank.sharding import fault_of_torch

    fault = fault_of_torch()
    return [Problem("shard", f"{fault}; install a newer torch (2.13 is tested), or use off")] if fault else []


def optimizer_problems(optimizer: OptimizerPart, device: torch.device) -> list[Problem]:
    """Return a problem where the optimizer lacks a package or does not run on the device."""
    missing = optimizer.missing(device.type)
    return [Problem("optimizer", missing)] if missing else []


def problems_of(request: TrainRequest, host: Host) -> list[Problem]:
    """Return problems of the dataset folders and of settings that contradict each other.

    It is quick, because it stops at the first image of each folder.
    """
    problems: list[Problem] = []
    for part, root in zip(request.dataset.parts, request.dataset.roots, strict=True):
        backend = FolderBackend(Path(root))
        if not (is_remote(root) or backend.has_images() or has_archives(Path(root))):
            problems.append(Problem("dataset", no_images(part.folder, backend)))
    problems += missing_packages(request.model.quantization)
    problems += missing_for_optimizer(request.optimizer.optimizer)
    problems += missing_for_drawing(request.validation)
    problems += score_problems(request.validation)
    problems += missing_trackers(request)
    problems += full_rank_problems(request, host)
    if not request.adapter.is_full:
        problems += devices_problems(request, host)
    training, memory = request.training, request.memory
    if training.steps and training.warmup_steps >= training.steps:
        problems.append(
            Problem(
                "warmup_steps",
                f"{training.warmup_steps} warm-up steps leave nothing of {training.steps} steps; "
                f"use at most {training.steps - 1}",
            )
        )
    if training.rollout_probability and all(part.prior_preservation for part in request.dataset.parts):
        problems.append(
            Problem(
                "rollout_probability",
                "is above 0, but every image has prior_preservation, and such images have no rollouts; use 0",
            )
        )
    if memory.checkpointing_interval > 1 and not training.gradient_checkpointing:
        problems.append(
            Problem(
                "checkpointing_interval",
                f"is {memory.checkpointing_interval}, but gradient_checkpointing is off; turn it on, or use 1",
            )
        )
    own = (*adapter_problems(request), *layer_problems(request), *route_problems(request))
    return [*problems, *contradictions(request), *reference_problems(request), *sampling_model_problems(request), *own]


def devices_problems(request: TrainRequest, host: Host) -> list[Problem]:
    """Return problems of the devices: one is missing, or there are more of them than micro-batches in a step."""
    accumulation = request.training.accumulation
    try:
        devices = devices_for(request.training, host.machines.count)
    except UserError as error:
        return list(error.problems)
    size = num_launched() or max(1, len(devices)) * host.machines.count
    return [Problem("devices", idle_text(size, accumulation))] if size > accumulation else []


def reference_problems(request: TrainRequest) -> list[Problem]:
    """Return problems of reference images: missing where the model needs them, or given where it takes none."""
    model, dataset = request.model, request.dataset
    if model.takes_references and not dataset.has_references:
        text = (
            f"is empty, and {model.flavour} generates images from reference images; set their folder, or set degrade "
            "to make each reference from the image itself"
        )
        return [Problem("references", text)]
    fields = (
        ("references", any(dataset.reference_roots)),
        ("degrade", dataset.has_degraded),
        ("reference", bool(request.validation_reference)),
    )
    return [
        Problem(field, f"is set, but {model.family} {model.flavour} takes no reference images; leave it empty")
        for field, is_given in fields
        if is_given and not model.takes_references
    ]


def missing_trackers(request: TrainRequest) -> list[Problem]:
    """Return a problem for each tracker that lacks its package or its API key."""
    missing = [load("tracker", name).missing() for name in parse_trackers(request.training.trackers)]
    return [Problem("trackers", f"{text}; or choose tensorboard or none") for text in missing if text]


def adapter_problems(request: TrainRequest) -> list[Problem]:
    """Return problems of the combination of adapter kind, init, format and base model."""
    config, init = request.adapter, request.training.init
    if config.is_full:
        return []  # full_rank_problems
    rule = KIND_RULES[config.kind]
    problems = []
    if init not in rule.inits:
        problems.append(Problem("init", f"{init!r} can't initialize a {config.kind}; use {', '.join(rule.inits)}"))
    if config.format not in rule.formats:
        reason = "its product has no rows that can be fused as this format requires"
        text = f"{config.format!r} can't store a {config.kind}: {reason}; use {', '.join(rule.formats)}"
        problems.append(Problem("format", text))
    if init == "loftq" and request.model.quantization.level == "none":
        reason = "corrects quantization errors, but the model is not quantized; connect QuantizeModel or use default"
        problems.append(Problem("init", f"'loftq' {reason}"))
    if config.precision != "fp32" and (init in CANCELLING_INITS or config.kind == "dora"):
        what = (
            "the magnitudes of a dora"
            if config.kind == "dora"
            else f"the update of init {init!r}, a small difference of large values"
        )
        problems.append(Problem("precision", f"{config.precision} is too coarse for {what}; use fp32"))
    if config.init_lora != NO_LORA and init not in PLAIN_INITS:
        reason = f"continues from a file, so init {init!r} has nothing to initialize; use {' or '.join(PLAIN_INITS)}"
        problems.append(Problem("init_lora", reason))
    return problems + continued_problems(request)


def continued_problems(request: TrainRequest) -> list[Problem]:
    """Return the settings with which the optimizer state of a checkpoint does not fit, each with its value there."""
    checkpoint = request.adapter.checkpoint
    if not checkpoint:
        return []
    from ..runs.manifest import read_manifest  # imports numpy

    run = Path(checkpoint).parents[1]
    try:
        settings = read_manifest(run)["settings"]
        before = {name: settings[part][name] for part, name in OF_THE_STATE}
    except (OSError, Unusable, KeyError, TypeError) as error:
        text = f"{run / MANIFEST} can't be read, so its optimizer state is not known to fit: {reason_of(error)}"
        return [Problem("init_optimizer", f"{text}; set init_optimizer to new")]
    parts = {
        "adapter": request.adapter, "training": request.training.with_alpha(), "optimizer": request.optimizer,
    }  # fmt: skip
    now = {name: getattr(parts[part], name) for part, name in OF_THE_STATE}
    problems = [
        Problem("init_optimizer", f"{name} is {now[name]!r}, and the state of {run.name} is of {before[name]!r}; use that, or set init_optimizer to new")
        for name in now
        if now[name] != before[name]
    ]  # fmt: skip
    if (init := settings["training"].get("init")) not in PLAIN_INITS:
        text = f"{run.name} was started with init {init}, whose weights are relative to its start; set init_optimizer to new"
        problems.append(Problem("init_optimizer", text))
    return problems


def route_problems(request: TrainRequest) -> list[Problem]:
    """Return problems of the routed blocks, where the model's files are present and show how many blocks it has."""
    problems: list[Problem] = []
    linears: Linears = load("linears", request.model.family)
    try:
        num_blocks = linears.num_blocks(request.model)
    except UserError:  # layer_problems reports it
        return []
    if num_blocks is not None:
        collect(problems, request.training.routed_blocks, num_blocks)
    return problems


def layer_problems(request: TrainRequest) -> list[Problem]:
    """Return problems of targets and block_lr, where the model's files are present and show its layers."""
    linears: Linears = load("linears", request.model.family)
    try:
        names = linears.names(request.model, request.adapter.is_full)
        if names is None:
            return []
        chosen = choose_layers(names, linears, request.training.targets, request.adapter.is_full)
        rates_of(chosen, request.adapter.block_lr)
    except UserError as error:
        return list(error.problems)
    return []
