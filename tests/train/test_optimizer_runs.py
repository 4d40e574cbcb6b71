"""Whole runs with other optimisers: what is exported, what is told, what is refused before anything loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.optim import bnb
from chroma_trainer.trainer_core.train import run as run_module
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file

from tests.workshop import EVALUATED


def request_with(workshop, optimizer, training=None, **settings):
    config = OptimizerConfig(optimizer=optimizer, **settings)
    return replace(workshop.request(**(training or {})), optimizer=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rate, settings",
    [("prodigy", 1.0, {"prodigy_d0": 1e-3}), ("schedulefree-adamw", 0.01, {})],
)
def test_it_goes_on_to_the_same_bytes(workshop, name, rate, settings):
    request = request_with(
        workshop, name, {**EVALUATED, "learning_rate": rate, "steps": 10, "lr_schedule": "constant"}, **settings
    )
    whole = run(request, workshop.host())
    host = workshop.host().cancelling_at(5)
    with pytest.raises(Cancelled):
        run(request, host)
    cut = load_file(host.lora)
    result = run(request, host.cancelling_at(0))
    assert (
        result.report["resumed_from"] == 5 and result.losses == whole.losses and result.lora.sha256 == whole.lora.sha256
    )
    assert result.report["eval_loss"] == whole.report["eval_loss"]
    assert any(not torch.equal(cut[name], tensor) for name, tensor in load_file(host.lora).items())
    assert whole.report["eval_loss"]["after"] < whole.report["eval_loss"]["before"]


def test_the_average_is_exported_and_the_other_point_is_trained_on(workshop):
    host = workshop.host()
    run(request_with(workshop, "schedulefree-adamw"), host)
    folder = host.run_folder / "checkpoints" / "step-000006"
    trained, states = load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
    exported, in_checkpoint = load_file(host.lora), load_file(folder / "lora.safetensors")
    for name, y in trained.items():
        x = (y - (1 - 0.9) * states[f"{name}|z"]) / 0.9
        assert torch.equal(exported[f"transformer.{name}.weight"], x), name  # alpha / rank is 1 here
        assert torch.equal(in_checkpoint[f"transformer.{name}.weight"], x), name
    assert any(not torch.equal(y, exported[f"transformer.{name}.weight"]) for name, y in trained.items())


def test_prodigys_own_rate_is_in_the_chart(workshop):
    host = workshop.host()
    run(request_with(workshop, "prodigy", {"learning_rate": 1.0}, prodigy_d0=1e-3), host)
    rates = [event.learning_rate for event in host.events if type(event).__name__ == "StepReport"]
    assert rates == sorted(rates) and rates[0] >= 1e-3 and rates[-1] > rates[0]


def test_bf16_weights_make_a_file_of_the_usual_form(workshop, plain_run):
    host = workshop.host()
    result = run(request_with(workshop, "adamw_bf16"), host)
    folder = host.run_folder / "checkpoints" / "step-000006"
    assert {tensor.dtype for tensor in load_file(folder / "adapter.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(result.lora.path).values()} == {torch.float32}
    plain = plain_run[1]
    assert torch.allclose(torch.tensor(result.losses), torch.tensor(plain.losses), rtol=0.02)


@pytest.mark.parametrize(
    "kind, init", [("lora", "pissa"), ("rslora", "olora"), ("dora", "default"), ("dora", "pissa"), ("lora", "loftq")]
)
def test_weights_that_are_rounded_start_at_an_update_of_0_too(workshop, kind, init):
    """Factors of the base's own weight, and its row norms: rounded, they changed it by 0.1 to 0.2 %."""
    request = replace(
        request_with(workshop, "adamw_bf16", {"init": init}), adapter=AdapterConfig(kind=kind, svd_iterations=0)
    )
    if init == "loftq":
        quantized = replace(request.model, quantization=QuantizationConfig(level="fp8-native"))
        request = replace(request, model=quantized)
    host = workshop.host()
    state = build_run(plan_run(request, host), host, PhaseTimer())
    for name, layer in state.layers.items():
        assert layer.delta().norm() <= 1e-6 * layer.weight.norm(), name  # what the file changes
        assert layer.lora_A.dtype == torch.bfloat16


def test_what_is_without_effect_is_told_and_the_run_goes_on(workshop):
    host = workshop.host()
    run(request_with(workshop, "adamw", {"steps": 1, "learning_rate": 0.5}, kahan=True, lr_power=3.0), host)
    told = host.told()
    assert "OptimizerSettings.kahan is True, but adamw does not use it: it has no effect" in told
    assert "OptimizerSettings.lr_power is 3.0, but the schedule constant does not use it: it has no effect" in told
    assert "learning_rate is 0.5; with adamw 1e-05 to 0.001 is usual, see docs/optimizers.md" in told


def test_a_missing_package_is_said_before_anything_loads(workshop, monkeypatch):
    monkeypatch.setattr(run_module, "build_run", None)
    monkeypatch.setattr(bnb.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as caught:
        run(request_with(workshop, "bnb-adamw8bit"), workshop.host())
    assert str(caught.value).startswith("optimizer: bnb-adamw8bit: bitsandbytes is not installed; run pip install")


@pytest.mark.slow
def test_another_optimiser_can_not_go_on_from_a_checkpoint(workshop):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_with(workshop, "optimi-lion", {"learning_rate": 0.001}), host)
    adopting = request_with(workshop, "adafactor", {"on_change": "adopt"})
    with pytest.raises(UserError) as caught:
        run(adopting, host.cancelling_at(0))
    assert "its optimizer state is of Lion, and this run uses Adafactor; choose that optimizer again" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "schedule, goes_on", [("constant_with_warmup", True), pytest.param("wsd", False, marks=pytest.mark.slow)]
)
def test_only_a_schedule_without_an_end_can_be_made_longer(workshop, schedule, goes_on):
    host = workshop.host()
    run(workshop.request(steps=2, lr_schedule=schedule), host)
    longer = run(workshop.request(steps=3, lr_schedule=schedule, on_change="anew"), host)
    assert longer.report["resumed_from"] == (2 if goes_on else 0)
