"""From a request to a Run: text and latents cached, base loaded and quantised, LoRA injected. Each heavy part is freed before the next is loaded."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..adapters.inject import trainable_parameters
from ..config.memory import MemoryConfig
from ..config.model import AUTO
from ..config.request import TrainRequest
from ..data.batch_sampler import BatchPlan
from ..data.cache.latents import LARGEST_BATCH, Change, LatentCache, cache_latents
from ..data.cache.masks import MaskWeights, cache_masks
from ..data.cache.prompts import Prompts, TextCache, cache_prompts
from ..data.dataset import Index, Unreadable, build_index
from ..data.holdout import split
from ..data.reference_images import ReferenceLatents, References, find_references
from ..data.sample_table import Captions, columns
from ..devices import empty_cache, pick_device
from ..errors import Problem, UserError
from ..flow.sigma_density import density
from ..host import Host, Notice, collect
from ..models.family import Family
from ..models.loading.weights import DTYPES
from ..optim.optimizer import OptimizerPart
from ..optim.param_groups import parameter_groups
from ..planner.auto_quantization import with_precision
from ..planner.memory_plan import Machine
from ..plots.crop_sheet import draw_crop_sheet
from ..plots.pair_sheet import draw_pair_sheet
from ..quant.loading import load_base, quantization_problems, text_identity
from ..quant.low_precision_matmul import choose_products_, products_problems
from ..registry import load
from ..runs.manifest import Adoption, World, meet_change, settings_of
from ..setup.attach_adapter import check_fit, init_identity, inject_adapter_, new_ema
from ..setup.hints import advice
from ..setup.placement import compile_, device_problems, latent_identity, load_codec, load_text_encoder, place_
from ..setup.preflight import problems_of
from ..storage.atomic import sha256_text
from ..storage.tensor_store import Store
from ..validation.attention import drawing_problems
from ..validation.sample_images import prompts_of
from .attention_choice import choose_attention_
from .machine import this_machine
from .phase_timer import Phases
from .step.loop import Run
from .step.oom_recovery import Relief

WEIGHTS = ("transformer", "text_encoder", "codec")


@dataclass(frozen=True)
class Plan:
    """A checked request, its dataset and its folder: all that is known before anything heavy is loaded."""

    request: TrainRequest
    family: Family
    index: Index
    folder: Path
    device: torch.device
    world: World  # what the run's name stands for
    adoption: Adoption | None = None
    references: References | None = None  # pictures to start from
    memory: MemoryConfig | None = None  # as chosen for this machine, where the request says auto

    @property
    def placed(self) -> TrainRequest:
        """The request with the memory settings that are carried out. What is recorded is the request as it was made."""
        return replace(self.request, memory=self.memory) if self.memory else self.request


def plan_run(request: TrainRequest, host: Host, unreadable: Mapping[str, str] | None = None) -> Plan:
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
            return _named(check_run(request, host, left_out), host)
        except Unreadable as found:
            left_out |= found.faults


@dataclass(frozen=True)
class Checked:
    """A request without a problem, its dataset, and where it would run. No file of weights was asked for."""

    request: TrainRequest
    family: Family
    index: Index
    device: torch.device
    optimizer: OptimizerPart
    references: References | None = None  # pictures to start from


def check_run(
    request: TrainRequest, host: Host, unreadable: Mapping[str, str], machine: Machine | None = None
) -> Checked:
    """Everything that can be checked while a model on the hub is not on this machine yet.

    Args:
        machine: that level auto of QuantizeModel is chosen for; None: this one.
    Raises:
        UserError: every problem, together.
    """
    family: Family = load("family", request.model.family)()
    request = as_the_model_wants(request, family)
    device = pick_device(host.device)
    found = [*problems_of(request, host), *family.problems(request.model), *device_problems(request.memory, device, DTYPES.get(request.model.dtype, torch.float32))]
    found += drawing_problems(request.validation, device, DTYPES.get(request.model.dtype, torch.float32))
    optimizer: OptimizerPart = load("optimizer", request.optimizer.optimizer)
    if optimizer.missing(device.type):
        found.append(Problem("optimizer", optimizer.missing(device.type)))
    found += [*quantization_problems(request.model.quantization, device), *products_problems(request.model.quantization, device)]
    if not found:
        collect(found, check_fit, request, family)
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
    return Checked(request, family, index, device, optimizer, references)


def _named(checked: Checked, host: Host) -> Plan:
    """The run that a request stands for, by the files of its model, and what became of an earlier one of its name."""
    request, family, index = checked.request, checked.family, checked.index
    identities = {part: family.identity(request.model, part) for part in WEIGHTS}
    identities["init_lora"] = init_identity(request)
    identities["codec"] = latent_identity(family, request)
    identities["text_encoder"] = text_identity(family, request.model)
    digest = run_digest(request, index, identities)
    folder = host.paths.output / "chroma_trainer" / f"{request.training.name}-{digest[:8]}"
    world = World(settings_of(request), identities, index.samples, index.masks.samples if index.masks else ())
    adoption = meet_change(folder, world, request)
    if not (folder / "crops.png").is_file():  # the folder's name holds the dataset's digest
        draw_crop_sheet(index, folder / "crops.png")
    if checked.references and not (folder / "pairs.png").is_file():
        draw_pair_sheet(index, checked.references, folder / "pairs.png")
    drawn = request.validation and family.warning(request.model, request.validation)
    for text in [*advice(request.training, request.optimizer, checked.optimizer), *([drawn] if drawn else [])]:
        host.emit(Notice(text, "warning"))
    return Plan(request, family, index, folder, checked.device, world, adoption, checked.references)


def as_the_model_wants(request: TrainRequest, family: Family) -> TrainRequest:
    """The request with the settings that are left to the model. It is recorded so."""
    drawn = family.drawn(request.model, request.validation) if request.validation else None
    return replace(request, training=family.trained(request.model, request.training), validation=drawn)


def run_digest(request: TrainRequest, index: Index, identities: Mapping[str, str]) -> str:
    """Names everything that decides the course of the training, so that only the same run is resumed."""
    settings = json.dumps(settings_of(request), sort_keys=True)
    return sha256_text(settings, index.digest, *identities.values())


def build_run(plan: Plan, host: Host, phases: Phases) -> Run:
    """Cache, load, quantise and inject. The base model is frozen; the LoRA is new, its update zero."""
    config, family, device = plan.request.training, plan.family, plan.device
    memory = plan.placed.memory
    with phases("latents"):  # before anything is loaded: a mask may be at fault
        masks = _cache_masks(plan, host)
    with phases("text"):
        text = _cache_text(plan, host)
    with phases("latents"):
        latents = _cache_latents(plan, plan.index, host)
        starts = _cache_latents(plan, plan.references.index, host, plan.references.change) if plan.references else None
    gc.collect()
    empty_cache(device)
    with phases("load"):
        transformer = load_base(family, plan.request.model, host, device)
        if left_out := choose_products_(transformer, plan.request.model.quantization.products):
            host.emit(Notice(left_out, "warning"))
        if memory.group_offload == "none":  # otherwise it may not fit there as a whole
            transformer.to(device)
        injected = inject_adapter_(transformer, family, plan.request, device, host)
        layers = injected.layers
        if left_out := compile_(transformer, family, memory, device):
            host.emit(Notice(left_out, "warning"))
        disk = host.paths.cache / "offload" / offload_key(plan)
        place_(transformer, family, memory, device, checkpointing=config.gradient_checkpointing, disk=disk)
        parameters = [parameter for _, parameter in trainable_parameters(layers)]
        part: OptimizerPart = load("optimizer", plan.request.optimizer.optimizer)
        optimizer = part.build(
            parameter_groups(layers, injected.rates), plan.request.optimizer, config.learning_rate, config.weight_decay, config.seed
        )
    samples, held = split(plan.index.samples, config.holdout)
    batches = BatchPlan(
        columns(samples)["bucket"],
        np.array([part.repeats for part in plan.request.dataset.parts])[columns(samples)["part"]],
        config.batch_size,
        config.seed,
    )
    num_steps = config.steps or -(-config.epochs * batches.batches_per_epoch // config.accumulation)
    host.emit(Notice(batches.explain(num_steps, config.accumulation)))
    if held:
        host.emit(Notice(f"{len(held)} of {len(plan.index.samples)} images are held out to judge checkpoints by"))
    run = Run(
        config=config, family=family, transformer=transformer, layers=layers, parameters=parameters, optimizer=optimizer,
        optimizer_config=plan.request.optimizer,
        density=density(config.sigma_density, config.shift), samples=samples, held=held, plan=batches,
        latents=latents, text=text, device=device, num_steps=num_steps,
        references=ReferenceLatents(plan.references, starts) if plan.references and starts else None,
        masks=masks,
        prior_parts=frozenset(i for i, part in enumerate(plan.request.dataset.parts) if part.prior_preservation),
        ema=new_ema(plan.request, layers),
        dtype=plan.request.model.dtype,
        relief=Relief.where_auto(plan.request.memory, memory, config, family.blocks(transformer), device, host),
    )  # fmt: skip
    choose_attention_(run, memory.attention, host)
    return run


def offload_key(plan: Plan) -> str:
    """Names the frozen weights as they are after quantisation: their files on disk."""
    model = plan.request.model
    stored = replace(model.quantization, products="exact")
    return sha256_text(plan.family.identity(model, "transformer"), model.dtype, repr(stored))[:16]


def _cache_text(plan: Plan, host: Host) -> TextCache:
    others = ["", *(prompts_of(plan.request.validation) if plan.request.validation else ())]
    return cache_prompts(
        Prompts(Captions(plan.index.samples), others), text_identity(plan.family, plan.request.model),
        lambda: load_text_encoder(plan.family, plan.placed, plan.device), _store(host, "text"), host,
    )  # fmt: skip


def _cache_latents(plan: Plan, index: Index, host: Host, change: Change | None = None) -> LatentCache:
    return cache_latents(
        index, latent_identity(plan.family, plan.request),
        lambda: load_codec(plan.family, plan.placed, plan.device), _store(host, "latents"), host,
        largest_batch=1 if plan.device.type == "cpu" else LARGEST_BATCH, change=change,
    )  # fmt: skip


def _cache_masks(plan: Plan, host: Host) -> MaskWeights | None:
    masks, factor = plan.index.masks, plan.family.pixel_step // 2
    return cache_masks(masks, plan.request.dataset, factor, _store(host, "masks"), host) if masks else None


def _store(host: Host, kind: str) -> Store:
    return Store(host.paths.cache / kind, on_damage=lambda text: host.emit(Notice(text, "warning")))
