"""From a request to a RunPlan: everything that is checked and decided before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config.memory import MemoryConfig
from ..config.model import AUTO
from ..config.request import TrainRequest
from ..data.dataset import Index, Unreadable, build_index
from ..data.reference_images import References, find_references
from ..devices import pick_device
from ..errors import UserError
from ..host import Host, Notice, collect
from ..models.family import Family
from ..optim.optimizer import OptimizerPart
from ..planner.auto_quantization import with_precision
from ..planner.memory_plan import Machine, this_machine
from ..plots.crop_sheet import draw_crop_sheet
from ..plots.pair_sheet import draw_pair_sheet
from ..registry import load
from ..runs import layout
from ..runs.manifest import ResumeFrom, RunManifest, check_for_changes, settings_of
from ..setup.hints import describe_hints
from ..setup.identities import weight_identities
from ..setup.preflight import all_problems
from ..storage.atomic import sha256_text


@dataclass(frozen=True)
class RunPlan:
    """A checked request, its dataset and its folder: all that is known before anything heavy is loaded."""

    request: TrainRequest
    family: Family
    index: Index
    folder: Path
    device: torch.device
    manifest: RunManifest  # what the run's name stands for
    resume_from: ResumeFrom | None = None
    references: References | None = None  # pictures to start from
    memory: MemoryConfig | None = None  # as chosen for this machine, where the request says auto

    @property
    def resolved_request(self) -> TrainRequest:
        """The request with the memory settings that are carried out. What is recorded is the request as it was made."""
        return replace(self.request, memory=self.memory) if self.memory else self.request


def plan_run(request: TrainRequest, host: Host, unreadable: Mapping[str, str] | None = None) -> RunPlan:
    """Check everything that can be checked without weights.

    Args:
        unreadable: images that are known not to decode, see data.index.Unreadable; those that are found on the way are
            left out as well, or are an error, as on_broken says.
    Raises:
        UserError: every problem of the model's files, the dataset and the settings, together; or what has changed
            since an unfinished run of this name.
    """
    left_out = dict(unreadable or {})
    while True:
        try:
            return _name_run(check_run(request, host, left_out), host)
        except Unreadable as found:
            left_out |= found.faults


@dataclass(frozen=True)
class CheckedRequest:
    """A request without a problem, its dataset, and where it would run. No file of weights was asked for."""

    request: TrainRequest
    family: Family
    index: Index
    device: torch.device
    optimizer: OptimizerPart
    references: References | None = None  # pictures to start from


def check_run(
    request: TrainRequest, host: Host, unreadable: Mapping[str, str], machine: Machine | None = None
) -> CheckedRequest:
    """Everything that can be checked while a model on the hub is not on this machine yet.

    Args:
        machine: that level auto of QuantizeModel is chosen for; None: this one.
    Raises:
        UserError: every problem, together.
    """
    family: Family = load("family", request.model.family)()
    request = resolve_for_model(request, family)
    device = pick_device(host.device)
    found = all_problems(request, host, family, device)
    optimizer: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    index = collect(found, build_index, request.dataset, host, request.training.seed, unreadable)
    references = None
    if isinstance(index, Index) and family.takes_references(request.model) and request.dataset.has_references:
        references = collect(found, find_references, index, request.dataset)
    if found:
        raise UserError(dict.fromkeys(found))  # once each: an empty folder is seen by two checks
    assert isinstance(index, Index)
    assert references is None or isinstance(references, References)
    if references:
        index = replace(index, digest=sha256_text(index.digest, references.index.digest))
    if request.model.quantization.level == AUTO:
        request = with_precision(request, family, index, machine or this_machine(device, request.model.dtype), host)
    return CheckedRequest(request, family, index, device, optimizer, references)


def _name_run(checked: CheckedRequest, host: Host) -> RunPlan:
    """The run that a request stands for, by the files of its model, and what became of an earlier one of its name."""
    request, family, index = checked.request, checked.family, checked.index
    identities = weight_identities(request, family)
    digest = run_digest(request, index, identities)
    folder = layout.run_folder(host.paths.output, request.training.name, digest)
    manifest = RunManifest(settings_of(request), identities, index.samples, index.masks.samples if index.masks else ())
    resume_from = check_for_changes(folder, manifest, request)
    if not (folder / layout.CROP_SHEET).is_file():  # the folder's name holds the dataset's digest
        draw_crop_sheet(index, folder / layout.CROP_SHEET)
    if checked.references and not (folder / layout.PAIR_SHEET).is_file():
        draw_pair_sheet(index, checked.references, folder / layout.PAIR_SHEET)
    drawn = request.validation and family.warning(request.model, request.validation)
    for text in [*describe_hints(request.training, request.optimizer, checked.optimizer), *([drawn] if drawn else [])]:
        host.emit(Notice(text, "warning"))
    return RunPlan(request, family, index, folder, checked.device, manifest, resume_from, checked.references)


def resolve_for_model(request: TrainRequest, family: Family) -> TrainRequest:
    """The request with the settings that are left to the model. It is recorded so."""
    drawn = family.resolve_sampling(request.model, request.validation) if request.validation else None
    return replace(request, training=family.resolve_training(request.model, request.training), validation=drawn)


def run_digest(request: TrainRequest, index: Index, identities: Mapping[str, str]) -> str:
    """Names everything that decides the course of the training, so that only the same run is resumed."""
    settings = json.dumps(settings_of(request), sort_keys=True)
    return sha256_text(settings, index.digest, *identities.values())
