"""The plan against the truth: bytes of real steps, as torch's profiler saw them allocated; and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.families.checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.families.chroma import ChromaFamily
from chroma_trainer.trainer_core.host import MemoryPlanned, Notice
from chroma_trainer.trainer_core.lora.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.lora.targets import resolve_targets
from chroma_trainer.trainer_core.problems import UserError
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train import forecasting
from chroma_trainer.trainer_core.train import run as run_module
from chroma_trainer.trainer_core.train.build import plan_run
from chroma_trainer.trainer_core.train.costs import Shape, Skeleton, step_flops
from chroma_trainer.trainer_core.train.counting import LiveBytes, bytes_of
from chroma_trainer.trainer_core.train.forecasting import changes, chosen, forecaster, memory_told, remedy
from chroma_trainer.trainer_core.train.measuring import measured_peak
from chroma_trainer.trainer_core.train.phases import Phases
from chroma_trainer.trainer_core.train.plan import GB, Machine, needed, recomputed, training_peak
from chroma_trainer.trainer_core.train.run import run

FAMILY = ChromaFamily()
MACHINE = Machine("test", 0, 8 * GB)
CASES = {
    "stored": (96, 1, "none", False, 1, "all"),
    "recomputed": (256, 1, "none", True, 1, "all+ffs"),
    "every second": (128, 4, "none", True, 2, "all+ffs"),
    "int8": (128, 1, "int8-quanto", True, 1, "all"),
    "int8 stored, batch": (128, 4, "int8-quanto", False, 1, "all"),
    "int4": (128, 2, "int4-quanto", True, 1, "mmdit"),
}


def real_peak(request: TrainRequest, shape: Shape) -> int:
    """Of a second step: the optimiser's states are there."""
    transformer = FAMILY.load_transformer(request.model)
    load("quantization", request.model.quantization.level)().quantize_(transformer, FAMILY.full_precision)
    training = request.training
    layers = inject_(transformer, resolve_targets(transformer, FAMILY, training.targets), training.rank, training.alpha)
    if training.gradient_checkpointing:
        checkpoint_blocks_(FAMILY.blocks(transformer), request.memory.checkpointing_interval)
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    text = [torch.zeros(shape.text_tokens, 32) for _ in range(shape.batch)]
    x = torch.zeros(shape.batch, 16, shape.height // 8, shape.width // 8)

    def step() -> None:
        FAMILY.predict(transformer, x, torch.full((shape.batch,), 0.5), text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return bytes_of(*transformer.parameters(), *transformer.buffers(), *states) + measured_peak(step)


def requested(workshop, level="none", memory=None, **values) -> TrainRequest:
    request = workshop.request(rank=4, **values)
    model = replace(request.model, quantization=QuantizationConfig(level))
    return replace(request, model=model, memory=memory or MemoryConfig())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_peak_of_a_real_step_within_a_tenth(workshop, case):
    edge, batch, level, checkpointing, interval, targets = case
    request = requested(
        workshop,
        level,
        MemoryConfig(checkpointing_interval=interval),
        gradient_checkpointing=checkpointing,
        targets=targets,
    )
    shape = Shape(edge, edge, batch, 6)
    planned, _ = training_peak(Skeleton(FAMILY, request).cost(shape), request)
    real = real_peak(request, shape)
    assert planned == pytest.approx(real, rel=0.1), f"planned {planned}, real {real}"


def test_operations_are_those_of_the_formula(workshop):
    """Linear layers: 2 a token and weight, twice that with the backward pass; attention: 4 T^2 width, then 2.5 times that."""
    request = requested(workshop, targets="all", gradient_checkpointing=True)
    skeleton = Skeleton(FAMILY, request)
    edge, text = 512, 6
    cost = skeleton.cost(Shape(edge, edge, 1, text))
    image, width = (edge // 16) ** 2, 64
    double = 2 * 12 * width * width * (image + text)
    single = 2 * 12 * width * width * (image + text)
    attention = 4 * (image + text) ** 2 * width
    blocks = [double + attention] * 2 + [single + attention] * 2
    stored, again = step_flops(cost, ()), step_flops(cost, range(4))
    expected = sum(blocks) + 4 * (double + 2.5 * attention)
    assert stored == pytest.approx(expected, rel=0.08)  # the adapter's own are a few in a hundred here
    assert again - stored == pytest.approx(sum(blocks), rel=0.05)


def test_live_bytes_follow_what_is_freed():
    with LiveBytes() as count:
        a = torch.zeros(100)
        b = a + a
        view = b[10:]
        assert count.now == 800
        del b
        assert count.now == 800
        del view, a
        assert count.now == 0 and count.peak == 800


@pytest.fixture
def made(workshop):
    request = requested(
        workshop, gradient_checkpointing=True, validation=ValidationConfig(prompts="x", resolutions="32x32")
    )
    host = workshop.host()
    checked = plan_run(request, host)
    return request, forecaster(request, FAMILY, checked.index, MACHINE, host.paths.cache)


def test_each_setting_takes_less_than_the_one_before(made):
    request, forecasts = made
    request = replace(request, training=replace(request.training, gradient_checkpointing=False))
    forecasts.machine = Machine("card", GB, GB)
    peaks = [{p.name: p for p in forecasts.plan(request).phases}["train"].device]
    again = replace(request, training=replace(request.training, gradient_checkpointing=True))
    for memory in (
        MemoryConfig(checkpointing_interval=2),
        MemoryConfig(),
        MemoryConfig(group_offload="block", activation_offload=True),
        MemoryConfig(group_offload="leaf", activation_offload=True),
    ):
        peaks.append({p.name: p for p in forecasts.plan(replace(again, memory=memory)).phases}["train"].device)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_what_does_not_fit_is_named_with_the_cheapest_change_that_does(made):
    request, forecasts = made
    roomy = forecasts.plan(request)
    assert (
        not roomy.unfit() and remedy(forecasts, request, roomy) is None and roomy.first_line().startswith("plan: fits")
    )
    forecasts.encoder, forecasts.codec = (
        (1000, 100, 32, 1000),
        (1000, 0.01),
    )  # so that the training is what does not fit
    forecasts.machine = Machine("card", needed(10**9), GB)
    train = {p.name: p for p in forecasts.plan(request).phases}["train"].device
    forecasts.machine = Machine("card", needed(train - 1), GB)
    tight = forecasts.plan(request)
    assert "train" in {phase.name for phase in tight.unfit()} and "does not fit" in tight.first_line()
    words, changed, plan = remedy(forecasts, request, tight)
    assert not plan.unfit() and changed != request and words
    tried = [w for w, _ in changes(request)]
    for earlier, variant in changes(request):  # nothing that comes before it would have done
        if words.endswith(earlier):
            break
        assert "train" in {phase.name for phase in forecasts.plan(variant).unfit()}
    assert tried


def test_auto_takes_the_fastest_that_fits(made):
    request, forecasts = made
    forecasts.machine = Machine("card", 10 * GB, 10 * GB)
    assert chosen(forecasts, request).checkpointing_interval == 64
    tightest = MemoryConfig(group_offload="leaf", activation_offload=True)
    least = {p.name: p for p in forecasts.plan(replace(request, memory=tightest)).phases}["train"].device
    forecasts.machine = Machine("card", int(needed(least) / 0.95) + 1000, 10 * GB)
    found = chosen(forecasts, request)
    assert found.group_offload == "leaf" and found.mode == "manual"


def test_a_run_tells_its_plan_and_compares(workshop):
    host = workshop.host()
    request = workshop.request(steps=1, checkpoint_every=0, gradient_checkpointing=True)
    report = run(replace(request, memory=MemoryConfig(mode="auto")), host).report["memory"]
    told = [event.text for event in host.all(Notice)]
    assert any(text.startswith("plan: fits") for text in told) and any(
        text.startswith("memory auto: ") for text in told
    )
    (planned,) = host.all(MemoryPlanned)
    assert (planned.device_bytes, planned.ram_bytes) == (0, report["predicted"]["ram_peak_bytes"])
    assert any(text.startswith("memory: predicted") for text in told)
    assert report["predicted"]["fits"] and report["measured"]["ram_peak_bytes"] > 0
    assert report["predicted"]["phases"].keys() == {"text", "latents", "load", "train"}


def test_out_of_memory_names_phase_plan_and_remedy(workshop, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(run_module, "fit", fails)
    with pytest.raises(UserError) as caught:
        run(workshop.request(steps=2), workshop.host())
    text = str(caught.value)
    assert "'train'" in text and "planned" in text and "measured" in text and "Tried to allocate 2 GiB" in text
    assert "cheapest change" in text or "no change" in text


def test_a_run_does_not_fail_for_want_of_a_forecast(workshop, monkeypatch):
    def fails(*_):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(forecasting, "forecaster", fails)
    host = workshop.host()
    report = run(workshop.request(steps=1, checkpoint_every=0), host).report["memory"]
    assert report["predicted"] is None and report["measured"]["ram_peak_bytes"] > 0
    assert any("no meta kernel" in text for text in host.told())


def test_other_faults_pass():
    with pytest.raises(RuntimeError, match="something else"), memory_told(None, Phases(), torch.device("cpu")):  # type: ignore[arg-type]
        raise RuntimeError("something else")


def test_counts_are_kept(made, monkeypatch):
    request, forecasts = made
    first = forecasts.plan(request)
    again = replace(forecasts, _costs={}, _skeletons={})
    monkeypatch.setattr(forecasting, "Skeleton", None)
    assert again.plan(request).as_json() == first.as_json()


def test_recomputed_blocks(workshop):
    request = requested(workshop, memory=MemoryConfig(checkpointing_interval=3), gradient_checkpointing=True)
    assert list(recomputed(request, 8)) == [0, 3, 6]
