"""Runs of the product whose model, latents and texts are random numbers made on the spot.

No file is read, and the step is the product's own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import Case
from chroma_trainer.trainer_core.adapters.inject import trainable_parameters
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.data.batch_sampler import BatchPlan
from chroma_trainer.trainer_core.data.buckets import Placement
from chroma_trainer.trainer_core.data.sample_table import Sample
from chroma_trainer.trainer_core.devices import DTYPES, empty_cache
from chroma_trainer.trainer_core.flow.sigma_density import density
from chroma_trainer.trainer_core.full_rank.step_in_backward import StepInBackward
from chroma_trainer.trainer_core.full_rank.trained_layer import give_stepper_
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_, compiler_fault
from chroma_trainer.trainer_core.models.family import Family
from chroma_trainer.trainer_core.models.projections import projection_groups
from chroma_trainer.trainer_core.optim.optimizer import parameter_groups
from chroma_trainer.trainer_core.quant.low_precision_matmul import choose_products_
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.seeds import generator
from chroma_trainer.trainer_core.setup.attach_adapter import inject_adapter_
from chroma_trainer.trainer_core.setup.placement import compile_, place_, weights_stay
from chroma_trainer.trainer_core.storage.atomic import sha256_text
from chroma_trainer.trainer_core.train.attention_choice import choose_attention_
from chroma_trainer.trainer_core.train.step.loop import micro_loss
from chroma_trainer.trainer_core.train.step.state import TrainState
from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies
from context import Context, Skipped
from torch import Tensor, nn
from true_size import STD, hollow_model

TARGETS, RANK, SEED, NUM_SAMPLES = "all+ffs", 16, 0, 8
TEXT_TOKENS = {"chroma": 80, "flux": 512}  # Flux's pads are attended
TINY_TOKENS = 9
WHOLE_RATE = 1e-5  # of a whole model's training
SMALLEST = 8  # edges of rehearsals are so many times smaller
GRAPH_OPTIONS = {"triton.cudagraphs": True}  # of torch.compile


@dataclass(frozen=True)
class RandomCache:
    """Latents of samples, or embeddings of prompts, each drawn once: what a step asks of LatentCache and TextCache."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def get(self, asked: Any) -> Tensor:
        key = getattr(asked, "key", asked)
        if key not in self.drawn:
            numbers = torch.randn(self.shape, generator=generator(SEED, self.kind, key))
            self.drawn[key] = numbers.to(self.dtype)
        return self.drawn[key]


def scaled(case: Case, context: Context) -> Case:
    """The case as it is run: in rehearsals with an eighth of its edge."""
    return Case(**{**vars(case), "edge": case.edge // SMALLEST}) if context.is_rehearsal else case


def size_of(size: str, context: Context) -> str:
    return context.pick(size, "tiny")


def text_tokens(case: Case, context: Context) -> int:
    return context.pick(TEXT_TOKENS[case.family], TINY_TOKENS)


def request_of(case: Case, context: Context, size: str, dtype: str = "bf16", steps: int = 1) -> TrainRequest:
    """What a user would have asked for."""
    memory = MemoryConfig(
        checkpointing_interval=max(1, case.interval), group_offload=case.offload,
        offload_stream=case.stream and context.device.type != "cpu", activation_offload=case.activations,
        compile=case.compiled, attention=case.attention,
    )  # fmt: skip
    training = TrainingConfig(
        name="kit", rank=RANK, alpha=float(RANK), targets=TARGETS, steps=steps, batch_size=case.batch, warmup_steps=0,
        caption_dropout=0.0, gradient_checkpointing=case.interval > 0, checkpoint_every=0, seed=SEED,
        **({"max_grad_norm": 0.0, "learning_rate": WHOLE_RATE} if case.is_full else {}),
    )  # fmt: skip
    dataset = DatasetConfig(parts=(FolderConfig(resolution=case.edge),), roots=("",))
    model = hollow_model(context.scratch, case.family, size_of(size, context), case.level, case.products, dtype)
    return TrainRequest(
        model, dataset, training, memory=memory, adapter=AdapterConfig(kind=case.kind),
        optimizer=OptimizerConfig(optimizer=case.optimizer),
    )  # fmt: skip


def quiet_host(context: Context, output: Path | None = None, sinks: tuple[Any, ...] = ()) -> SinkHost:
    """Shows nothing. What is known of attention kernels is remembered between items that run one after the other."""
    output = output or context.scratch / "output"
    cache = context.scratch / (f"cache-{os.getpid()}" if context.is_beside else "cache")
    return SinkHost(paths=Paths(output=output, cache=cache), sinks=sinks, device=str(context.device))


def need(case: Case, device: torch.device) -> None:
    """Raises: Skipped: a package or a unit that the case needs is not here."""
    fault = load("quantization", case.level)().missing()
    if not fault and case.compiled:
        fault = compiler_fault(device)
    if not fault and case.products != "exact":
        fault = load("products", case.products)().lacks(device)
    if fault:
        raise Skipped(fault)


def random_transformer(family: Family, request: TrainRequest, device: torch.device) -> Any:
    """Made on the device. The same numbers in every dtype: those that bf16 holds."""
    transformer: Any = family.empty_transformer(request.model)
    transformer = transformer.to(DTYPES[request.model.dtype]).to_empty(device=device)
    draw = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1:
                numbers = torch.randn(parameter.shape, generator=draw, device=device).mul_(STD)
                parameter.copy_(numbers.to(torch.bfloat16))
            else:
                parameter.fill_(float(not name.endswith("bias")))
    transformer.restore_buffers_()
    return transformer.requires_grad_(False).eval().to(device)


def random_run(
    case: Case, context: Context, size: str, dtype: str = "bf16", steps: int = 1, host: SinkHost | None = None
) -> TrainState:
    """As build_run makes it of a request and files."""
    need(case, context.device)
    case, device, host = scaled(case, context), context.device, host or quiet_host(context)
    request, family = request_of(case, context, size, dtype, steps), load("family", case.family)()
    memory, training = request.memory, request.training
    transformer = random_transformer(family, request, device)
    transformer = load("quantization", case.level)().quantize_(transformer, family.full_precision)
    family.prepare_(transformer, request.model)
    if left_out := choose_products_(transformer, case.products):
        host.emit(Notice(left_out, "warning"))
    if memory.group_offload != "none":
        transformer.to("cpu")
    injected = inject_adapter_(transformer, family, request, device, host)
    place_(
        transformer,
        family,
        memory,
        device,
        checkpointing=training.gradient_checkpointing,
        disk=context.scratch / "offload",
    )
    _compile_(transformer, family, memory, context, case.graphs)
    optimizer = load("optimizer", request.optimizer.optimizer).build(
        parameter_groups(injected.layers, injected.rates),
        request.optimizer,
        training.learning_rate,
        training.weight_decay,
        training.seed,
    )
    edge, samples = case.edge, samples_of(case.edge)
    rows = text_tokens(case, context) + (case.family == "flux")  # one for the pooled text
    width = transformer.context_embedder.in_features
    run = TrainState(
        config=training, family=family, transformer=transformer, layers=injected.layers,
        parameters=[parameter for _, parameter in trainable_parameters(injected.layers)], optimizer=optimizer,
        optimizer_config=request.optimizer, density=density(training.sigma_density, training.shift), samples=samples,
        plan=BatchPlan([(edge, edge)] * len(samples), [1] * len(samples), case.batch, SEED),
        latents=RandomCache("latents", (16, edge // 8, edge // 8)),  # pyright: ignore[reportArgumentType]
        text=RandomCache("text", (rows, width), DTYPES[dtype]),  # pyright: ignore[reportArgumentType]
        device=device, num_steps=steps, dtype=dtype,
        working=WorkingCopies(
            injected.layers, projection_groups(family.blocks(transformer)),
            joins_bases=weights_stay(memory, device) and not case.apart,
        ),
        in_backward=_step_in_backward(injected.layers, optimizer) if case.is_full else None,
    )  # fmt: skip
    choose_attention_(run, memory.attention, host)
    gc.collect()  # checkpointed blocks are in cycles, and so is whatever was before them
    empty_cache(device)
    return run


def _step_in_backward(layers: dict[str, Any], optimizer: torch.optim.Optimizer) -> StepInBackward:
    stepper = StepInBackward(optimizer, dict(trainable_parameters(layers)), SEED)
    give_stepper_(layers.values(), stepper)
    return stepper


def _compile_(transformer: nn.Module, family: Family, memory: MemoryConfig, context: Context, graphs: bool) -> None:
    """In rehearsals only traced, for what comes after it takes a minute on a CPU."""
    if not memory.compile:
        return
    torch._dynamo.reset()
    if context.is_rehearsal:
        compile_blocks_(family.blocks(transformer), backend="eager")
    elif graphs:
        compile_blocks_(family.blocks(transformer), options=GRAPH_OPTIONS)
    elif left_out := compile_(transformer, family, memory, context.device):
        raise Skipped(left_out)


def samples_of(edge: int) -> list[Sample]:
    """Pictures that nobody has."""
    placement = Placement((edge, edge), (edge, edge), (0, 0))
    names = [f"{i}.png" for i in range(NUM_SAMPLES)]
    return [Sample(f"0/{n}", n, n, sha256_text(n), (f"picture {n}",), (edge, edge), placement, 0) for n in names]


@torch.no_grad()
def stir_(run: TrainState) -> None:
    """Give numbers to what begins at 0, else half of a new adapter has no gradient."""
    for name, parameter in trainable_parameters(run.layers):
        if not parameter.any():
            draw = torch.randn(parameter.shape, generator=generator(SEED, "stir", name))
            parameter.copy_(draw.mul_(STD))


def gradients_of(run: TrainState, micro: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The loss of a micro-batch and the gradient of all that learns, on the device; what has none is left out.

    As the loop computes them: with the adapter's working copies, and products joined.
    """
    run.optimizer.zero_grad(set_to_none=True)
    with run.working.active() if run.working else nullcontext():
        loss = micro_loss(run, micro)
        loss.backward()
        if run.working:
            run.working.collect_()
    found = {name: p.grad.detach().clone() for name, p in trainable_parameters(run.layers) if p.grad is not None}
    value = loss.item()
    run.optimizer.zero_grad(set_to_none=True)
    return value, found


def faults_of(run: TrainState, loss: float, gradients: dict[str, Tensor]) -> Iterator[str]:
    """Why these can't be trained with: nothing that is not finite may pass, and nothing may be left out."""
    if not torch.isfinite(torch.tensor(loss)):
        yield f"the loss is {loss}"
    names = [name for name, _ in trainable_parameters(run.layers)]
    if lost := [name for name in names if name not in gradients]:
        yield f"{len(lost)} of {len(names)} tensors have no gradient, such as {lost[0]}"
    if bad := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        yield f"{len(bad)} of {len(names)} gradients are not finite, such as {bad[0]}"
    if still := [name for name, gradient in gradients.items() if not gradient.any()]:
        yield f"{len(still)} of {len(names)} gradients are 0, such as {still[0]}"
