"""Build the state of a run: cache text and latents, load and quantize the base model, inject the LoRA.

Each large model is freed before the next one is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..adapters.inject import trainable_parameters
from ..adapters.layer import AdapterLayer
from ..config.request import TrainRequest
from ..data.batch_sampler import BatchPlan
from ..data.cache.latents import LARGEST_BATCH, Change, LatentCache, cache_latents
from ..data.cache.masks import MaskWeights, cache_masks
from ..data.cache.prompts import Prompts, TextCache, cache_prompts
from ..data.dataset import Index
from ..data.holdout import split
from ..data.reference_images import ReferenceLatents
from ..data.sample_table import Captions, ClassCaptions, Mirrored, Sample, columns
from ..devices import empty_cache, trim_heap
from ..distributed.ranks import ALONE, Ranks
from ..flow.loss_scale import LossScale
from ..flow.sigma_density import density
from ..full_rank.sharding import Sharding
from ..full_rank.step_in_backward import StepInBackward
from ..full_rank.trained_layer import give_stepper_
from ..host import Host, Notice
from ..models.projections import projection_groups
from ..optim.optimizer import build_optimizer, parameter_groups
from ..quant.loading import load_base, text_identity
from ..quant.low_precision_matmul import choose_products_
from ..registry import load
from ..setup.attach_adapter import Injected, inject_adapter_, new_ema
from ..setup.identities import base_identity, latent_identity
from ..setup.placement import compile_, load_codec, load_text_encoder, place_, place_sharded_, weights_stay
from ..storage.tensor_store import Store
from ..validation.sample_images import prompts_of
from .attention_choice import choose_attention_
from .hooks.background_save import BackgroundSave
from .hooks.leak_meter import LeakMeter, Probe, describe_missing, find_probes
from .phase_timer import PhaseTimer
from .prepare import RunPlan
from .step.oom_recovery import OomRecovery
from .step.state import Judge, TrainState
from .step.working_copies import WorkingCopies


@dataclass(frozen=True)
class _Caches:
    """What is encoded before a model is loaded.

    Attributes:
        probes: Of the leak.
        text: Embeddings of all prompts.
        latents: Of all images.
        references: Of their references; None if there are none.
        masks: None if there are none.
        drawn_text: Embeddings of the validation prompts for another model with another text encoder; else None.
    """

    probes: tuple[Probe, ...]
    text: TextCache
    latents: LatentCache
    references: ReferenceLatents | None
    masks: MaskWeights | None
    drawn_text: TextCache | None


def build_run(
    plan: RunPlan, host: Host, phases: PhaseTimer, ranks: Ranks = ALONE, judge: Judge | None = None
) -> TrainState:
    """Cache the dataset, load and quantize the base model, and inject the adapter.

    The base model is frozen. The LoRA is new, and its update is zero.

    Args:
        judge: may end the run at a checkpoint.
    """
    config, family, device = plan.request.training, plan.family, plan.device
    memory = plan.resolved_request.memory
    caches = _cache_dataset(plan, host, phases, ranks)
    gc.collect()
    empty_cache(device)
    trim_heap()
    with phases("load"):
        transformer, injected, sharding = _load_in_turn(plan, host, ranks)
        layers = injected.layers
        optimizer = _build_optimizer(plan, injected)
    samples, held, batches, num_steps = plan_batches(plan.request, plan.index)
    host.emit(Notice(batches.explain(num_steps, config.accumulation)))
    if held:
        host.emit(Notice(f"{len(held)} of {len(plan.index.samples)} images are held out to evaluate checkpoints"))
    blocks = family.blocks(transformer)
    in_backward = _step_in_backward(plan, optimizer, layers, ranks, sharding) if plan.request.adapter.is_full else None
    state = TrainState(
        config=config, family=family, transformer=transformer, layers=layers,
        parameters=[parameter for _, parameter in trainable_parameters(layers)],
        optimizer=optimizer, optimizer_config=plan.request.optimizer,
        density=density(config.sigma_density, config.shift), samples=samples, held=held, plan=batches,
        latents=caches.latents, text=caches.text, device=device, num_steps=num_steps,
        references=caches.references,
        masks=caches.masks,
        drawn_text=caches.drawn_text,
        parts=plan.request.dataset.parts,
        working=WorkingCopies(layers, projection_groups(blocks), joins_bases=weights_stay(memory, device)),
        loss_scale=LossScale() if plan.request.model.dtype == "fp16" and not in_backward else None,
        ema=new_ema(plan.request, layers),
        leak_meter=LeakMeter(caches.probes),
        judge=judge,
        ranks=ranks,
        in_backward=in_backward,
        sharding=sharding,
        background_save=_background_save(host, ranks, sharding) if in_backward else None,
        dtype=plan.request.model.dtype,
        oom_recovery=None if in_backward else OomRecovery.where_auto(  # a step that has begun can't be retried
            plan.request.memory, memory, config, blocks, device, host
        ),
    )  # fmt: skip
    ranks.leaders_first(lambda: choose_attention_(state, memory.attention, host))
    return state


def _cache_dataset(plan: RunPlan, host: Host, phases: PhaseTimer, ranks: Ranks) -> _Caches:
    """Encode what is not in the cache yet: masks, prompts, images and references."""
    with phases("latents"):  # before anything is loaded, because a mask may be invalid
        masks = _cache_masks(plan, host, ranks)
    probes = find_probes(plan.request, plan.index)
    if message := "" if probes else describe_missing(plan.request):
        host.emit(Notice(message))
    with phases("text"):
        text = _cache_text(plan, host, ranks, [probe.prompts[1] for probe in probes])
        drawn_text = _cache_drawn_text(plan, host, ranks)
    references = None
    with phases("latents"):
        store = _store(host, "latents")
        latents = _cache_latents(plan, plan.index, host, ranks, store)
        if plan.references:
            encoded = _cache_latents(plan, plan.references.index, host, ranks, store, plan.references)
            references = ReferenceLatents(plan.references, encoded)
        if any(part.flip for part in plan.request.dataset.parts):
            _cache_mirrored(plan, host, ranks, store)
    return _Caches(probes, text, latents, references, masks, drawn_text)


def plan_batches(request: TrainRequest, index: Index) -> tuple[Sequence[Sample], Sequence[Sample], BatchPlan, int]:
    """Return the samples that are trained on, those that are held out, the batches, and the number of steps."""
    config = request.training
    samples, held = split(index.samples, config.holdout)
    repeats = np.array([part.repeats for part in request.dataset.parts])[columns(samples)["part"]]
    batches = BatchPlan(columns(samples)["bucket"], repeats, config.batch_size, config.seed)
    num_steps = config.steps or -(-config.epochs * batches.batches_per_epoch // config.accumulation)
    return samples, held, batches, num_steps


def _load_in_turn(plan: RunPlan, host: Host, ranks: Ranks) -> tuple[nn.Module, Injected, Sharding | None]:
    """Load the model, first on one rank of each machine if it writes the quantized base to the cache for the others."""
    config = plan.request.model.quantization
    if config.level != "none" and config.cached_bases:
        return ranks.leaders_first(lambda: (*_load_model(plan, host), None))
    return _load_sharded(plan, host, ranks) if plan.request.training.is_sharded else (*_load_model(plan, host), None)


def _load_sharded(plan: RunPlan, host: Host, ranks: Ranks) -> tuple[nn.Module, Injected, Sharding]:
    """Load the model in RAM, where its weights are mapped from the files, and share it out over the devices."""
    family, device = plan.family, plan.device
    transformer = load_base(family, plan.request.model, host, device)
    injected = inject_adapter_(transformer, family, plan.request, device, host)
    return transformer, injected, place_sharded_(
        transformer, family, plan.resolved_request, injected.layers, device, ranks, host
    )  # fmt: skip


def _load_model(plan: RunPlan, host: Host) -> tuple[nn.Module, Injected]:
    """Load and quantize the base model, inject the adapter, and put everything where it trains."""
    family, device, memory = plan.family, plan.device, plan.resolved_request.memory
    # With group offload the whole model may not fit on the device.
    resident = memory.group_offload == "none"
    transformer = load_base(family, plan.request.model, host, device, resident)
    if warning := choose_products_(transformer, plan.request.model.quantization.products):
        host.emit(Notice(warning, "warning"))
    if resident:
        transformer.to(device)
    injected = inject_adapter_(transformer, family, plan.request, device, host)
    disk = host.paths.cache / "offload" / base_identity(plan.request, family)
    checkpointing = plan.request.training.gradient_checkpointing
    place_(transformer, family, memory, device, checkpointing=checkpointing, disk=disk)
    if warning := compile_(transformer, family, memory, device):
        host.emit(Notice(warning, "warning"))
    return transformer, injected


def _build_optimizer(plan: RunPlan, injected: Injected) -> torch.optim.Optimizer:
    request = plan.request
    part, groups = load("optimizer", request.optimizer.optimizer), parameter_groups(injected.layers, injected.rates)
    return build_optimizer(part, injected.layers, groups, request.optimizer, request.training)


def _step_in_backward(
    plan: RunPlan,
    optimizer: torch.optim.Optimizer,
    layers: Mapping[str, AdapterLayer],
    ranks: Ranks,
    sharding: Sharding | None,
) -> StepInBackward:
    parameters, seed = dict(trainable_parameters(layers)), plan.request.training.seed
    if sharding is not None:
        return StepInBackward(optimizer, parameters, seed, slices=sharding.slices)
    stepper = StepInBackward(optimizer, parameters, seed, ranks)
    give_stepper_(layers.values(), stepper)
    return stepper


def _background_save(host: Host, ranks: Ranks, sharding: Sharding | None) -> BackgroundSave:
    if sharding is None:
        return BackgroundSave(host)
    from .hooks.sharded.sharded_background_save import ShardedBackgroundSave  # imports torch.distributed.checkpoint

    return ShardedBackgroundSave(host, ranks)


def _cache_mirrored(plan: RunPlan, host: Host, ranks: Ranks, store: Store) -> None:
    """Cache the latents of mirrored images, and of their references."""
    is_flipped = np.array([part.flip > 0 for part in plan.request.dataset.parts])
    for index in filter(None, (plan.index, plan.references and plan.references.index)):
        numbers = np.flatnonzero(is_flipped[columns(index.samples)["part"]])
        change = plan.references if plan.references and index is plan.references.index else None
        _cache_latents(plan, replace(index, samples=Mirrored(index.samples, numbers)), host, ranks, store, change)


def _cache_text(plan: RunPlan, host: Host, ranks: Ranks, plain_prompts: Sequence[str]) -> TextCache:
    captions = Captions(plan.index.samples)
    if plan.request.training.preservation:
        captions = ClassCaptions(plan.index.samples, plan.request.dataset.parts)
    drawn = prompts_of(plan.request.validation) if plan.request.validation and not _has_drawn_text(plan) else []
    return _cache_prompts(plan.resolved_request, Prompts(captions, ["", *drawn, *plain_prompts]), plan, host, ranks)


def _cache_drawn_text(plan: RunPlan, host: Host, ranks: Ranks) -> TextCache | None:
    """Encode the validation prompts for another model that samples, where its text encoder is another one."""
    request = plan.resolved_request
    if request.validation is None or not _has_drawn_text(plan):
        return None
    prompts = prompts_of(request.validation)
    return _cache_prompts(request.for_drawing, prompts, plan, host, ranks)


def _has_drawn_text(plan: RunPlan) -> bool:
    model, other = plan.request.model, plan.request.sampling_model
    return other is not None and text_identity(plan.family, other) != text_identity(plan.family, model)


def _cache_prompts(request: TrainRequest, prompts: Sequence[str], plan: RunPlan, host: Host, ranks: Ranks) -> TextCache:
    return cache_prompts(
        prompts, text_identity(plan.family, request.model),
        lambda: load_text_encoder(plan.family, request, plan.device, host), _store(host, "text"), host,
        ranks=ranks,
    )  # fmt: skip


def _cache_latents(
    plan: RunPlan, index: Index, host: Host, ranks: Ranks, store: Store, change: Change | None = None
) -> LatentCache:
    return cache_latents(
        index, latent_identity(plan.family, plan.request),
        lambda: load_codec(plan.family, plan.resolved_request, plan.device), store, host,
        largest_batch=1 if plan.device.type == "cpu" else LARGEST_BATCH, change=change, ranks=ranks,
        are_pixels=plan.family.latent_factor == 1,
    )  # fmt: skip


def _cache_masks(plan: RunPlan, host: Host, ranks: Ranks) -> MaskWeights | None:
    masks, factor = plan.index.masks, plan.family.latent_factor
    return cache_masks(masks, plan.request.dataset, factor, _store(host, "masks"), host, ranks) if masks else None


def _store(host: Host, kind: str) -> Store:
    return Store(host.paths.cache / kind, on_damage=lambda text: host.emit(Notice(text, "warning")))
