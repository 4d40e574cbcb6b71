"""Turn a request into a RunPlan: everything that is checked and decided before weights are loaded."""

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
from ..models.loading.fingerprint import remembering, sampling
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
    """A checked request with its dataset, folder, device and manifest. No weights are loaded."""

    request: TrainRequest
    family: Family
    index: Index
    folder: Path
    device: torch.device
    manifest: RunManifest  # what the run's folder name identifies
    resume_from: ResumeFrom | None = None  # another run whose newest checkpoint this run continues
    references: References | None = None  # reference images
    memory: MemoryConfig | None = None  # chosen for this machine where the request's mode is auto

    @property
    def resolved_request(self) -> TrainRequest:
        """The request with the memory settings that are applied. The recorded request is the original one."""
        return replace(self.request, memory=self.memory) if self.memory else self.request


def plan_run(request: TrainRequest, host: Host, unreadable: Mapping[str, str] | None = None) -> RunPlan:
    """Check everything that can be checked without weights.

    Args:
        unreadable: images that are known not to decode, see data.dataset.Unreadable. Further ones that are found here
            are skipped or are an error, as on_broken says.
    Raises:
        UserError: all problems of the model files, the dataset and the settings; or the changes since an unfinished run
            of this name.
    """
    left_out = dict(unreadable or {})
    while True:
        try:
            return _name_run(check_run(request, host, left_out), host)
        except Unreadable as error:
            left_out |= error.faults


@dataclass(frozen=True)
class CheckedRequest:
    """A request without problems, with its dataset and device. No weight file was read or downloaded."""

    request: TrainRequest
    family: Family
    index: Index
    device: torch.device
    optimizer: OptimizerPart
    references: References | None = None  # reference images


def check_run(
    request: TrainRequest, host: Host, unreadable: Mapping[str, str], machine: Machine | None = None
) -> CheckedRequest:
    """Check everything that can be checked before the model is downloaded.

    Args:
        unreadable: images that are known not to decode.
        machine: where QuantizeModel's level auto is chosen for; None: this machine.
    Raises:
        UserError: all problems.
    """
    family: Family = load("family", request.model.family)()
    request = resolve_for_model(request, family)
    device = pick_device(host.device)
    problems = all_problems(request, host, family, device)
    optimizer: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    index = collect(problems, build_index, request.dataset, host, request.training.seed, unreadable)
    references = None
    if isinstance(index, Index) and family.takes_references(request.model) and request.dataset.has_references:
        references = collect(problems, find_references, index, request.dataset)
    if problems:
        raise UserError(dict.fromkeys(problems))  # without duplicates: two checks find an empty folder
    assert isinstance(index, Index)
    assert references is None or isinstance(references, References)
    if references:
        index = replace(index, digest=sha256_text(index.digest, references.index.digest))
    if request.model.quantization.level == AUTO:
        request = with_precision(request, family, index, machine or this_machine(device, request.model.dtype), host)
    return CheckedRequest(request, family, index, device, optimizer, references)


def _name_run(checked: CheckedRequest, host: Host) -> RunPlan:
    """Identify the run by its request, dataset and model files, and look for an unfinished run of the same name."""
    request, family, index = checked.request, checked.family, checked.index
    with sampling():
        sampled = weight_identities(request, family)
    masks = index.masks.samples if index.masks else ()
    with remembering(host):
        identities = weight_identities(request, family)
    manifest = RunManifest(settings_of(request), identities, index.samples, masks, sampled)
    folder = _folder_of(checked, manifest.weights, host)
    older = _folder_of(checked, sampled, host)
    if layout.has_checkpoints(older) and not layout.has_checkpoints(folder):  # it continues where it began
        folder, manifest = older, replace(manifest, weights=sampled)
    resume_from = check_for_changes(folder, manifest, request)
    if not (folder / layout.CROP_SHEET).is_file():  # the folder's name holds the dataset's digest
        draw_crop_sheet(index, folder / layout.CROP_SHEET)
    if checked.references and not (folder / layout.PAIR_SHEET).is_file():
        draw_pair_sheet(index, checked.references, folder / layout.PAIR_SHEET)
    warning = request.validation and family.warning(request.model, request.validation)
    hints = describe_hints(request.training, request.optimizer, checked.optimizer)
    for text in [*hints, *([warning] if warning else [])]:
        host.emit(Notice(text, "warning"))
    return RunPlan(request, family, index, folder, checked.device, manifest, resume_from, checked.references)


def _folder_of(checked: CheckedRequest, identities: Mapping[str, str], host: Host) -> Path:
    request = checked.request
    digest = run_digest(request, checked.index, identities)
    return layout.run_folder(host.paths.output, request.training.name, digest)


def resolve_for_model(request: TrainRequest, family: Family) -> TrainRequest:
    """Return the request with the settings that are left to the model. The run records this request."""
    validation = family.resolve_sampling(request.model, request.validation) if request.validation else None
    return replace(request, training=family.resolve_training(request.model, request.training), validation=validation)


def run_digest(request: TrainRequest, index: Index, identities: Mapping[str, str]) -> str:
    """Return the hex digest of everything that decides the training, so that only the same run is resumed."""
    settings = json.dumps(settings_of(request), sort_keys=True)
    return sha256_text(settings, index.digest, *identities.values())
