"""What a full-rank training (kind full) can't be combined with, each with the reason. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..config.adapter import FULL
from ..config.optimizer import ELEMENTWISE, STEP_BEFORE, THIS_STEP, TOGETHER
from ..config.request import TrainRequest
from ..config.serialize import is_as_before
from ..config.training import IN_BF16, IN_FP32, WHOLE
from ..distributed.device_list import devices_for, num_launched
from ..errors import Problem, UserError
from ..host import Host
from ..registry import names
from ..storage.gguf.header import is_gguf
from ..storage.model_header import model_header_of

USUAL_RATES = 1e-6, 3e-5  # of models of billions of weights; a LoRA's are ten times as high
PLAIN_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})
NO_ADAPTER = "kind full has no adapter"
INSIDE = "kind full steps each layer inside of the backward pass and frees its gradient"
PAGED = frozenset({"bnb-lion8bit-paged"})
# Settings without a meaning for a whole model: why. Each must have its default.
TRAINING = {
    "rank": f"{NO_ADAPTER}, and so no rank (extract_rank of AdapterSettings is the rank of a LoRA that is extracted)",
    "alpha": f"{NO_ADAPTER} that could be scaled",
    "init": f"{NO_ADAPTER}: the training starts from the model's weights",
    "skip_bad_steps": "a step of kind full moves weights before all gradients are known, and can't be undone",
}
ADAPTER = {
    "format": "a whole model is always saved under its original names, for ComfyUI and diffusers",
    "init_lora": f"{NO_ADAPTER} that could continue from a LoRA; merge it into the model, and train from that file",
    "dropout": f"{NO_ADAPTER} whose input could be dropped",
    "precision": "a whole model is always saved in bf16",
    "lokr_factor": f"{NO_ADAPTER}",
    "lokr_decompose_both": f"{NO_ADAPTER}",
    "svd_iterations": f"{NO_ADAPTER} that is initialized by an SVD",
    "eva_batches": f"{NO_ADAPTER} that is initialized from data",
}


def full_rank_problems(request: TrainRequest, host: Host) -> list[Problem]:
    """Return what the run can't do with kind full, and what other kinds can't do that belongs to it."""
    if not request.adapter.is_full:
        return _only_full(request)
    return [
        *_meaningless(request), *_step_problems(request), *_copy_problems(request), *_model_problems(request),
        *_memory_problems(request), *device_problems(request, host), *_shard_problems(request),
    ]  # fmt: skip


def device_problems(request: TrainRequest, host: Host) -> list[Problem]:
    """Return a problem unless each device has one micro-batch in a step, because gradients are used at once.

    Where weights are shared out each device may have several, and all have the same number.
    """
    count = request.training.accumulation
    try:
        size = max(1, len(devices_for(request.training, host.machines.count)))
    except UserError as error:
        return list(error.problems)
    size = num_launched() or size * host.machines.count
    if size == count or (request.training.is_sharded and count % size == 0):
        return []
    if request.training.is_sharded:
        nearest = -(-count // size) * size
        text = (
            f"asks for {size} devices, and accumulation is {count}, but devices that share out the weights (shard) "
            "compute together, each the same number of micro-batches of a step"
        )
        return [Problem("devices", f"{text}; set accumulation to {nearest}, or use {_divisor(count, size)} devices")]
    if size == 1:
        text = (
            f"is {count}, but {INSIDE}, so gradients of several passes can't be added; use 1, and a larger batch_size"
        )
        return [Problem("accumulation", f"{text}, or {count} devices")]
    text = f"asks for {size} devices, and accumulation is {count}, but {INSIDE}, so that each device computes one"
    return [Problem("devices", f"{text} micro-batch of a step; set accumulation to {size}, or use {count} devices")]


def _divisor(count: int, most: int) -> int:
    """Return the largest divisor of a number up to a limit."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def _only_full(request: TrainRequest) -> list[Problem]:
    kind, problems = request.adapter.kind, []
    if request.adapter.extract_rank:
        text = f"is {request.adapter.extract_rank}, but kind {kind} trains a LoRA already; use 0, or kind {FULL}"
        problems.append(Problem("extract_rank", text))
    if request.optimizer.clip_by != THIS_STEP:
        text = f"is {request.optimizer.clip_by!r}, but with kind {kind} the norm of this step is known; use {THIS_STEP}"
        problems.append(Problem("clip_by", text))
    if request.training.is_sharded:
        text = (
            f"is {request.training.shard!r}, but with kind {kind} each device holds the base, which may be quantized or "
            f"offloaded, and the adapter is small; use {WHOLE}, or kind {FULL}"
        )
        problems.append(Problem("shard", text))
    return problems


def _meaningless(request: TrainRequest) -> Iterator[Problem]:
    for settings, reasons in ((request.training, TRAINING), (request.adapter, ADAPTER)):
        for name, reason in reasons.items():
            if not (is_as_before(settings, name) or (name == "alpha" and _is_rank(request))):
                default = next(f.default for f in settings.__dataclass_fields__.values() if f.name == name)
                yield Problem(name, f"is {getattr(settings, name)!r}, but {reason}; use {default!r}, the default")


def _is_rank(request: TrainRequest) -> bool:
    return request.training.alpha in (0, request.training.rank)


def _step_problems(request: TrainRequest) -> Iterator[Problem]:
    """Yield what contradicts steps inside of the backward pass."""
    training, config = request.training, request.optimizer
    if config.clips_by_this_step(training.max_grad_norm) and not training.is_sharded:
        yield Problem(
            "max_grad_norm",
            f"is {training.max_grad_norm:g}, but {INSIDE}, before the norm of all gradients is known; use 0 (adafactor "
            f"and came limit their updates themselves), or set clip_by in OptimizerSettings to {STEP_BEFORE!r}",
        )
    if training.is_sharded and config.optimizer not in ELEMENTWISE:
        text = (
            f"{config.optimizer} {_reads_others(config.optimizer)}, and with shard each device has only some rows of a "
            "weight"
        )
        yield Problem("optimizer", f"{text}; use {', '.join(ELEMENTWISE)}, or shard {WHOLE}")
    elif config.optimizer in TOGETHER:
        others = ", ".join(name for name in names("optimizer") if name not in TOGETHER)
        yield Problem("optimizer", f"{config.optimizer} {TOGETHER[config.optimizer]}, but {INSIDE}; use {others}")
    if config.optimizer == "adamw_bf16" and request.model.dtype != "bf16":
        text = f"{config.optimizer} holds the weights in bf16, and the model's dtype is {request.model.dtype}"
        yield Problem("optimizer", f"{text}; set dtype to bf16, or use adamw")


def _reads_others(optimizer: str) -> str:
    """Return what an optimizer computes from several elements at once."""
    if optimizer.startswith("bnb-"):
        return "stores its states in 8 bits, in blocks of elements with one scale"
    return TOGETHER.get(optimizer, "computes sums over all rows and columns of a weight")


def _shard_problems(request: TrainRequest) -> Iterator[Problem]:
    """Yield what weights that are shared out over the devices can't be combined with."""
    training, memory = request.training, request.memory
    if not training.is_sharded:
        return
    if training.shard == IN_BF16 and request.model.dtype != "bf16":
        yield Problem("shard", f"is {IN_BF16}, and the model's dtype is {request.model.dtype}; use {IN_FP32}")
    if training.shard == IN_FP32 and request.optimizer.optimizer == "adamw_bf16":
        yield Problem(
            "optimizer", f"adamw_bf16 stores weights in bf16, and shard is {IN_FP32}; use adamw, or shard bf16"
        )
    if training.rollout_probability:
        text = (
            "is above 0, but devices that share out the weights (shard) need equal numbers of forward passes, and only "
            f"some batches have rollouts; use 0, or shard {WHOLE}"
        )
        yield Problem("rollout_probability", text)
    gathered = "the weights on the device are gathered and freed again block by block (shard)"
    for name in ("activation_offload", "model_offload", "offload_stream"):
        if getattr(memory, name):
            yield Problem(name, f"is on, but {gathered}; turn it off")
    if memory.group_offload == "leaf":
        yield Problem("group_offload", f"is leaf, but {gathered}; use none, or block for weights and steps in RAM")
    elif memory.offload_share < 1:
        yield Problem(
            "offload_share", f"is {memory.offload_share:g}, but with shard RAM holds all blocks or none; use 1"
        )
    if memory.blocks_per_group > 1:
        yield Problem("blocks_per_group", f"is {memory.blocks_per_group}, but {gathered}; use 1")


def _copy_problems(request: TrainRequest) -> Iterator[Problem]:
    """Yield what needs the base model's weights beside the trained ones."""
    no_copy = "kind full trains the base model itself, of which no copy is in memory"
    if request.training.preservation:
        yield Problem("preservation", f"is {request.training.preservation:g}, but {no_copy}; use 0")
    if any(part.prior_preservation for part in request.dataset.parts):
        yield Problem("prior_preservation", f"is on, but {no_copy}; turn it off, and train these images as they are")
    if request.validation and set(request.validation.strengths()) != {1.0}:
        strengths = request.validation.lora_strength
        yield Problem(
            "lora_strength", f"of ValidateSampler is {strengths}, but {no_copy}, so strength 1 is all there is; use 1.0"
        )


def _model_problems(request: TrainRequest) -> Iterator[Problem]:
    model = request.model
    if model.quantization.level != "none":
        text = "quantized weights can't be trained; use none (kind full), or train a LoRA"
        yield Problem("level", f"is {model.quantization.level}, but {text}")
    if model.dtype == "fp16":
        yield Problem("dtype", "fp16 weights lose the small steps of a training (kind full); use bf16, or fp32")
    if stored := _stored_coarsely(model.transformer_file):
        text = f"is stored in {stored}, whose rounding the trained model would keep (kind full); use a bf16 file"
        yield Problem(Path(model.transformer_file).name, text)


def _stored_coarsely(file: str) -> str:
    """Return the first dtype of less than 16 bits in a single file, "" where there is none or the file can't be read."""
    if is_gguf(file):
        return "GGUF blocks"
    if not file or not Path(file).is_file():
        return ""
    try:
        dtypes: Iterable[str] = {
            entry["dtype"] for name, entry in model_header_of(Path(file))[0].items() if name != "__metadata__"
        }
    except (OSError, ValueError):  # reported where the file is read
        return ""
    return next(iter(sorted(set(dtypes) - PLAIN_DTYPES)), "")


def _memory_problems(request: TrainRequest) -> Iterator[Problem]:
    memory = request.memory
    if memory.group_offload == "none":
        return
    if memory.offload_to_disk:
        text = "is on, but kind full trains the weights, and the file on the disk can only be read; turn it off"
        yield Problem("offload_to_disk", text)
    if request.optimizer.optimizer in PAGED:
        text = (
            "moves its states by itself, which excludes group_offload (kind full); use group_offload none, or adafactor"
        )
        yield Problem("optimizer", f"{request.optimizer.optimizer} {text}")


def full_rank_hints(request: TrainRequest) -> list[str]:
    """Return one line for a learning rate that is usual for a LoRA, and too high for a whole model."""
    rate, (low, high) = request.training.learning_rate, USUAL_RATES
    if not request.adapter.is_full or rate <= high:
        return []
    return [
        f"learning_rate is {rate:g}; with kind full {low:g} to {high:g} is usual for a released model, because all of "
        "its weights move (docs/full-rank.md)"
    ]
