"""Estimate the memory of a request and its variants. Counts are cached, in memory and on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..data.dataset import Index
from ..models.family import Family
from ..storage.atomic import sha256_text
from ..storage.model_header import model_header_of
from ..storage.packed.packed_header import is_packed
from ..storage.stored_names import key_text
from .cost_cache import CostCache
from .cost_model import ModelCost, OptimizerCost, Shape
from .memory_plan import Machine, MemoryPlan
from .meta_model import MetaModel
from .phase_estimate import estimate_run
from .workload import CaptionFacts, CodecCost, EncoderCost, RunFacts, caption_facts, codec_cost, encoder_cost, facts_of


@dataclass
class MemoryEstimator:
    """Estimates requests on one dataset and one machine.

    Args:
        counts: cached counts of earlier runs.
        encoder: cost of the text encoder.
        codec: cost of the VAE.
        resolution: resolution at which the index assigned the images to buckets.
        num_devices: that train together; the estimate is that of one of them.
    """

    family: Family
    index: Index
    machine: Machine
    counts: CostCache
    encoder: EncoderCost
    codec: CodecCost
    captions: CaptionFacts
    resolution: float
    num_devices: int = 1
    _digests: dict[Any, str] = field(default_factory=dict)
    _skeletons: dict[Any, MetaModel] = field(default_factory=dict)
    _costs: dict[Any, ModelCost] = field(default_factory=dict)

    def plan(self, request: TrainRequest) -> MemoryPlan:
        """Return the memory estimate of a request on the machine."""
        facts = facts_of(request, self.family, self.index, self.resolution, self.encoder, self.codec, self.captions)
        cost, whole = self._cost(request, facts.largest), None
        if request.training.routed_share and request.training.rollout_probability:
            whole = self._cost(request, replace(facts.largest, is_drawn=True))
        sampled, other = self._sampling_cost(request, facts), None
        if request.sampling_model:
            other = self._sampling_cost(request.for_drawing, facts)
        return estimate_run(request, facts, cost, sampled, self.machine, whole, other, self.num_devices)

    def _sampling_cost(self, request: TrainRequest, facts: RunFacts) -> ModelCost | None:
        if request.validation is None:
            return None
        width, height = max(request.validation.sizes(), key=math.prod)
        return self._cost(request, Shape(width, height, 1, facts.largest.text_tokens, is_drawn=True))

    def _cost(self, request: TrainRequest, shape: Shape) -> ModelCost:
        key = cost_settings(request) + ("" if self.machine.device_bytes else " cpu")
        shape = replace(
            shape, is_drawn=shape.is_drawn and request.training.routed_share > 0
        )  # without routing both cost the same
        place = (_files_of(request.model), key, shape)
        if place not in self._costs:
            self._costs[place] = self._cached_cost(request, shape, key)
        return self._costs[place]

    def _layers(self, request: TrainRequest) -> str:
        """Return the digest of the model's shapes. Counts do not depend on values, so finetunes share them."""
        files = _files_of(request.model)
        if files not in self._digests:
            self._digests[files] = layers_of(self.family, request.model)
        return self._digests[files]

    def _cached_cost(self, request: TrainRequest, shape: Shape, key: str) -> ModelCost:
        """Return the cost from the cache, or count it now."""

        def optimizer_cost(count: Callable[[], OptimizerCost]) -> OptimizerCost:
            training, on_device = request.training, bool(self.machine.device_bytes)
            layers = f"{training.rank}, {training.targets!r}, {training.init!r}"
            trained = f"({layers}, {key_text(request.adapter)}, {key_text(request.optimizer)}, {on_device})"
            cache_key = (self._layers(request), trained)
            if request.adapter.is_full:  # an adapter's parameters are fp32 in a model of any precision
                cache_key += (request.model.dtype,)
            return self.counts.get_or_count(cache_key, lambda value: OptimizerCost(**value), count, asdict)

        def count() -> ModelCost:
            place = (_files_of(request.model), key)
            if place not in self._skeletons:
                device = "cuda" if self.machine.device_bytes else "cpu"
                self._skeletons[place] = MetaModel(self.family, request, device, optimizer_cost)
            return self._skeletons[place].cost(shape)

        cache_key = (self._layers(request), request.model.dtype, key, key_text(shape))
        return self.counts.get_or_count(cache_key, ModelCost.from_json, count, ModelCost.as_json)


def _files_of(model: ModelConfig) -> tuple[str, ...]:
    """Return what tells the two models of a run apart, besides their quantization."""
    return model.flavour, model.repo, model.transformer_file, model.dtype


def layers_of(family: Family, model: ModelConfig) -> str:
    """Return the digest of the names and shapes of the transformer's parameters. No weight file is read."""
    empty = family.shared_transformer(model)
    noted = [(name, getattr(part, "packed", None)) for name, part in empty.named_modules()]
    packed = [(name, weight.type) for name, weight in noted if weight is not None]
    return sha256_text(model.family, shapes_of(empty), *((repr(packed),) if packed else ()))


def blocks_of(file: str) -> tuple[str, ...]:
    """Return what a GGUF or quantized file stores each tensor in, as a text; () for other files."""
    if not is_packed(file):
        return ()
    try:
        return (repr(sorted((name, entry.get("dtype")) for name, entry in model_header_of(Path(file))[0].items())),)
    except (OSError, ValueError):  # reported where the file is read
        return ("unreadable",)


def cached_encoder_cost(request: TrainRequest, family: Family, counts: CostCache) -> EncoderCost:
    """Return the cost of the text encoder, counted once for all encoders of this config.

    A second start needs neither the encoder's modules nor transformers.
    """
    model, config = request.model, family.text_encoder_config(request.model)
    key = (model.family, _sorted_json(config), version("transformers"), model.dtype, key_text(model.quantization))
    key += blocks_of(model.text_encoder_file)
    return counts.get_or_count(key, lambda value: EncoderCost(**value), lambda: encoder_cost(request, family), asdict)


def cached_codec_cost(request: TrainRequest, family: Family, counts: CostCache) -> CodecCost:
    """Return the cost of the VAE, counted once for all VAEs of this config."""
    key = ("codec", _sorted_json(family.codec_config(request.model)), version("diffusers"))
    return counts.get_or_count(key, lambda value: CodecCost(**value), lambda: codec_cost(request, family), asdict)


def _sorted_json(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def shapes_of(module: nn.Module) -> str:
    """Return the names and shapes of all parameters, one a line."""
    return "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in module.named_parameters())


def cost_settings(request: TrainRequest) -> str:
    """Return all settings that a count depends on, besides the model and the shape, as text."""
    training = request.training
    is_math = request.memory.attention == "math"  # the only kernel that stores a tokens x tokens matrix
    base = request.model.quantization
    chosen = (base.level, base.products, training.rank, training.targets, training.init, is_math)
    if training.routed_share:
        chosen += (training.routed_share, training.route_first, training.route_last)
    if training.is_sharded:
        chosen += ("shared out",)
    return f"({chosen}, {key_text(request.adapter)}, {key_text(request.optimizer)})"


def make_estimator(
    request: TrainRequest, family: Family, index: Index, machine: Machine, cache: Path, num_devices: int = 1
) -> MemoryEstimator:
    """Return the estimator of a request. It reads headers of the model's files, and loads no weights.

    Args:
        cache: the host's cache folder, for counts.
        num_devices: see MemoryEstimator.
    """
    counts = CostCache(cache / "plan")
    both = dict.fromkeys((request.model, request.drawn_model))  # each with its own text encoder and VAE
    requests = [replace(request, model=model) for model in both]
    return MemoryEstimator(
        family, index, machine, counts,
        max((cached_encoder_cost(each, family, counts) for each in requests), key=lambda cost: cost.weights + cost.work),
        max((cached_codec_cost(each, family, counts) for each in requests), key=lambda cost: cost.weights),
        caption_facts(index.samples), request.dataset.parts[0].resolution, num_devices,
    )  # fmt: skip
