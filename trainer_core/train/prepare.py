"""Turn a request into a RunPlan: everything that is checked and decided before weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config.memory import MemoryConfig
from ..config.model import AUTO
from ..config.request import TrainRequest
from ..config.training import MIN_HELD_OUT, NEVER, TrainingConfig
from ..data.dataset import Index, Unreadable, build_index
from ..data.holdout import keeps_copies_together, num_held
from ..data.reference_images import References, find_references
from ..data.sample_table import Sample
from ..devices import pick_device
from ..distributed.device_list import only_device
from ..errors import Problem, UserError
from ..host import Host, Notice, collect
from ..models.family import Family
from ..models.loading.fingerprint import remembering, sampling
from ..optim.optimizer import OptimizerPart
from ..planner.auto_quantization import with_precision
from ..planner.memory_plan import Machine, this_machine
from ..plots.crop_sheet import draw_crop_sheet
from ..plots.pair_sheet import draw_pair_sheet
from ..quant.levels import with_level_to_draw
from ..registry import load
from ..runs import layout
from ..runs.manifest import ResumeFrom, RunManifest, check_for_changes, settings_of
from ..setup.caption_check import Wildcards, check_texts, describe_texts
from ..setup.full_rank_check import full_rank_hints
from ..setup.hints import describe_hints, describe_preservation
from ..setup.identities import model_identities, weight_identities
from ..setup.placement import without_streams
from ..setup.preflight import all_problems
from ..storage.atomic import sha256_text
from ..validation.sample_images import prompts_of


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
    machine: Machine | None = None  # what each rank has, where several train

    @property
    def resolved_request(self) -> TrainRequest:
        """The request with the memory settings that are applied. The recorded request is the original one."""
        return replace(self.request, memory=self.memory) if self.memory else self.request


def plan_run(
    request: TrainRequest,
    host: Host,
    unreadable: Mapping[str, str] | None = None,
    shared_machine: Machine | None = None,
    is_main: bool = True,
) -> RunPlan:
    """Check everything that can be checked without weights.

    Args:
        unreadable: images that are known not to decode, see data.dataset.Unreadable. Further ones that are found here
            are skipped or are an error, as on_broken says.
        shared_machine: where several ranks train, what each of them has. None: this machine.
        is_main: whether this rank looks for an unfinished run in the run's folder, and draws there.
    Raises:
        UserError: all problems of the model files, the dataset and the settings; or the changes since an unfinished run
            of this name.
    """
    left_out = dict(unreadable or {})
    while True:
        try:
            return _name_run(check_run(request, host, left_out, shared_machine=shared_machine), host, is_main)
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


def device_of(request: TrainRequest, host: Host) -> torch.device:
    """Return the device that trains: the one that the request names, else the host's."""
    return pick_device(only_device(request.training.devices) or host.device)


def check_run(
    request: TrainRequest,
    host: Host,
    unreadable: Mapping[str, str],
    machine: Machine | None = None,
    needs_weights: bool = True,
    shared_machine: Machine | None = None,
) -> CheckedRequest:
    """Check everything that can be checked before the model is downloaded.

    Args:
        unreadable: images that are known not to decode.
        machine: where QuantizeModel's level auto is chosen for; None: this machine.
        needs_weights: False for a plan: a released model need not be on this machine, nor on the network.
        shared_machine: see plan_run.
    Raises:
        UserError: all problems.
    """
    family: Family = load("family", request.model.family)()
    unresolved, request = request, resolve_for_model(request, family)
    for line in _describe_choices(unresolved.training, request.training, family):
        host.emit(Notice(line))
    device = device_of(request, host)
    optimizer: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    problems = all_problems(request, host, family, optimizer, device, needs_weights)
    index = collect(problems, build_index, request.dataset, host, request.training.seed, unreadable)
    if isinstance(index, Index):
        problems += _held_out_problems(request.training, index.samples)
    references = None
    if isinstance(index, Index) and family.takes_references(request.model) and request.dataset.has_references:
        references = collect(problems, find_references, index, request.dataset)
    if problems:
        raise UserError(dict.fromkeys(problems))  # without duplicates: two checks find an empty folder
    assert isinstance(index, Index)
    assert references is None or isinstance(references, References)
    if references:
        index = replace(index, digest=sha256_text(index.digest, references.index.digest))
    if machine is None or not machine.device_bytes:  # else the plan is for a machine with an accelerator
        request = replace(request, memory=without_streams(request.memory, device, host))
    if request.model.quantization.level == AUTO:
        room = machine or shared_machine or this_machine(device, request.model.dtype)
        request = with_precision(request, family, index, room, host)
    request = _with_level_to_sample(request, family, device)
    return CheckedRequest(request, family, index, device, optimizer, references)


def _with_level_to_sample(request: TrainRequest, family: Family, device: torch.device) -> TrainRequest:
    """Return the request with level auto of the sampling model resolved: the trained model's, which fits where that one does."""
    if request.validation is None or request.sampling_model is None:
        return request
    other = with_level_to_draw(request.sampling_model, family, device, request.model)
    return replace(request, validation=replace(request.validation, sampling_model=other))


def _held_out_problems(training: TrainingConfig, samples: Sequence[Sample]) -> list[Problem]:
    """Return a problem where too few images are held out for stop_when."""
    num_images = len(samples)
    count = num_held(samples, training.holdout) if training.stop_when != NEVER else 0
    if not count or count >= MIN_HELD_OUT:
        return []
    share = math.ceil(100 * MIN_HELD_OUT / num_images) / 100
    fix = f"set holdout to {share:g} or more" if share <= 0.5 else "add images, or set stop_when to never"
    text = f"stop_when needs {MIN_HELD_OUT} or more held-out images, and {count} of {num_images} are held out; {fix}"
    return [Problem("holdout", text)]


def _name_run(checked: CheckedRequest, host: Host, is_main: bool) -> RunPlan:
    """Identify the run by its request, dataset and model files, and look for an unfinished run of the same name."""
    request, family = checked.request, checked.family
    index = _check_captions(checked.index, request, host)
    masks = index.masks.samples if index.masks else ()
    with remembering(host):
        identities = weight_identities(request, family)
        if request.sampling_model:  # read here, with progress, and remembered: they identify images of the base
            model_identities(request.for_drawing, family)
    folder = _folder_of(checked, identities, host)
    manifest = RunManifest(_settings_of(request, index), identities, index.samples, masks)
    if not layout.has_checkpoints(folder):  # it may have begun under its sampled identity
        with sampling():
            sampled = {**identities, **model_identities(request, family)}
        older = _folder_of(checked, sampled, host)
        manifest = replace(manifest, sampled_weights=sampled)
        if layout.has_checkpoints(older):  # it continues where it began
            folder, manifest = older, replace(manifest, weights=sampled)
    resume_from = check_for_changes(folder, manifest, request) if is_main else None
    if is_main:
        _draw_sheets(folder, index, checked.references)
    warning = request.validation and family.warning(request.drawn_model, request.validation)
    hints = describe_hints(request.training, request.optimizer, checked.optimizer) + full_rank_hints(request)
    for line in dict.fromkeys(describe_preservation(request.training, request.dataset)):
        host.emit(Notice(line))
    for text in filter(None, [*hints, warning, request.model.training_hint]):
        host.emit(Notice(text, "warning"))
    return RunPlan(request, family, index, folder, checked.device, manifest, resume_from, checked.references)


def _draw_sheets(folder: Path, index: Index, references: References | None) -> None:
    """Draw what the dataset looks like, once: the folder's name holds the dataset's digest."""
    if not (folder / layout.CROP_SHEET).is_file():
        draw_crop_sheet(index, folder / layout.CROP_SHEET)
    if references and not (folder / layout.PAIR_SHEET).is_file():
        draw_pair_sheet(index, references, folder / layout.PAIR_SHEET)


def _folder_of(checked: CheckedRequest, identities: Mapping[str, str], host: Host) -> Path:
    request = checked.request
    digest = run_digest(request, checked.index, identities)
    return layout.run_folder(host.paths.output, request.training.name, digest)


def _check_captions(index: Index, request: TrainRequest, host: Host) -> Index:
    """Report captions and prompts that the text encoder can't read, or not as a whole."""
    captions = ((sample.path, caption) for sample in index.samples for caption in sample.captions)
    wildcards = Wildcards()
    unknown, long = check_texts(wildcards.watch(captions), request.model)
    prompts = prompts_of(request.validation) if request.validation else ()
    lines = [*wildcards.describe(), *describe_texts(unknown, long, "captions")]
    lines += describe_texts(*check_texts(((prompt[:40], prompt) for prompt in prompts), request.drawn_model), "prompts")
    for line in lines:
        host.emit(Notice(line, "warning"))
    report = dict(index.report)
    if unknown:
        report["unknown_captions"] = unknown.as_json()
    if long.count:
        report["long_captions"] = long.as_json()
    return replace(index, report=report)


def resolve_for_model(request: TrainRequest, family: Family) -> TrainRequest:
    """Return the request with the settings that are left to the model. The run records this request."""
    validation = family.resolve_sampling(request.drawn_model, request.validation) if request.validation else None
    training = family.resolve_training(request.model, request.training.with_alpha())
    return replace(request, training=training, validation=validation)


def _describe_choices(before: TrainingConfig, after: TrainingConfig, family: Family) -> list[str]:
    """Return a line for each training setting that was left to the trainer, and what it is."""
    lines = []
    if before.sigma_density != after.sigma_density:
        asked = before.sigma_density
        lines.append(f"sigma_density {asked}: {after.sigma_density}, which suits this {family.name.title()} model")
    if before.alpha != after.alpha:
        lines.append(f"alpha 0: {after.alpha:g}, as the rank")
    return lines


def run_digest(request: TrainRequest, index: Index, identities: Mapping[str, str]) -> str:
    """Return the hex digest of everything that decides the training, so that only the same run is resumed."""
    settings = json.dumps(_settings_of(request, index), sort_keys=True)
    return sha256_text(settings, index.digest, *identities.values())


def _settings_of(request: TrainRequest, index: Index) -> dict[str, Any]:
    """Return what decides the course of the training, as settings_of does, and how several samples of an image are held out.

    Earlier versions chose such samples one by one. A run that began so is not the same one.
    """
    settings = settings_of(request)
    if request.training.holdout and keeps_copies_together(index.samples, request.training.holdout):
        settings["training"]["holdout_of_copies"] = "together"
    return settings
