"""Plans of one request and its variants: what is counted once is kept, in memory and in the cache."""

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
from ..models.codec import vae_config
from ..models.family import Family
from ..storage.atomic import sha256_text
from .cost_cache import CostCache
from .cost_model import ModelCost, OptimizerCost, Shape
from .memory_plan import Machine, MemoryPlan
from .meta_model import MetaModel
from .phase_estimate import forecast
from .workload import CaptionFacts, CodecCost, EncoderCost, RunFacts, caption_facts, codec_cost, encoder_cost, facts_of


@dataclass
class MemoryEstimator:
    """Args:
    counts: of earlier runs. resolution: that the index's pictures were placed at.
    """

    family: Family
    index: Index
    machine: Machine
    counts: CostCache
    encoder: EncoderCost
    codec: CodecCost
    captions: CaptionFacts
    resolution: float
    _digest: str = ""
    _skeletons: dict[Any, MetaModel] = field(default_factory=dict)
    _costs: dict[Any, ModelCost] = field(default_factory=dict)

    def plan(self, request: TrainRequest) -> MemoryPlan:
        """The forecast on this machine."""
        facts = facts_of(request, self.family, self.index, self.resolution, self.encoder, self.codec, self.captions)
        cost, whole = self._cost(request, facts.largest), None
        if request.training.routed_share and request.training.rollout_probability:
            whole = self._cost(request, replace(facts.largest, is_drawn=True))
        return forecast(request, facts, cost, self._drawn(request, facts), self.machine, whole)

    def _drawn(self, request: TrainRequest, facts: RunFacts) -> ModelCost | None:
        if request.validation is None:
            return None
        width, height = max(request.validation.sizes(), key=math.prod)
        return self._cost(request, Shape(width, height, 1, facts.largest.text_tokens, is_drawn=True))

    def _cost(self, request: TrainRequest, shape: Shape) -> ModelCost:
        key = cost_settings(request) + ("" if self.machine.device_bytes else " cpu")
        shape = replace(shape, is_drawn=shape.is_drawn and request.training.routed_share > 0)  # else it is all the same
        if (key, shape) not in self._costs:
            self._costs[key, shape] = self._cached_cost(request, shape, key)
        return self._costs[key, shape]

    def _layers(self, request: TrainRequest) -> str:
        """What is counted does not depend on numbers, so that finetunes of one model share it."""
        if not self._digest:
            self._digest = layers_of(self.family, request.model)
        return self._digest

    def _cached_cost(self, request: TrainRequest, shape: Shape, key: str) -> ModelCost:
        """From an earlier run's count, or counted now."""

        def upkeep(count: Callable[[], OptimizerCost]) -> OptimizerCost:
            training, where = request.training, bool(self.machine.device_bytes)
            what_learns = repr(
                (training.rank, training.targets, training.init, request.adapter, request.optimizer, where)
            )
            return self.counts.kept(
                (self._layers(request), what_learns), lambda found: OptimizerCost(**found), count, asdict
            )

        def count() -> ModelCost:
            if key not in self._skeletons:
                device = "cuda" if self.machine.device_bytes else "cpu"
                self._skeletons[key] = MetaModel(self.family, request, device, upkeep)
            return self._skeletons[key].cost(shape)

        of = (self._layers(request), request.model.dtype, key, repr(shape))
        return self.counts.kept(of, ModelCost.from_json, count, ModelCost.as_json)


def layers_of(family: Family, model: ModelConfig) -> str:
    """Digest of the transformer's parameters' names and shapes; no weight file is asked for."""
    return sha256_text(model.family, shapes_of(family.empty_transformer(model)))


def cached_encoder_cost(request: TrainRequest, family: Family, counts: CostCache) -> EncoderCost:
    """encoder_cost, counted once for encoders of these shapes: a second start does without their library."""
    model, config = request.model, family.text_encoder_config(request.model)
    of = (model.family, _words(config), version("transformers"), model.dtype, repr(model.quantization))
    return counts.kept(of, lambda kept: EncoderCost(**kept), lambda: encoder_cost(request, family), asdict)


def cached_codec_cost(request: TrainRequest, counts: CostCache) -> CodecCost:
    """codec_cost, counted once for VAEs of these shapes."""
    of = ("codec", _words(vae_config(request.model)), version("diffusers"))
    return counts.kept(of, lambda kept: CodecCost(**kept), lambda: codec_cost(request), asdict)


def _words(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def shapes_of(module: nn.Module) -> str:
    """Names and shapes of all parameters."""
    return "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in module.named_parameters())


def cost_settings(request: TrainRequest) -> str:
    """What decides a count, beside the model and the shape."""
    training = request.training
    is_math = request.memory.attention == "math"  # keeps tokens x tokens numbers, which no other kernel does
    base = request.model.quantization
    chosen = (base.level, base.products, training.rank, training.targets, training.init, is_math)
    if training.routed_share:
        chosen += (training.routed_share, training.route_first, training.route_last)
    return repr((chosen, request.adapter, request.optimizer))


def forecaster(request: TrainRequest, family: Family, index: Index, machine: Machine, cache: Path) -> MemoryEstimator:
    """Reads headers of the model's files; loads no weights. cache: the host's; counts are kept there."""
    counts = CostCache(cache / "plan")
    return MemoryEstimator(
        family, index, machine, counts, cached_encoder_cost(request, family, counts), cached_codec_cost(request, counts),
        caption_facts(index.samples), request.dataset.parts[0].resolution,
    )  # fmt: skip
