"""What the plan says beside a step: sizes as they are sold, time, disk, the save, and why mode auto chose what it chose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import Notice
from chroma_trainer.trainer_core.memory.pinned_memory import CHUNK_BYTES
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.planner.auto_tune import SHARE, choose_memory, explain_choice
from chroma_trainer.trainer_core.planner.estimates.disk import num_checkpoints
from chroma_trainer.trainer_core.planner.estimates.operations import evaluations
from chroma_trainer.trainer_core.planner.estimator import make_estimator
from chroma_trainer.trainer_core.planner.memory_plan import (
    GB,
    Machine,
    MemoryPlan,
    PhasePlan,
    bytes_to_reserve,
    duration,
    with_memory,
)
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run

from tests.workshop import EVALUATED


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0823, "0.082 s"), (3.14, "3.1 s"), (36.4, "36 s"), (119, "119 s"), (1980, "33 min"), (22_400, "6.2 h"), (1.2e5, "33 h"), (1e6, "12 days")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_a_12_gb_card_has_12_gb_as_it_is_sold():
    machine = with_memory(Machine("here", 0, GB, 1e12, 0, GB), 12, 32)
    assert (machine.device_bytes, machine.ram_bytes) == (12 << 30, 32 << 30)
    assert machine.device_total == 12 << 30 and machine.flops == 0 and machine.name == "12 GB"
    assert with_memory(machine, 0, 0) == machine


def test_no_empty_column():
    phases = PhasePlan("load", 10, GB), PhasePlan("train", GB, GB, 7200.0)
    known = MemoryPlan(phases, {"lora": 10}, Machine("card", GB, GB), "", 10, 36.0).text().splitlines()
    assert known[2].split()[-1] == "time" and known[3].split()[-1] == "-" and known[4].endswith("2 h")
    assert "at least 36 s a step" in known[0] and "with empty caches" in known[5]
    unknown = MemoryPlan((PhasePlan("load", 10, GB),), {}, Machine("card", GB, GB), "", 10, None).text()
    assert "time" not in unknown and "seconds" not in unknown and "-" not in unknown.splitlines()[3]


@pytest.fixture
def estimates(workshop):
    request = workshop.request(
        gradient_checkpointing=True,
        rank=32,
        **EVALUATED,
        validation=ValidationConfig(prompts="x", resolutions="32x32", cfg=1.0),
    )
    host = workshop.host()
    index = plan_run(request, host).index
    return request, make_estimator(request, ChromaFamily(), index, Machine("card", 10 * GB, 10 * GB), host.paths.cache)


def phases_of(estimator, request) -> dict[str, PhasePlan]:
    return {phase.name: phase for phase in estimator.plan(request).phases}


def seconds_of(estimator, request) -> dict[str, float]:
    """The seconds of the phases that have them."""
    return {phase.name: phase.seconds for phase in estimator.plan(request).phases if phase.seconds is not None}


def test_the_save_and_the_evaluation_are_phases(estimates):
    request, estimator = estimates
    phases = phases_of(estimator, request)
    cost = next(iter(estimator._costs.values())).optimizer_cost
    assert phases["save"].ram - phases["eval"].ram >= max(cost.saved, 3 * 4 * cost.parameters)
    off = replace(request, training=replace(request.training, eval_images=0))
    assert phases_of(estimator, off).keys() == phases.keys() - {"eval"}


def test_operations_of_all_phases(estimates):
    """Known where the speed of the machine is, in proportion to what is done."""
    request, estimator = estimates
    (part,) = request.dataset.parts
    with_leak, request = request, replace(request, dataset=replace(request.dataset, parts=(replace(part, trigger=""),)))
    assert all(phase.seconds is None for phase in phases_of(estimator, request).values())
    estimator.machine = replace(estimator.machine, flops=1e12)
    phases = seconds_of(estimator, request)
    assert all(phases[name] > 0 for name in ("text", "latents", "eval", "train", "validate"))
    twice = replace(
        request,
        training=replace(request.training, steps=12, eval_images=2),
        validation=replace(request.validation, steps=2 * request.validation.steps),
    )
    more = seconds_of(estimator, twice)
    assert more["train"] == pytest.approx(2 * phases["train"])
    assert more["eval"] == pytest.approx(phases["eval"] / 2)  # of 4 images
    assert seconds_of(estimator, with_leak)["eval"] > phases["eval"]
    assert 1.5 < more["validate"] / phases["validate"] <= 2


def test_evaluations_are_counted(estimates):
    request, _ = estimates
    held = replace(request, training=replace(request.training, holdout=0.25, steps=6, checkpoint_every=2))
    facts = type("Facts", (), {"num_steps": 6})
    assert evaluations(request, facts) == 2 and evaluations(held, facts) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "count"),
    [({}, 2), ({"checkpoint_every": 0}, 1), ({"keep_checkpoints": 9}, 3), ({"keep_every": 2}, 3), ({"keep_every": 3}, 2), ({"holdout": 0.25}, 3)],
)  # fmt: skip
def test_checkpoints_that_stay(workshop, values, count):
    request = workshop.request(**{"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 2, **values})
    assert num_checkpoints(request, 6) == count


@pytest.mark.slow
def test_disk_is_what_a_run_writes(workshop):
    request = workshop.request(steps=6, checkpoint_every=2, rank=256, **EVALUATED)
    request = replace(request, model=replace(request.model, quantization=QuantizationConfig("int8-quanto")))
    host = workshop.host()
    disk = run(request, host).report["memory"]["predicted"]["disk_bytes"]

    def size(folder, pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())

    assert len(host.checkpoints) == 2
    assert disk["checkpoints"] == pytest.approx(size(host.run_folder / "checkpoints", "*"), rel=0.1)
    assert disk["lora"] == pytest.approx(host.lora.stat().st_size, rel=0.1)
    bases = (host.paths.cache / "quantized").iterdir()  # other tests quantize too
    assert pytest.approx(disk["quantized base"], rel=0.1) in [size(path, "*.safetensors") for path in bases]


def test_pinned_weights_are_counted(estimates):
    request, estimator = estimates
    plain, ahead = (
        phases_of(estimator, replace(request, memory=MemoryConfig(group_offload="block", offload_stream=stream)))
        for stream in (False, True)
    )
    assert ahead["load"].ram - plain["load"].ram == CHUNK_BYTES
    assert ahead["train"].ram > plain["train"].ram and ahead["train"].device > plain["train"].device


def test_positions_of_all_sizes_are_counted(estimates, workshop):
    request, estimator = estimates
    one = replace(request, validation=replace(request.validation, resolutions="96x32"))
    two = replace(request, validation=replace(request.validation, resolutions="96x32, 64x32"))
    three = replace(request, validation=replace(request.validation, resolutions="96x32, 64x32, 32x64"))
    peaks = [phases_of(estimator, each)["train"].device for each in (one, two, three)]
    # Cosines and sines in fp32, of the 4 tokens of the largest bucket, for heads of 16.
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] == 2 * 4 * 4 * 16


def with_room(estimator, request, memory: MemoryConfig, spare: int = 0) -> None:
    """Let the card be as large as the training with these settings needs."""
    estimator.machine = Machine("card", 10 * GB, 10 * GB)
    phases = phases_of(estimator, replace(request, memory=memory))
    largest = max(phases["train"].device, phases["load"].device)
    estimator.machine = Machine("card", int((bytes_to_reserve(largest) + spare) / SHARE) + 2000, 10 * GB)


def test_auto_offloads_the_least_share_that_fits(estimates):
    """Where 0.4 GB were missing of 12, all blocks were offloaded and 2.1 of 12 GB used."""
    request, estimator = estimates
    without = MemoryConfig(activation_offload=True)
    with_room(estimator, request, without)
    assert choose_memory(estimator, request).group_offload == "none"
    for share, count in ((0.5, 2), (0.75, 3)):  # of 4 blocks, of which one is on the device in any case
        with_room(estimator, request, replace(without, group_offload="block", offload_share=share))
        chosen = choose_memory(estimator, request)
        assert chosen.group_offload == "block" and len(chosen.offloaded_blocks(4)) == count


def test_the_choice_is_explained_in_one_line(estimates):
    request, estimator = estimates
    chosen = choose_memory(estimator, request)
    assert explain_choice(estimator, request, chosen) == ""  # the fastest
    with_room(estimator, request, MemoryConfig(activation_offload=True, group_offload="block", offload_share=0.5))
    chosen = choose_memory(estimator, request)
    text = explain_choice(estimator, request, chosen)
    assert text.startswith("memory auto: recomputing all blocks with activation_offload needs ")
    assert " of VRAM, and " in text and text.endswith(" may be used") and "\n" not in text
    plan = replace(estimator.plan(replace(request, memory=chosen)), choice=text)
    assert text in plan.text() and plan.as_json()["choice"] == text and "of the blocks" in plan.settings


def test_a_choice_that_validation_changed_is_explained_too(estimates):
    """`plan` crashed where the images, not the training, needed model_offload, or where the user had set an offload."""
    request, estimator = estimates
    with_room(estimator, request, MemoryConfig(activation_offload=True))
    chosen = choose_memory(estimator, request)
    text = explain_choice(estimator, request, chosen)
    assert (
        chosen.group_offload == "none"
        and explain_choice(estimator, request, replace(chosen, model_offload=True)) == text
    )
    own = replace(request, memory=replace(request.memory, activation_offload=True))
    assert explain_choice(estimator, own, choose_memory(estimator, own)) == ""


def test_a_run_explains_it(workshop):
    """On a CPU without the room for stored activations."""
    request = replace(workshop.request(steps=1, checkpoint_every=0), memory=MemoryConfig(mode="auto"))
    host = workshop.host()
    run(request, host)
    assert not any("may be used" in event.text for event in host.all(Notice))  # there is nothing to explain
