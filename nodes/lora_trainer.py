"""LoRATrainer: trains a LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..trainer_core.config.adapter import AdapterConfig
from ..trainer_core.config.dataset import DatasetConfig
from ..trainer_core.config.memory import MemoryConfig
from ..trainer_core.config.model import ModelConfig
from ..trainer_core.config.optimizer import OptimizerConfig
from ..trainer_core.config.request import TrainedLora, TrainRequest
from ..trainer_core.config.training import TrainingConfig
from ..trainer_core.config.validation import ValidationConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import Host, Notice, Paths
from ..trainer_core.launch.run_queue import unfinished
from ..trainer_core.spec import ABSENT, Doc, NodeSpec, Output, Socket
from ..trainer_core.storage.lora_name import resolve_name
from ..trainer_core.sweep.sweep_config import Sweep

if TYPE_CHECKING:
    from ..trainer_core.train.run import Judge, TrainResult


@dataclass(frozen=True, kw_only=True)
class Inputs(TrainingConfig):
    model: Annotated[
        ModelConfig, Socket("TRAIN_MODEL"), Doc("The base model, from LoadChroma, LoadFlux or QuantizeModel.")
    ]
    dataset: Annotated[DatasetConfig, Socket("TRAIN_DATASET"), Doc("The dataset, from DatasetBackend.")]
    validation: Annotated[
        ValidationConfig | None,
        Socket("VALIDATION"),
        Doc(
            "Settings from ValidateSampler: validation images are sampled during training, and shown next to those "
            "of the base model."
        ),
    ] = None
    adapter: Annotated[
        AdapterConfig | None,
        Socket("TRAIN_ADAPTER"),
        Doc("Settings from AdapterSettings: adapter types other than LoRA, initialization and file format."),
    ] = None
    optimizer: Annotated[
        OptimizerConfig | None,
        Socket("TRAIN_OPTIMIZER"),
        Doc("Settings from OptimizerSettings: optimizers other than AdamW."),
    ] = None
    memory: Annotated[
        MemoryConfig | None,
        Socket("TRAIN_MEMORY"),
        Doc(
            "Settings from MemorySettings: memory and speed. Not connected: use the fastest settings that fit into "
            "memory (mode auto)."
        ),
    ] = None
    sweep: Annotated[
        Sweep | None,
        Socket("TRAIN_SWEEP"),
        Doc(
            "Settings from SweepSettings: every combination of some values is trained, one run after another, and all are "
            "compared. The outputs are those of the best run."
        ),
    ] = None


def request_of(inputs: Inputs) -> TrainRequest:
    """Return the training request of the inputs, with defaults for sockets that are not connected.

    A date in the name is that of this moment.
    """
    training = TrainingConfig(**{field.name: getattr(inputs, field.name) for field in fields(TrainingConfig)})
    training = replace(training, name=resolve_name(training.name, datetime.now()))
    return TrainRequest(
        model=inputs.model,
        dataset=inputs.dataset,
        training=training,
        validation=inputs.validation,
        adapter=inputs.adapter or AdapterConfig(),
        optimizer=inputs.optimizer or OptimizerConfig(),
        memory=inputs.memory or MemoryConfig(mode="auto"),
    )


def trains_model(source: Any) -> bool:
    """Return whether the inputs of a node are those of a training of the whole model (kind full)."""
    adapter = getattr(source, "adapter", None)
    return isinstance(adapter, AdapterConfig) and adapter.is_full


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return the problems that can be found before a model is loaded."""
    from ..trainer_core.setup.preflight import problems_of
    from ..trainer_core.setup.tokenizer_files import tokenizer_problems

    request = request_of(inputs)
    return [*problems_of(request, host), *tokenizer_problems(request.model), *_sweep_problems(inputs)]


def _sweep_problems(inputs: Inputs) -> list[Problem]:
    """Return what the runs of a sweep lack to be compared."""
    from ..trainer_core.sweep.combinations import requirements

    if inputs.sweep is None:
        return []
    problems = requirements(inputs, inputs.sweep.settings.stop_losers)
    if inputs.background and inputs.sweep.settings.stop_losers:
        text = "is on, but stop_losers of SweepSettings compares runs of this process; switch one of them off"
        problems.append(Problem("background", text))
    if inputs.adapter and inputs.adapter.is_full:
        problems.append(Problem("sweep", "is connected, but kind full can't be swept; use another kind"))
    return problems


def review(inputs: Inputs, host: Host) -> list[str]:
    """Return warnings about the optimizer, the model, the dataset's files and captions, which are all read."""
    from ..trainer_core.setup.caption_check import describe_dataset
    from ..trainer_core.setup.hints import describe_prodigy

    request = request_of(inputs)
    hints = describe_prodigy(request.training, request.optimizer)
    return [*hints, *filter(None, [request.model.training_hint]), *describe_dataset(request)]


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a text that changes when a run in the background ended early, so that ComfyUI runs the node again."""
    name = resolve_name(str(values.get("name") or ""), datetime.now())
    return f"{unfinished[name]}" if values.get("background") else ""


def train_with(inputs: Inputs, host: Host, judge: Judge | None = None) -> TrainResult:
    """Train.

    Args:
        judge: may end the run at a checkpoint, see train/run.py.
    """
    from ..trainer_core.train.run import run as train

    request, prompt = recorded(inputs, host)
    return train(request, host, prompt, judge)


def recorded(inputs: Inputs, host: Host) -> tuple[TrainRequest, dict[str, Any]]:
    """Return the request and the workflow that is recorded with it."""
    from .recorded_prompt import record_prompt

    request, prompt = request_of(inputs), record_prompt(host)
    if host.node_id in prompt:  # a resumed run keeps its date
        prompt[host.node_id]["inputs"]["name"] = request.training.name
    return request, prompt


def run(inputs: Inputs, host: Host) -> tuple[Any, ...]:
    """Train, and return the LoRA, its weights, the finite losses and its name; nothing yet from the background."""
    from ..trainer_core.lora_tools.reader import load_tensors

    if inputs.sweep:
        return inputs.sweep.train(inputs, host) or (ABSENT,) * len(SPEC.outputs)
    if inputs.background and host.background:
        if inputs.adapter and inputs.adapter.extract_rank:
            text = "can't extract a LoRA after a run in the background; set extract_rank to 0 or background off"
            raise UserError.at("background", text)
        host.background(*recorded(inputs, host))
        return (ABSENT,) * len(SPEC.outputs)
    if inputs.background:
        host.emit(Notice("background is for ComfyUI and is ignored: this command trains, and you can leave it running"))
    result = train_with(inputs, host)
    is_here = Path(result.lora.path).is_file()  # not on other machines than the first of several
    if result.lora.is_model:
        weights = _extract(inputs, result.lora, host)
    else:
        weights = load_tensors(Path(result.lora.path)) if is_here else {}
    return (
        result.lora,
        weights,
        {"loss": [loss for loss in result.losses if math.isfinite(loss)]},
        result.lora.name,
    )


def _extract(inputs: Inputs, trained: TrainedLora, host: Host) -> Any:
    """Return the weights of a LoRA of the difference between a trained model and its base, and save it.

    Without extract_rank there is none: a whole model is no LoRA.
    """
    from .lora_tools import extract_lora

    rank = inputs.adapter.extract_rank if inputs.adapter else 0
    if not rank:
        text = (
            f"{trained.name} is a whole model, in output/diffusion_models, so the output lora_model is empty; set "
            "extract_rank in AdapterSettings to get a LoRA of the difference too"
        )
        host.emit(Notice(text))
        return {}
    tuned = replace(inputs.model, transformer_file=trained.path)
    name = trained.name.removesuffix(".safetensors")
    return extract_lora.run(extract_lora.Inputs(base=inputs.model, tuned=tuned, rank=rank, save_as=name), host)[0]


SPEC = NodeSpec(
    id="LoRATrainer",
    title="LoRA Trainer",
    category="ChromaTrainer",
    description="Trains a LoRA and saves it to output/loras. ComfyUI's LoRA loaders list it immediately.",
    inputs=Inputs,
    outputs=(
        Output("lora", "TRAINED_LORA", "The trained LoRA (kind full: the trained model), for ValidateSampler."),
        Output(
            "lora_model",
            "LORA_MODEL",
            "The weights of the LoRA, for ComfyUI's Load LoRA Model node. Kind full: the LoRA of extract_rank, or "
            "empty without one.",
        ),
        Output("loss_map", "LOSS_MAP", "The loss of every step, for ComfyUI's Plot Loss Graph node."),
        Output(
            "lora_name",
            "STRING",
            "Name of the saved file, as listed by the LoRA loaders (kind full: by Load Diffusion Model).",
        ),
    ),
    run=run,
    preflight=preflight,
    fingerprint=fingerprint,
    review=review,
    identity=lambda inputs: ("name", resolve_name(inputs.name, datetime.now())),
    is_output=True,
    search_aliases=("train", "lora", "finetune", "fine-tune"),
)
