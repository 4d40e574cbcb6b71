"""Plans of full-rank runs: the real peak of a tiny model, and at true size the figures of docs/full-rank.md."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.distributed.process_group import leave_own
from chroma_trainer.trainer_core.distributed.ranks import ALONE
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.full_rank.step_in_backward import StepInBackward
from chroma_trainer.trainer_core.full_rank.trained_layer import ShardedLayer
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.optim.optimizer import parameter_groups
from chroma_trainer.trainer_core.planner import auto_tune
from chroma_trainer.trainer_core.planner.advice.sharing_advice import shared_out, sharing_advice
from chroma_trainer.trainer_core.planner.auto_tune import advice, changes, choose_memory
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.planner.estimates.sharded_cost import cost_of_one
from chroma_trainer.trainer_core.planner.estimator import MemoryEstimator, make_estimator
from chroma_trainer.trainer_core.planner.memory_plan import GB, Machine, MemoryPlan, bytes_to_reserve
from chroma_trainer.trainer_core.planner.meta_counter import MemoryTracker, bytes_of
from chroma_trainer.trainer_core.planner.meta_model import MetaModel, text_width
from chroma_trainer.trainer_core.planner.step_peak import away, resident_bytes, states_away, training_peak
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.setup.attach_adapter import learning
from chroma_trainer.trainer_core.setup.placement import place_sharded_
from chroma_trainer.trainer_core.setup.preflight import problems_of
from chroma_trainer.trainer_core.train import disk_space
from chroma_trainer.trainer_core.train.planning import plan_request
from chroma_trainer.trainer_core.train.prepare import check_run
from chroma_trainer.trainer_core.train.run import run

FAMILY = load("family", "chroma")()


def full(workshop, optimizer="adafactor", dtype="bf16", **values) -> TrainRequest:
    request = workshop.request(**{"rank": 16, "alpha": 16.0, "max_grad_norm": 0.0, "batch_size": 1, **values})
    model = request.model if "model" in values else replace(request.model, dtype=dtype)
    adapter, config = AdapterConfig(kind="full"), OptimizerConfig(optimizer=optimizer)
    return replace(request, model=model, adapter=adapter, optimizer=config, memory=MemoryConfig())


def real_peak(request: TrainRequest, shape: Shape) -> int:
    """Return the bytes of a second step: the optimizer's states are there."""
    transformer: Any = FAMILY.load_transformer(request.model)
    rates = learning(transformer, FAMILY, request)
    layers = inject_(transformer, list(rates), 16, 16.0, config=request.adapter)
    if request.training.gradient_checkpointing:
        checkpoint_blocks_(FAMILY.blocks(transformer))
    part = load("optimizer", request.optimizer.optimizer)
    optimizer = part.build(parameter_groups(layers, rates), request.optimizer, 1e-4, 0.01, 0)
    stepper = StepInBackward(optimizer, dict(trainable_parameters(layers)), 0)
    text = [torch.zeros(shape.text_tokens, text_width(transformer)) for _ in range(shape.batch)]
    x, sigma = torch.zeros(shape.batch, 16, shape.height // 8, shape.width // 8), torch.full((shape.batch,), 0.5)

    def step(number: int) -> None:
        loss = FAMILY.predict(transformer, x, sigma, text).square().mean()
        with stepper.active(number):
            loss.backward()

    counter = MemoryTracker()
    with counter:
        step(0)
        counter.mark()  # with the optimizer's states
        step(1)
    return bytes_of(*transformer.parameters(), *transformer.buffers()) + counter.peak


@pytest.mark.parametrize(
    ("optimizer", "dtype", "edge", "recomputed"),
    [
        ("adafactor", "fp32", 64, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("adafactor", "bf16", 96, True), ("adamw", "bf16", 96, True), ("adamw_bf16", "bf16", 64, True))),
    ],
)  # fmt: skip
def test_the_peak_of_a_real_step_within_a_tenth(workshop, optimizer, dtype, edge, recomputed):
    request = full(workshop, optimizer, dtype, targets="all+ffs", gradient_checkpointing=recomputed)
    shape = Shape(edge, edge, 1, 6)
    planned, _ = training_peak(MetaModel(FAMILY, request, "cpu").cost(shape), request)
    real = real_peak(request, shape)
    assert planned == pytest.approx(real, rel=0.1), f"planned {planned}, real {real}"


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "least", "most"), [("adafactor", 18e9, 20e9), ("optimi-lion", 36e9, 38e9)])
def test_true_size(workshop, optimizer, least, most):
    """8.6 of 8.9 billion weights of two bytes, the states, and 1 to 2 GB of activations and of the largest layer."""
    model = ModelConfig(family="chroma", flavour="hd", repo="lodestones/Chroma1-HD", dtype="bf16")
    request = full(workshop, optimizer, model=model, targets="all+ffs", gradient_checkpointing=True)
    peak, _ = training_peak(MetaModel(FAMILY, request, "cuda").cost(Shape(512, 512, 1, 512)), request)
    assert least < peak < most


def test_what_makes_it_fit_is_no_quantization(workshop):
    request = full(workshop, "adamw", batch_size=2, gradient_checkpointing=True, targets="all+ffs")
    words = [text for text, _ in changes(replace(request, memory=MemoryConfig(checkpointing_interval=4)))]
    assert "activation_offload and optimizer adafactor" in words and "all that and batch_size 1" in words
    assert any(text.startswith("group_offload leaf, activation_offload") for text in words)
    assert not any("quantization" in text for text in words)
    assert all(changed.training.accumulation == 1 for _, changed in changes(request))


@pytest.mark.slow
def test_auto_offloads_trained_weights_last(workshop):
    host = workshop.host()
    request = full(workshop, targets="all+ffs", gradient_checkpointing=True)
    checked = check_run(request, host, {})
    estimator = make_estimator(request, FAMILY, checked.index, Machine("card", 1000, GB), host.paths.cache)
    memory = choose_memory(estimator, replace(request, memory=MemoryConfig(mode="auto")))
    assert memory.group_offload == "leaf" and memory.activation_offload


@pytest.mark.slow
def test_auto_and_advice_where_weights_are_shared_out(workshop):
    host = workshop.host()
    values = {"targets": "all+ffs", "gradient_checkpointing": True, "shard": "fp32", "accumulation": 2}
    request = full(workshop, "adamw", **values)
    checked = check_run(request, host, {})
    estimator = make_estimator(request, FAMILY, checked.index, Machine("card", 1000, GB), host.paths.cache, 2)
    memory = choose_memory(estimator, replace(request, memory=MemoryConfig(mode="auto")))
    assert memory == MemoryConfig(group_offload="block", text_encoder="blocks")
    words = [text for text, _ in changes(request)]
    assert words[:3] == [
        "gradient_checkpointing with interval 1",
        "all that and optimizer optimi-lion",
        "all that and shard bf16",
    ]
    for _, changed in changes(request):
        assert problems_of(changed, host) == []
    plan, alone = (replace(estimator, num_devices=count, _costs={}).plan(request) for count in (2, 1))
    of_two, of_one = (next(phase.device for phase in own.phases if phase.name == "train") for own in (plan, alone))
    assert plan.disk == alone.disk and of_two < 0.7 * of_one
    assert "shared out in fp32" in plan.settings


def small_beside(request: TrainRequest) -> TrainRequest:
    """Let the transformer be what needs most of the device: beside the tiny one T5 is large."""
    return replace(request, memory=MemoryConfig(text_encoder="cpu"))


@pytest.fixture
def room_for_shares(workshop):
    """Return the plan of a request for some devices, each with more memory than a share needs and less than the whole."""

    def room(request: TrainRequest, count: int) -> tuple[MemoryEstimator, MemoryPlan]:
        host = workshop.host()
        checked = check_run(request, host, {})
        estimator = make_estimator(
            request, FAMILY, checked.index, Machine("card", 1 << 40, 8 * GB), host.paths.cache, count
        )
        peaks = []
        for shard, size in (("off", count), ("bf16", max(2, count))):
            training = replace(request.training, shard=shard, accumulation=size)
            plan = replace(estimator, num_devices=size).plan(replace(request, training=training))
            peaks.append(plan.device_peak)
        assert peaks[1] < peaks[0]
        machine = replace(estimator.machine, device_bytes=bytes_to_reserve(sum(peaks) // 2))
        own = replace(estimator, machine=machine)
        return own, own.plan(request)

    return room


def test_where_shares_fit_and_whole_copies_do_not_shard_is_named_with_its_memory(workshop, room_for_shares):
    """The request keeps its optimizer and its batches. On one device the number of devices is named as well."""
    values = {"targets": "all+ffs", "gradient_checkpointing": True}
    for count, expected in ((2, "shard bf16 ("), (1, "devices 2, accumulation 2, shard bf16 (")):
        devices = f"cpu:{count}" if count > 1 else ""
        request = small_beside(full(workshop, "adamw", accumulation=count, devices=devices, **values))
        estimator, plan = room_for_shares(request, count)
        assert plan.unfit()
        text = sharing_advice(estimator, request)
        assert text.startswith(f"sharing out the weights over 2 devices fits: {expected}") and "MB of tensors" in text
        (_, changed), *_ = shared_out(request, 2)
        assert changed.optimizer == request.optimizer and problems_of(changed, workshop.host()) == []
    adafactor = small_beside(full(workshop, **values))
    assert "shard bf16, optimizer " in sharing_advice(estimator, adafactor)
    assert sharing_advice(estimator, replace(adafactor, adapter=AdapterConfig())) == ""  # a LoRA is not shared out
    assert sharing_advice(estimator, small_beside(full(workshop, rollout_probability=0.5, **values))) == ""


def test_the_advice_names_both_ways(workshop, room_for_shares, monkeypatch):
    values = {"targets": "all+ffs", "gradient_checkpointing": True}
    request = small_beside(full(workshop, "adamw", accumulation=2, devices="cpu:2", **values))
    estimator, plan = room_for_shares(request, 2)
    both = advice(estimator, request, plan, request)
    assert re.match("the cheapest change that fits: .*; sharing out the weights over 2 devices fits: shard bf16", both)
    alone = replace(request, training=replace(request.training, accumulation=1, devices=""))
    estimator, plan = room_for_shares(alone, 1)
    assert "shard" not in advice(estimator, alone, plan, alone)  # of a machine without several devices
    monkeypatch.setattr(auto_tune, "accelerators", lambda: ["cuda:0", "cuda:1"])
    assert "devices 2, accumulation 2, shard bf16" in advice(estimator, alone, plan, alone)


def test_shared_out_over_one_device(workshop):
    """What each of several devices would gather is there: the plan counts it, and fits where the whole fits with room."""
    host = workshop.host()
    request = full(workshop, "adamw", targets="all+ffs", gradient_checkpointing=True, shard="bf16", devices="auto")
    plan, fix, resolved = plan_request(request, host, Machine("card", 4 * GB, 8 * GB))
    assert not plan.unfit() and not fix and resolved.training.shard == "bf16"
    assert "processes" not in plan.settings and problems_of(request, host) == []


@pytest.mark.slow
def test_true_size_with_the_weights_in_ram(workshop):
    """One block of 0.7 GB or two layers, activations, and the largest layer's step: a GPU of 8 GB."""
    model = ModelConfig(family="chroma", flavour="hd", repo="lodestones/Chroma1-HD", dtype="bf16")
    request = full(workshop, model=model, targets="all+ffs", gradient_checkpointing=True)
    cost = MetaModel(FAMILY, request, "cuda").cost(Shape(512, 512, 1, 512))

    def peak(**memory) -> int:
        return training_peak(cost, replace(request, memory=MemoryConfig(**memory)))[0]

    assert 2e9 < peak(group_offload="leaf") < peak(group_offload="block") < 5e9
    half = peak(group_offload="block", offload_share=0.5)
    assert 0.5 * peak() < half < 0.65 * peak()
    assert peak(compile=True) - peak() < 1e9  # the gradients of one block


@pytest.mark.parametrize(
    ("optimizer", "kind"), [pytest.param("adafactor", "block", marks=pytest.mark.slow), ("adamw", "leaf")]
)
def test_weights_and_states_in_ram_are_counted(workshop, optimizer, kind):
    request = full(workshop, optimizer, targets="all+ffs", gradient_checkpointing=True)
    offloaded = replace(request, memory=MemoryConfig(group_offload=kind))
    cost = MetaModel(FAMILY, request, "cuda").cost(Shape(96, 96, 1, 6))
    states = cost.optimizer_cost.large_states
    assert states == states_away(cost, offloaded.memory)
    bytes_of_a_weight = states / cost.optimizer_cost.parameters  # adafactor: of the biases alone
    assert bytes_of_a_weight == 4 if optimizer == "adamw" else bytes_of_a_weight < 0.2
    assert sum(block.trained for block in cost.blocks) == cost.optimizer_cost.adapter
    on_device = resident_bytes(cost, request.memory) - resident_bytes(cost, offloaded.memory)
    largest = max(block.trained + block.weights for block in cost.blocks)
    assert away(cost, offloaded.memory) + states - on_device <= 2 * largest


@pytest.mark.slow
def test_the_disk_is_what_a_run_writes(workshop):
    host = workshop.host()
    report = run(full(workshop, eval_images=0, targets="all+ffs"), host).report
    disk = report["memory"]["predicted"]["disk_bytes"]
    checkpoints = sum(path.stat().st_size for path in (host.run_folder / "checkpoints").rglob("*.safetensors"))
    (model,) = (host.paths.output / "diffusion_models").iterdir()
    assert disk["checkpoints"] == pytest.approx(checkpoints, rel=0.1)
    assert disk["model"] == pytest.approx(model.stat().st_size, rel=0.1) and "lora" not in disk


def test_a_disk_without_room_is_said_before_the_run(workshop, monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes_of", lambda folder: 1_000_000)
    host = workshop.host()
    with pytest.raises(
        UserError, match=r"output: .* are free, and this run writes .* 2 checkpoints .* keep_checkpoints"
    ):
        run(full(workshop, eval_images=0), host)
    assert not host.all(StepReport)


def real_peak_of_shares(request: TrainRequest, shape: Shape, host: Any) -> int:
    """Return the bytes of a second step of FSDP2 in one process. It frees memory within tensors, which torch reports."""
    transformer: Any = FAMILY.load_transformer(request.model)
    rates = learning(transformer, FAMILY, request)
    layers = inject_(transformer, list(rates), 16, 16.0, config=request.adapter, kind=ShardedLayer)
    sharing = place_sharded_(transformer, FAMILY, request, layers, torch.device("cpu"), ALONE, host)
    part = load("optimizer", request.optimizer.optimizer)
    optimizer = part.build(parameter_groups(layers, rates), request.optimizer, 1e-4, 0.01, 0)
    parameters = dict(trainable_parameters(layers))
    stepper = StepInBackward(optimizer, parameters, 0, slices=sharing.slices)
    text = [torch.zeros(shape.text_tokens, text_width(transformer))]
    x, sigma = torch.zeros(1, 16, shape.height // 8, shape.width // 8), torch.full((1,), 0.5)

    def step(number: int) -> None:
        for round in range(request.training.accumulation):
            is_last = round == request.training.accumulation - 1
            loss = FAMILY.predict(transformer, x, sigma, text).square().mean()
            with sharing.round((lambda s, g: stepper.step_(s.local, number, 1.0, g)) if is_last else None):
                loss.backward()

    step(0)
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    frozen = [p.to_local() for p in transformer.parameters() if not p.requires_grad]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(1)
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    freed_and_made: list[int] = [event.nbytes() for event in events if event.name() == "[memory]"]  # pyright: ignore
    return bytes_of(*parameters.values(), *states, *frozen, *transformer.buffers()) + max(accumulate(freed_and_made))


@pytest.mark.parametrize(("rounds", "edge"), [(1, 96), pytest.param(2, 64, marks=pytest.mark.slow)])
def test_the_peak_of_shared_out_weights_within_a_seventh(workshop, rounds, edge):
    values = {"targets": "all+ffs", "gradient_checkpointing": True, "shard": "fp32", "accumulation": rounds}
    request, shape = full(workshop, "adamw", **values), Shape(edge, edge, 1, 6)
    cost, in_ram = cost_of_one(MetaModel(FAMILY, request, "cpu").cost(shape), request, 1)
    planned = training_peak(cost, request)[0]
    try:
        real = real_peak_of_shares(request, shape, workshop.host())
    finally:
        leave_own()
    assert planned == pytest.approx(real, rel=0.15), f"planned {planned}, real {real}"
    assert not in_ram


@pytest.mark.slow
def test_true_size_of_shared_out_weights(workshop):
    """The table of docs/full-rank.md: 16 bytes a weight with fp32 and gradients that wait, 6 or 4 without, over N."""
    model = ModelConfig(family="chroma", flavour="hd", repo="lodestones/Chroma1-HD", dtype="bf16")
    request = full(workshop, "adamw", model=model, targets="all+ffs", gradient_checkpointing=True, shard="fp32")
    cost = MetaModel(FAMILY, request, "cuda").cost(Shape(512, 512, 1, 512))
    weights = cost.optimizer_cost.parameters

    def work(shard: str, count: int, accumulation: int, bytes_each: float, **memory: Any) -> float:
        changed = replace(request.training, shard=shard, accumulation=accumulation)
        asked = replace(request, training=changed, memory=MemoryConfig(**memory))
        own, in_ram = cost_of_one(cost, asked, count)
        share = bytes_each * weights / count
        assert in_ram == (pytest.approx(share, rel=0.05) if memory else 0)
        peak = training_peak(own, replace(asked, memory=MemoryConfig()))[0]
        return peak if memory else peak - share

    for arguments in (("fp32", 8, 16, 16), ("fp32", 4, 4, 12), ("bf16", 2, 2, 6)):
        assert 2.5e9 < work(*arguments) < 5e9, arguments
    assert 2.5e9 < work("fp32", 2, 4, 16, group_offload="block") < 5e9
