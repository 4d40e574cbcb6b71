"""The leak meter: how far a LoRA moves predictions without its trigger, measured at each checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from chroma_trainer.nodes.comfyui.event_history import RunHistory
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.data.captions import without_trigger
from chroma_trainer.trainer_core.data.holdout import split
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import LeakMeasured
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.seeds import generator
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.figures.leak import Leak
from chroma_trainer.trainer_core.train.hooks import leak_meter
from chroma_trainer.trainer_core.train.hooks.leak_meter import LeakMeter, find_probes, measure_leak
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.preservation import base_model

from tests.workshop import EVALUATED


def state_of(workshop, request):
    host = workshop.host()
    return build_run(plan_run(request, host), host, PhaseTimer()), host


def with_parts(request, *changes):
    """Return the request with one folder for each change of its fields."""
    parts = tuple(replace(request.dataset.parts[0], **values) for values in changes)
    return replace(request, dataset=DatasetConfig(parts, request.dataset.roots * len(parts)))


@pytest.mark.parametrize(
    ("caption", "word", "plain"),
    [
        ("sks, a red cat", "", "a red cat"),
        ("sks style, a cat", "", "style, a cat"),
        ("a cat by sks", "", "a cat by"),
        ("a cat, sks, at night", "", "a cat, at night"),
        ("SKS", "", ""),
        ("asks for a cat", "", "asks for a cat"),
        ("a photo of sks on a chair", "dog", "a photo of dog on a chair"),
    ],
)
def test_a_caption_without_its_trigger(caption, word, plain):
    assert without_trigger(caption, "sks", word) == plain


def test_the_leak_is_a_ratio_with_its_error():
    leak = Leak([0.125, 0.125, 0.875, 0.875], [1.0, 3.0, 2.0, 2.0], [0.5, 1.0, 0.0, 0.5])
    assert leak.ratio
    mean, error = leak.ratio
    assert mean == 2.0 / 8.0
    rest = [0.25, 0.25, -0.5, 0.0]
    assert error == pytest.approx(math.sqrt(sum(value**2 for value in rest) / 3 / 4) / 2)
    assert leak.by_sigma == {0.125: 1.5 / 4, 0.875: 0.5 / 4}
    assert Leak.from_json(json.loads(json.dumps(leak.as_json()))) == leak
    assert Leak([0.5], [0.0], [0.0]).ratio is None and Leak([0.5], [math.nan], [1.0]).ratio is None


@pytest.fixture(scope="module")
def built(workshop):
    """A run that is about to start, with its host."""
    return state_of(workshop, workshop.request(**EVALUATED))


@pytest.fixture
def moved(built):
    """The same with an update that is not 0, and the base model measured."""
    state, host = built
    for layer in state.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    state.leak_meter.measure_base_(state, host)
    yield built
    for layer in state.layers.values():
        torch.nn.init.zeros_(layer.lora_B)
    state.step, state.leaks = 0, {}
    host.events.clear()


def test_it_is_the_move_of_the_predictions(moved):
    """0 for an update that is 0; 1 where both prompts are the same to the model."""
    state, host = moved
    meter = state.leak_meter
    leak = meter.measure(state, host)
    mean, error = leak.ratio
    assert 0 < mean < 2 and error > 0 and all(value > 0 for value in leak.moved_with)
    twins = LeakMeter([replace(probe, prompts=(probe.prompts[0],) * 2) for probe in meter.probes[:1]])
    twins.measure_base_(state, host)
    again = twins.measure(state, host)
    assert [*again.moved_with] == [*again.moved_without] == [leak.moved_with[0]]
    for layer in state.layers.values():
        torch.nn.init.zeros_(layer.lora_B)
    assert twins.measure(state, host).moved_with == (0.0,)


def test_images_with_a_trigger_are_measured(workshop):
    """Of folders that have one, without prior preservation, at all noise levels; held-out ones first."""
    request = with_parts(
        workshop.request(**EVALUATED), {"trigger": ""}, {}, {"trigger": "other", "prior_preservation": True}
    )
    state, _ = state_of(workshop, request)
    probes = state.leak_meter.probes
    assert {probe.sample.part for probe in probes} == {1} and len(probes) == 8
    assert sorted(probe.sigma for probe in probes) == sorted([1.0, 0.95, 0.9, 0.8] * 2)
    assert all(probe.prompts[0] == f"sks, {probe.prompts[1]}" for probe in probes)
    held = workshop.request(holdout=0.25)
    index = plan_run(held, workshop.host()).index
    (key,) = [sample.key for sample in split(index.samples, 0.25)[1]]
    assert {probe.sample.key for probe in find_probes(held, index)} == {key}
    word = with_parts(workshop.request(**EVALUATED), {"class_word": "animal"})
    assert all(probe.prompts[1].startswith("animal, ") for probe in find_probes(word, index))


def test_at_most_16_passes_at_a_checkpoint(moved, monkeypatch):
    state, host = moved
    calls: list = []
    predict = ChromaFamily.predict

    def spy(self, *arguments, **others):
        calls.append(len(arguments[2]))
        return predict(self, *arguments, **others)

    monkeypatch.setattr(ChromaFamily, "predict", spy)
    state.step = 1
    measure_leak(state, host)
    measure_leak(state, host)  # the end of the run, where a checkpoint has measured it
    assert calls == [1] * 16


def test_what_helps_is_named_once(moved, monkeypatch):
    state, host = moved
    monkeypatch.setattr(leak_meter, "HIGH", 0.01)
    for state.step in (1, 2):
        measure_leak(state, host)
    assert len(host.all(LeakMeasured)) == 2
    (text,) = [text for text in host.told() if "what helps" in text]
    assert "prior_preservation" in text and "class_word" in text


def test_latents_come_from_the_base_model_and_the_prompt_without_the_trigger(moved):
    """Not from training images, which show the style to any prompt."""
    state, _ = moved
    meter = state.leak_meter
    number = next(i for i, probe in enumerate(meter.probes) if probe.sigma == 0.95)
    probe = meter.probes[number]
    noise = torch.randn(meter.starts[number].shape, generator=generator(0, "leak", number, probe.sample.key))
    with torch.no_grad(), base_model(state):
        text = [state.text.get(probe.prompts[1]).to(state.device)]
        sigma = torch.tensor([1.0], device=state.device)
        velocity = state.family.predict(state.transformer, noise.to(state.device), sigma, text).cpu()
    assert torch.equal(meter.starts[number], noise + (0.95 - 1.0) * velocity)


def test_it_is_reported_at_each_checkpoint_and_changes_no_byte(workshop):
    """Not of the LoRA, and not of what a resumed run trains."""
    request = workshop.request(steps=4, **EVALUATED)
    hosts = [workshop.host(), workshop.host()]
    measured = run(request, hosts[0])
    plain = run(workshop.request(steps=4, eval_images=0), hosts[1])  # neither loss nor leak
    weights = [host.run_folder / "checkpoints" / "step-000004" / "adapter.safetensors" for host in hosts]
    assert weights[0].read_bytes() == weights[1].read_bytes() and measured.losses == plain.losses
    events = hosts[0].all(LeakMeasured)
    assert [event.step for event in events] == [2, 4] and not hosts[1].all(LeakMeasured)
    assert [entry["step"] for entry in measured.report["leak"]] == [2, 4] and "leak" not in plain.report
    assert measured.report["leak"][1]["leak"] == events[1].leak
    assert set(measured.report["leak"][1]["by_sigma"]) == {"1", "0.95", "0.9", "0.8"}
    assert any(text.startswith("step 4: leak 0.") for text in hosts[0].told())
    history = RunHistory(hosts[0].run_folder)
    history.update()
    assert [item["leak"] for item in history.leaks] == [event.leak for event in events]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_leaks(workshop):
    """Also one that is stopped at a checkpoint's step: the checkpoint is that of a run that goes on."""
    request = workshop.request(steps=4, keep_checkpoints=9, **EVALUATED)
    whole_host, host = workshop.host(), workshop.host()
    whole = run(request, whole_host)
    with pytest.raises(Cancelled):
        run(request, host.cancelling_at(2))
    states = [h.run_folder / "checkpoints" / "step-000002" / "state.json" for h in (whole_host, host)]
    assert states[0].read_bytes() == states[1].read_bytes()
    resumed = run(request, workshop.host(host.paths.output))
    assert resumed.report["leak"] == whole.report["leak"] and resumed.lora.sha256 == whole.lora.sha256


def test_the_noise_does_not_depend_on_the_run(built, workshop):
    """Runs with other seeds measure the same noise, so that they can be compared."""
    other, _ = state_of(workshop, workshop.request(seed=6, **EVALUATED))
    for state in (built[0], other):
        state.leak_meter.measure_base_(state, built[1])
    bases = [built[0].leak_meter.base, other.leak_meter.base]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(*pair) for key in bases[0] for pair in zip(bases[0][key], bases[1][key], strict=True))


@pytest.mark.slow
def test_without_a_trigger_it_is_skipped_and_that_is_reported(workshop):
    host = workshop.host()
    report = run(with_parts(workshop.request(steps=2, **EVALUATED), {"trigger": " "}), host).report
    assert not host.all(LeakMeasured) and "leak" not in report
    assert sum(text.startswith("leak is not measured: no trigger is set") for text in host.told()) == 1
    quiet = workshop.host()
    run(with_parts(workshop.request(steps=2, eval_images=0), {"trigger": ""}), quiet)
    assert not any("leak" in text for text in quiet.told())
