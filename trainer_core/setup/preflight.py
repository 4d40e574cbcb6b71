"""Everything that can be seen to be wrong with a request before a model loads.

`problems_of` needs no torch; `all_problems` adds what depends on the device and on the model's modules, and loads torch for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.block_lr import rates_of
from ..adapters.targets import choose_layers
from ..config.adapter import KIND_RULES, NO_LORA
from ..config.request import TrainRequest
from ..data.source.folder import SUFFIXES
from ..errors import Problem, UserError
from ..host import Host, collect
from ..models.lora_targets import Linears
from ..quant.packages import missing_for_drawing, missing_packages
from ..registry import load
from ..trackers.dispatch import parse_trackers

if TYPE_CHECKING:  # not a circle: torch stays out of the checks of settings
    import torch

    from ..models.family import Family
    from ..optim.optimizer import OptimizerPart

PLAIN_INITS = ("default", "gaussian")
CANCELLING_INITS = ("orthogonal", "pissa", "olora", "loftq")  # rounding their factors moves where the update begins


def all_problems(request: TrainRequest, host: Host, family: Family, device: torch.device) -> list[Problem]:
    """Of the settings, the model's files, the device and the adapter. No weights are loaded.

    Args:
        request: as the family resolves it, see train/prepare.py: resolve_for_model.
        device: that the run would train on.
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
        *family.problems(request.model),
        *device_problems(request.memory, device, dtype),
        *drawing_problems(request.validation, device, dtype),
        *optimizer_problems(request, device),
        *quantization_problems(quantization, device),
        *products_problems(quantization, device),
    ]
    if not problems:  # what the adapter fits is looked up in the files of the model
        collect(problems, check_fit, request, family)
    return problems


def optimizer_problems(request: TrainRequest, device: torch.device) -> list[Problem]:
    """A package that the optimizer lacks, or a device that it does not run on."""
    part: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    missing = part.missing(device.type)
    return [Problem("optimizer", missing)] if missing else []


def problems_of(request: TrainRequest, host: Host) -> list[Problem]:
    """Folders without images, and settings that contradict each other. Quick: stops at the first image it finds."""
    found: list[Problem] = []
    for part, root in zip(request.dataset.parts, request.dataset.roots, strict=True):
        if not any(path.suffix.lower() in SUFFIXES for path in Path(root).rglob("*")):
            endings = " ".join(sorted(SUFFIXES))
            found.append(
                Problem(
                    "dataset", f"no images in {part.folder!r} or its subfolders; put files there that end in {endings}"
                )
            )
    found += missing_packages(request.model.quantization)
    found += missing_for_drawing(request.validation)
    found += missing_trackers(request)
    training, memory = request.training, request.memory
    if training.steps and training.warmup_steps >= training.steps:
        found.append(
            Problem(
                "warmup_steps",
                f"{training.warmup_steps} steps of warm-up leave nothing of {training.steps} steps; use at most {training.steps - 1}",
            )
        )
    if training.rollout_probability and all(part.prior_preservation for part in request.dataset.parts):
        found.append(
            Problem(
                "rollout_probability",
                "is above 0, but every picture has prior_preservation, which is never rolled out; use 0",
            )
        )
    if memory.checkpointing_interval > 1 and not training.gradient_checkpointing:
        found.append(
            Problem(
                "checkpointing_interval",
                f"is {memory.checkpointing_interval}, but gradient_checkpointing is off; turn it on, or use 1",
            )
        )
    own = (*adapter_problems(request), *layer_problems(request), *route_problems(request))
    return [*found, *reference_problems(request), *own]


def reference_problems(request: TrainRequest) -> list[Problem]:
    """Pictures to start from, where the model takes none, or none of them, where it does."""
    model, dataset = request.model, request.dataset
    if model.takes_references and not dataset.has_references:
        told = f"is empty, and {model.flavour} makes pictures out of others; name their folder, or say in degrade how each is made out of its own"
        return [Problem("references", told)]
    named = (
        ("references", any(dataset.reference_roots)),
        ("degrade", dataset.has_degraded),
        ("reference", bool(request.validation_reference)),
    )
    return [
        Problem(field, f"is given, and {model.family} {model.flavour} starts from no picture; leave it empty")
        for field, is_given in named
        if is_given and not model.takes_references
    ]


def missing_trackers(request: TrainRequest) -> list[Problem]:
    """A problem for each tracker that lacks its package or its key."""
    missing = [load("tracker", name).missing() for name in parse_trackers(request.training.trackers)]
    return [Problem("trackers", f"{text}; or choose tensorboard or none") for text in missing if text]


def adapter_problems(request: TrainRequest) -> list[Problem]:
    """Combinations of kind, start, format and base that can't work."""
    config, init = request.adapter, request.training.init
    rule = KIND_RULES[config.kind]
    found = []
    if init not in rule.inits:
        found.append(Problem("init", f"{init!r} can't start a {config.kind}; use {', '.join(rule.inits)}"))
    if config.format not in rule.formats:
        reason = "its product has no rows that could be fused as there"
        text = f"{config.format!r} can't hold a {config.kind}: {reason}; use {', '.join(rule.formats)}"
        found.append(Problem("format", text))
    if init == "loftq" and request.model.quantization.level == "none":
        reason = "mends what quantisation lost, and the model is not quantised; connect QuantizeModel or use default"
        found.append(Problem("init", f"'loftq' {reason}"))
    if config.precision != "fp32" and (init in CANCELLING_INITS or config.kind == "dora"):
        what = (
            "a dora's magnitudes"
            if config.kind == "dora"
            else f"what init {init!r} learns, a small difference of large numbers,"
        )
        found.append(Problem("precision", f"{config.precision} is too coarse for {what}; use fp32"))
    if config.init_lora != NO_LORA and init not in PLAIN_INITS:
        reason = f"goes on from a file, so that init {init!r} has nothing to start; use {' or '.join(PLAIN_INITS)}"
        found.append(Problem("init_lora", reason))
    return found


def route_problems(request: TrainRequest) -> list[Problem]:
    """Blocks to skip that the model has not, as far as its files are here to say how many it has."""
    found: list[Problem] = []
    linears: Linears = load("linears", request.model.family)
    num_blocks = linears.num_blocks(request.model)
    if num_blocks is not None:
        collect(found, request.training.routed_blocks, num_blocks)
    return found


def layer_problems(request: TrainRequest) -> list[Problem]:
    """targets and block_lr that fit no layer of the model, as far as its files are here to say what layers it has."""
    linears: Linears = load("linears", request.model.family)
    names = linears.names(request.model)
    if names is None:
        return []
    try:
        rates_of(choose_layers(names, linears, request.training.targets), request.adapter.block_lr)
    except UserError as error:
        return list(error.problems)
    return []
