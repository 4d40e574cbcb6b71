"""From a request, its images and a machine to a MemoryPlan; what fits where it does not; and what a run says about it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..data.index import Index
from ..devices import free_bytes, peak_ram_bytes, peak_vram_bytes, product_flops
from ..families.contract import Family
from ..families.sources import find_part
from ..families.weights import DTYPES, T5, VAE, Weights
from ..files import sha256_text, write_json
from ..host import Host, Notice
from ..problems import UserError
from ..registry import load
from ..version import VERSION
from .build import Plan, plan_run
from .costs import BlockCost, ModelCost, Shape, Skeleton
from .counting import bytes_of
from .phases import Phases
from .plan import GB, Machine, MemoryPlan, RunFacts, forecast, gb, with_memory

CHARACTERS_A_TOKEN = 3  # of T5, on captions; English has four or more, so that this is on the safe side
MAX_TOKENS = 512
INTERVALS = (64, 8, 4, 3, 2, 1)  # of checkpointing, from the fastest
LEVELS = ("int8-quanto", "int4-quanto")
EDGES = (768, 512)
SHARE = 0.95  # of the free memory that auto fills
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Forecaster:
    """Plans of variants of one request; what was counted is kept."""

    family: Family
    index: Index
    machine: Machine
    folder: Path  # of earlier counts
    encoder: tuple[int, int, int, int]
    codec: tuple[int, float]
    learned: float  # bytes of what learns and of its optimiser's states, for each byte of fp32 weights
    resolution: float  # that the index's pictures were placed at
    _skeletons: dict[Any, Skeleton] = field(default_factory=dict)
    _costs: dict[Any, ModelCost] = field(default_factory=dict)

    def plan(self, request: TrainRequest) -> MemoryPlan:
        facts = facts_of(request, self)
        return forecast(request, facts, self._cost(request, facts.largest), self._drawn(request, facts), self.machine)

    def _drawn(self, request: TrainRequest, facts: RunFacts) -> ModelCost | None:
        if request.validation is None:
            return None
        width, height = max(request.validation.sizes(), key=math.prod)
        return self._cost(request, Shape(width, height, 1, facts.largest.text_tokens))

    def _cost(self, request: TrainRequest, shape: Shape) -> ModelCost:
        key = _base_key(request), request.training.rank, request.training.targets, repr(request.adapter)
        if (key, shape) not in self._costs:
            self._costs[key, shape] = self._kept(request, shape, key)
        return self._costs[key, shape]

    def _kept(self, request: TrainRequest, shape: Shape, key: Any) -> ModelCost:
        """From an earlier run's count, or counted now: nothing of it changes but with the versions in its name."""
        identity = self.family.identity(request.model, "transformer")
        name = sha256_text(VERSION, torch.__version__, identity, request.model.dtype, repr(key), repr(shape))[:24]
        path = self.folder / f"{name}.json"
        try:
            value = json.loads(path.read_text("utf-8"))
            kinds = [BlockCost(**kind) for kind in value["kinds"]]
            return ModelCost(**value["model"], blocks=tuple(kinds[i] for i in value["blocks"]))
        except (OSError, ValueError, TypeError, KeyError):  # not there, or of another version
            pass
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton(self.family, request)
        cost = self._skeletons[key].cost(shape)
        kinds = list(dict.fromkeys(cost.blocks))
        model = {name: value for name, value in vars(cost).items() if name != "blocks"}
        write_json(
            path,
            {"model": model, "kinds": [vars(kind) for kind in kinds], "blocks": [kinds.index(b) for b in cost.blocks]},
        )
        return cost


def forecaster(request: TrainRequest, family: Family, index: Index, machine: Machine, cache: Path) -> Forecaster:
    """Reads headers of the text encoder's files; loads no weights. cache: the host's; counts are kept there."""
    return Forecaster(
        family,
        index,
        machine,
        cache / "plan",
        encoder_numbers(request, family),
        codec_numbers(request),
        learned_ratio(request),
        request.dataset.parts[0].resolution,
    )


def encoder_numbers(request: TrainRequest, family: Family) -> tuple[int, int, int, int]:
    """The text encoders' parameters, those of T5's largest block, those of its largest block, its width and bytes of work for the longest prompt."""
    weights = Weights(find_part(request.model, "text_encoder").files, T5)
    sizes = {key: math.prod(weights.shape(key)) for key in weights.keys if not key.startswith(("decoder.", "lm_head."))}
    tables = [size for key, size in sizes.items() if key in ("shared.weight", "encoder.embed_tokens.weight")]
    total = sum(sizes.values()) - sum(tables[1:])
    block = sum(size for key, size in sizes.items() if key.startswith("encoder.block.0."))
    width = weights.shape("encoder.final_layer_norm.weight")[0]
    heads = weights.shape("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")[1]
    wide = weights.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0]
    work = 4 * (MAX_TOKENS * (6 * width + 3 * wide) + 3 * heads * MAX_TOKENS * MAX_TOKENS)
    return total + family.numbers_beside_t5(request.model), block, width, work


def codec_numbers(request: TrainRequest) -> tuple[int, float]:
    """The VAE's parameters, and its width at full size as a share of the released one's."""
    weights = Weights(find_part(request.model, "vae").files, VAE)
    return sum(math.prod(weights.shape(key)) for key in weights.keys), weights.shape("decoder.conv_out.weight")[1] / 128


def learned_ratio(request: TrainRequest) -> float:
    """Found by one step of the optimiser on two small matrices. Where it can't run on a CPU: 8-bit states."""
    part = load("optimizer", request.optimizer.optimizer)
    if part.missing("cpu"):
        return 1.5
    pair = [torch.nn.Parameter(torch.ones(16, 256)), torch.nn.Parameter(torch.ones(256, 16))]
    whole = bytes_of(*pair)
    optimizer = part.build(pair, request.optimizer, 1e-4, 0.0, 0)
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    return bytes_of(*pair, *states) / whole


def facts_of(request: TrainRequest, made: Forecaster) -> RunFacts:
    """What the dataset and the settings say; a lower resolution makes the placed pictures smaller in proportion."""
    family, samples = made.family, made.index.samples
    ratio = request.dataset.parts[0].resolution / made.resolution
    width, height = max((sample.placement.bucket for sample in samples), key=math.prod)
    step = family.pixel_step
    size = [max(step, round(edge * ratio / step) * step) for edge in (width, height)]
    captions = {caption for sample in samples for caption in sample.captions}
    tokens = min(MAX_TOKENS, max(len(caption) for caption in captions) // CHARACTERS_A_TOKEN + 2)
    total, block, text_width, work = made.encoder
    passes = sum(request.dataset.parts[sample.part].repeats for sample in samples) / request.training.batch_size
    steps = request.training.steps or math.ceil(request.training.epochs * passes / request.training.accumulation)
    drawn = max(map(math.prod, request.validation.sizes())) if request.validation else 0
    return RunFacts(
        largest=Shape(size[0], size[1], request.training.batch_size, family.text_rows(request.model, tokens)),
        num_images=len(samples), latent_pixels=int(sum(math.prod(s.placement.bucket) for s in samples) * ratio * ratio),
        prompts=len(captions) + 1, text_width=text_width, encoder_numbers=total, encoder_block_numbers=block,
        encoder_work=work, element_bytes=DTYPES[request.model.dtype].itemsize, validation_pixels=drawn, num_steps=steps,
        learned=made.learned, codec_numbers=made.codec[0], codec_width=made.codec[1],
    )  # fmt: skip


def this_machine(device: torch.device, dtype: str) -> Machine:
    """The device and what is free there now; its speed by one product of matrices."""
    flops = product_flops(device, DTYPES[dtype])
    free, ram = free_bytes(device), free_bytes(torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Machine(name, 0 if device.type == "cpu" else free, ram, flops)


def named_machine(here: Machine, vram_gb: float, ram_gb: float) -> Machine:
    """This machine with other amounts of memory; 0 leaves what is free here. Of another device the speed is not known."""
    if vram_gb:
        here = Machine(f"{vram_gb:g} GB", int(vram_gb * GB), here.ram_bytes)
    return replace(here, ram_bytes=int(ram_gb * GB)) if ram_gb else here


def changes(request: TrainRequest) -> Iterator[tuple[str, TrainRequest]]:
    """Other ways to run it, the least painful first: what costs nothing but a little time, then rounding, then the data."""
    training, memory = request.training, request.memory
    least = request
    if not training.gradient_checkpointing or memory.checkpointing_interval > 1:
        for interval in INTERVALS:
            if not training.gradient_checkpointing or interval < memory.checkpointing_interval:
                least = with_memory(
                    replace(request, training=replace(training, gradient_checkpointing=True)),
                    checkpointing_interval=interval,
                )
                yield f"gradient_checkpointing with interval {interval}", least
    if not memory.activation_offload:
        yield "activation_offload", with_memory(least, activation_offload=True)
    if request.model.quantization.products != "exact":
        yield "products exact", with_level(least, request.model.quantization.level, "exact")
    levels = (
        LEVELS[LEVELS.index(request.model.quantization.level) + 1 :]
        if request.model.quantization.level in LEVELS
        else LEVELS
    )
    if request.model.quantization.level in ("none", *LEVELS):
        for level in levels:
            yield f"quantisation {level}", with_level(least, level)
    if memory.group_offload == "none":
        moved = with_memory(least, model_offload=False, activation_offload=True)
        for kind in ("block", "leaf"):
            yield f"group_offload {kind} and activation_offload", with_memory(moved, group_offload=kind)
            for level in levels:
                yield (
                    f"group_offload {kind}, activation_offload and quantisation {level}",
                    with_level(with_memory(moved, group_offload=kind), level),
                )
        least = with_memory(with_level(moved, levels[-1]) if levels else moved, group_offload="leaf")
    if training.batch_size > 1:
        least = replace(
            least,
            training=replace(least.training, batch_size=1, accumulation=training.batch_size * training.accumulation),
        )
        yield "all that and batch_size 1 (with accumulation for the same step)", least
    if request.dataset.parts[0].resolution_type != "area":
        for edge in EDGES:
            if edge < request.dataset.parts[0].resolution:
                parts = tuple(replace(part, resolution=edge) for part in request.dataset.parts)
                least = replace(least, dataset=replace(least.dataset, parts=parts))
                yield f"all that and resolution {edge}", least


def with_level(request: TrainRequest, level: str, products: str = "") -> TrainRequest:
    """Products are those that were asked for, and exact where the new level has them not."""
    asked = request.model.quantization
    changed = replace(asked, level=level, products=products or asked.products)
    if changed.problems():
        changed = replace(changed, products="exact")
    return replace(request, model=replace(request.model, quantization=changed))


def _base_key(request: TrainRequest) -> str:
    """What of the base decides a step's cost."""
    asked = request.model.quantization
    return asked.level if asked.products == "exact" else f"{asked.level} {asked.products}"


def easy_changes(request: TrainRequest, plan: MemoryPlan) -> tuple[list[str], TrainRequest]:
    """For phases beside the training: what makes each smaller, at next to no cost."""
    words = []
    unfit = {phase.name for phase in plan.unfit()}
    if "text" in unfit and request.memory.text_encoder == "device":
        words.append("text_encoder blocks")
        request = with_memory(request, text_encoder="blocks")
    if ("latents" in unfit or "validate" in unfit) and not request.memory.vae_tiling:
        words.append("vae_tiling")
        request = with_memory(request, vae_tiling=True)
    return words, request


def remedy(made: Forecaster, request: TrainRequest, plan: MemoryPlan) -> tuple[str, TrainRequest, MemoryPlan] | None:
    """The cheapest change that fits, in words; None where the plan fits or nothing would."""
    if not plan.unfit():
        return None
    easy, request = easy_changes(request, plan)
    if easy:
        plan = made.plan(request)
        if not plan.unfit():
            return " and ".join(easy), request, plan
    if {phase.name for phase in plan.unfit()} == {"validate"} and request.memory.group_offload == "none":
        alone = with_memory(request, model_offload=True)
        if not made.plan(alone).unfit():
            return ", ".join([*easy, "model_offload"]), alone, made.plan(alone)
    for words, changed in changes(request):
        plan = made.plan(changed)
        if not plan.unfit():
            return ", ".join([*easy, words]), changed, plan
    return None


def plan_request(
    request: TrainRequest, host: Host, machine: Machine | None = None
) -> tuple[MemoryPlan, str, TrainRequest]:
    """The forecast of a request, what would make it fit ('' where it does), and the request as it would be run.

    Args:
        machine: another than this one.
    Raises:
        UserError: every problem of the request.
    """
    checked = plan_run(request, host)
    made = forecaster(
        request,
        checked.family,
        checked.index,
        machine or this_machine(checked.device, request.model.dtype),
        host.paths.cache,
    )
    if request.memory.mode == "auto":
        request = replace(request, memory=chosen(made, request))
    plan = made.plan(request)
    return plan, advice(remedy(made, request, plan)) if plan.unfit() else "", request


def advice(found: tuple[str, TrainRequest, MemoryPlan] | None) -> str:
    if found is None:
        return "no change of memory, quantisation, batch or resolution makes it fit"
    words, _, plan = found
    room = f"{gb(plan.device_peak)} of tensors" if plan.machine.device_bytes else gb(plan.ram_peak)
    return f"the cheapest change that fits: {words} ({room})"


def chosen(made: Forecaster, request: TrainRequest) -> MemoryConfig:
    """mode auto: the fastest settings that fit; the smallest where none does. What the VAE does is left as it is, for it shows."""
    manual = with_memory(request, mode="manual")
    tight = replace(
        made,
        machine=replace(
            made.machine,
            device_bytes=int(made.machine.device_bytes * SHARE),
            ram_bytes=int(made.machine.ram_bytes * SHARE),
        ),
    )
    stream = bool(made.machine.device_bytes) and torch.cuda.is_available()
    ways: list[dict[str, Any]] = [{}]
    if request.training.gradient_checkpointing:
        ways = [{"checkpointing_interval": interval} for interval in INTERVALS]
    if made.machine.device_bytes:  # on a CPU there is nowhere to go
        last = ways[-1] | {"activation_offload": True}
        offloads = [
            {"group_offload": "block", "offload_stream": stream},
            {"group_offload": "leaf", "offload_stream": stream},
        ]
        ways += [last, *(last | offload for offload in offloads)]
    found = with_memory(manual, **ways[-1])
    for way in ways:
        plan = tight.plan(with_memory(manual, **way))
        if not {phase.name for phase in plan.unfit()} & {"load", "train"}:
            found = with_memory(manual, **way)
            break
    for name, values in (
        ("text", {"text_encoder": "blocks"}),
        ("validate", {"model_offload": found.memory.group_offload == "none"}),
    ):
        if name in {phase.name for phase in tight.plan(found).unfit()}:
            found = with_memory(found, **values)
    return found.memory


def settled(plan: Plan, host: Host) -> tuple[Plan, MemoryPlan | None]:
    """The plan with its memory settings chosen, where mode is auto, and its forecast, whose first line is told.

    None where something can't be counted, such as a package's own kernel: a run does not fail for want of a forecast.
    """
    try:
        return _settled(plan, host)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        left = ", so that mode auto takes the settings as they are" if plan.request.memory.mode == "auto" else ""
        host.emit(Notice(f"no forecast of memory{left}: {type(error).__name__} {reason}", "warning"))
        return plan, None


def _settled(plan: Plan, host: Host) -> tuple[Plan, MemoryPlan]:
    made = forecaster(
        plan.request, plan.family, plan.index, this_machine(plan.device, plan.request.model.dtype), host.paths.cache
    )
    if plan.request.memory.mode == "auto":
        plan = replace(plan, memory=chosen(made, plan.request))
    request = replace(plan.request, memory=plan.memory or plan.request.memory)
    found = made.plan(request)
    host.emit(Notice(found.first_line()))
    if plan.memory:
        host.emit(Notice(f"memory auto: {found.settings}"))
    if found.unfit():
        host.emit(Notice(f"the plan does not fit; {advice(remedy(made, request, found))}", "warning"))
    return plan, replace(found, advice=lambda: advice(remedy(made, request, _smaller(found))))


def _smaller(plan: MemoryPlan) -> MemoryPlan:
    """As if no phase fitted: memory ran out although the plan said it would not."""
    room = plan.machine
    return replace(
        plan,
        machine=replace(
            room,
            device_bytes=min(room.device_bytes, plan.device_peak),
            ram_bytes=min(room.ram_bytes, plan.ram_peak - 1),
        ),
    )


@contextmanager
def memory_told(plan: MemoryPlan | None, phases: Phases, device: torch.device) -> Iterator[None]:
    """Out of memory becomes a UserError that names the phase, what was planned and measured, and what would fit."""
    try:
        yield
    except (*OUT_OF_MEMORY, RuntimeError) as error:
        if not isinstance(error, OUT_OF_MEMORY) and "can't allocate memory" not in str(error):
            raise
        name = phases.current
        planned = next((phase for phase in plan.phases if phase.name == name), None) if plan else None
        said = (
            f"planned {gb(planned.device)} on the device and {gb(planned.ram)} of RAM" if planned else "not in the plan"
        )
        taken = peak_vram_bytes(device) or peak_ram_bytes()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError.at(
            "memory",
            f"ran out in the phase {name!r} ({said}, measured {gb(taken)} by then): {reason}. {plan.advice() if plan else 'Try less: batch, resolution, an offload of MemorySettings'}. "
            "What was cached and saved so far is kept; another program on the device may hold memory as well",
        ) from error


def memory_report(plan: MemoryPlan | None, device: torch.device) -> dict[str, Any]:
    """Predicted beside measured, for report.json. measured on a device: of tensors; RAM: resident, of the whole process."""
    device_bytes, ram = peak_vram_bytes(device), peak_ram_bytes()
    measured = {"device_peak_bytes": device_bytes, "ram_peak_bytes": ram}
    if plan is None:
        return {"predicted": None, "measured": measured}
    return {
        "predicted": plan.as_json(),
        "measured": measured,
        "predicted_over_measured": round(plan.device_peak / device_bytes, 3)
        if device_bytes
        else round(plan.ram_peak / ram, 3),
    }


def comparison(report: dict[str, Any]) -> str:
    """The two peaks in one line."""
    measured, predicted = report["measured"], report["predicted"]
    if predicted is None:
        return f"memory: measured {gb(measured['device_peak_bytes'])} on the device, {gb(measured['ram_peak_bytes'])} of RAM"
    if measured["device_peak_bytes"]:
        return f"memory: predicted {gb(predicted['device_peak_bytes'])} of tensors on the device, measured {gb(measured['device_peak_bytes'])}"
    return f"memory: predicted {gb(predicted['ram_peak_bytes'])} of RAM, measured {gb(measured['ram_peak_bytes'])}"
