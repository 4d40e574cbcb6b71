"""Every optimiser of the registry: it lowers a loss, goes on from a checkpoint to the same bits, and refuses clearly."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import adapter_state, inject_, trainable_parameters
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.training import LR_SCHEDULES, TrainingConfig
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.optim.optimizer import effective_rate, evaluating, set_rate_
from chroma_trainer.trainer_core.planner.meta_counter import bytes_of
from chroma_trainer.trainer_core.planner.optimizer_cost import count_optimizer_cost, optimizer_of
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.setup.hints import describe_hints
from chroma_trainer.trainer_core.spec import fields_of
from chroma_trainer.trainer_core.train.hooks.checkpoint import newest_intact, restore_, save_checkpoint, weights_of
from torch import nn

SWITCHES = {"prodigy_bias_correction": True, "prodigy_safeguard_warmup": True}
# (name, settings, learning rate at which the small problems below are solved)
CASES = {
    "adamw": ("adamw", {}, 0.02),
    "adamw_bf16": ("adamw_bf16", {}, 0.02),
    "adamw_bf16 kahan": ("adamw_bf16", {"kahan": True}, 0.02),
    "optimi-lion": ("optimi-lion", {}, 0.005),
    "optimi-stableadamw": ("optimi-stableadamw", {}, 0.02),
    "bnb-adamw8bit": ("bnb-adamw8bit", {}, 0.02),
    "bnb-lion8bit-paged": ("bnb-lion8bit-paged", {}, 0.005),
    "bnb-ademamix8bit": ("bnb-ademamix8bit", {}, 0.01),
    "prodigy": ("prodigy", {"prodigy_d0": 1e-4}, 1.0),
    "prodigy recommended": ("prodigy", {"prodigy_d0": 1e-2, "prodigy_d_coef": 10.0, **SWITCHES}, 1.0),
    "schedulefree-adamw": ("schedulefree-adamw", {}, 0.02),
    "adafactor": ("adafactor", {}, 0.02),
    "adafactor momentum": ("adafactor", {"beta1": 0.9}, 0.02),
    "adafactor scaled": ("adafactor", {"adafactor_scale_parameter": True}, 0.2),
    "came": ("came", {}, 0.0005),
}


@pytest.fixture(params=CASES)
def case(request):
    name, settings, rate = CASES[request.param]
    part = load("optimizer", name)
    if part.missing("cpu"):
        pytest.skip(f"{name}: {part.missing('cpu')}")
    return SimpleNamespace(name=name, part=part, config=OptimizerConfig(optimizer=name, **settings), rate=rate)


def build(case, params, decay=0.0, seed=3):
    return case.part.build(params, case.config, case.rate, decay, seed)


def test_every_name_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(names("optimizer"))


def test_it_finds_the_bottom_of_a_bowl(case):
    """|w - target|^2 in 70 x 64 and in 3 dimensions; 400 steps, the last half at a falling rate."""
    generator = torch.Generator().manual_seed(0)
    targets = [0.3 * torch.randn(70, 64, generator=generator), 0.3 * torch.randn(3, generator=generator)]
    params = [nn.Parameter(torch.zeros_like(target)) for target in targets]
    optimizer = build(case, params)

    def distance() -> torch.Tensor:
        return torch.stack([(p.float() - t).square().sum() for p, t in zip(params, targets, strict=True)]).sum()

    before = distance().item()
    for step in range(400):
        set_rate_(optimizer, case.rate * min(1.0, (400 - step) / 200))
        distance().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with evaluating(optimizer):
        after = distance().item()
    assert after < 0.05 * before, (before, after)


def test_the_plan_counts_its_states(case):
    """As many bytes as a real step leaves, and what learns in the same precision. Two in a hundred: tables of 8-bit codes are shared."""
    asked: Any = SimpleNamespace(optimizer=case.config, training=TrainingConfig(), adapter=AdapterConfig())
    adapters = {}
    for device in ("cpu", "meta"):
        model = (
            nn.ModuleDict({"wide": nn.Linear(8192, 64), "narrow": nn.Linear(64, 3)}).to(device).requires_grad_(False)
        )
        adapters[device] = inject_(model, ["wide", "narrow"], 16, 16.0)
    counted = count_optimizer_cost(
        optimizer_of(adapters["meta"], {"wide": 1.0, "narrow": 0.5}, asked), adapters["meta"], asked
    )
    parameters = [parameter for _, parameter in trainable_parameters(adapters["cpu"])]
    optimizer = build(case, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert counted.states == pytest.approx(bytes_of(*states), rel=0.02)
    assert counted.adapter == bytes_of(*parameters)
    assert counted.step_peak >= counted.adapter


class Net(nn.Module):
    """A small frozen net; with rank 16 its matrices of 512 x 16 are large enough for 8-bit states (4096 numbers)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.one, self.two = nn.Linear(512, 320), nn.Linear(320, 3)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) / math.sqrt(param.shape[-1])

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def new_run(case, groups=False, seed=3) -> Any:
    """What a checkpoint needs of a Run, as a stand-in: a small LoRA and its optimiser."""
    model = Net().requires_grad_(False)
    layers = inject_(model, ["one", "two"], 16, 16.0, "default", torch.Generator().manual_seed(1))
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    params = (
        [{"params": parameters[:2], "lr_scale": 0.5}, {"params": parameters[2:], "name": "rest"}]
        if groups
        else parameters
    )
    return SimpleNamespace(
        is_consistent=True,
        transformer=model, layers=layers, parameters=parameters, optimizer=build(case, params, 0.01, seed), ema=None, step=0, is_full=False,
        num_steps=100, losses=[], loss_scale=None, learning_rates=[], eval_losses={}, evaluations={}, leaks={}, leak_meter=None, judge=None, stop_reason="",
        sharding=None, steps_before=0, config=TrainingConfig(),
    )  # fmt: skip


def loss_of(run, step: int):
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(step))
    target = torch.stack([x[:, :8].mean(-1), x[:, 8:16].mean(-1), x[:, 16]], dim=-1)
    return (run.transformer(x) - target).square().mean()


def train(run, case, num_steps: int):
    for _ in range(num_steps):
        set_rate_(run.optimizer, case.rate * (1 - run.step / 200))
        loss = loss_of(run, run.step)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.losses.append(loss.item())
        run.learning_rates.append(effective_rate(run.optimizer, case.rate))
    return run


def weights(run) -> dict[str, torch.Tensor]:
    return adapter_state(run.layers)


def same(one, two) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one.values(), two.values(), strict=True))


@pytest.fixture
def host(tmp_path):
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path), sinks=())


def test_a_small_net_learns(case):
    run = train(new_run(case), case, 80)
    with torch.no_grad(), evaluating(run.optimizer):
        after = sum(loss_of(run, 1000 + i).item() for i in range(8)) / 8
    fresh = new_run(case)
    before = sum(loss_of(fresh, 1000 + i).item() for i in range(8)) / 8
    assert after < 0.8 * before, (before, after)


@pytest.mark.parametrize("groups", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one group", "two groups"])
def test_going_on_from_a_checkpoint_is_going_on_to_the_bit(case, host, tmp_path, groups):
    straight = train(new_run(case, groups), case, 11)
    run = train(new_run(case, groups), case, 4)
    path = save_checkpoint(tmp_path, run, host)
    assert newest_intact(tmp_path, host, 100) == path
    resumed = new_run(case, groups)
    restore_(resumed, path)
    assert same(weights(resumed), weights(run)) and same_state(resumed.optimizer, run.optimizer)
    train(resumed, case, 7)
    assert resumed.losses == straight.losses and resumed.learning_rates == straight.learning_rates
    assert same(weights(resumed), weights(straight)) and same_state(resumed.optimizer, straight.optimizer)
    with evaluating(resumed.optimizer):
        exported = weights(resumed)
    with evaluating(straight.optimizer):
        assert same(exported, weights(straight))


def same_state(one, two) -> bool:
    a, b = one.state_dict()["state"], two.state_dict()["state"]
    return a.keys() == b.keys() and all(
        a[i].keys() == b[i].keys() and all(equal(a[i][name], b[i][name]) for name in a[i]) for i in a
    )


def equal(a, b) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)


def test_the_weights_of_an_earlier_checkpoint_for_a_while(case, host, tmp_path):
    run = train(new_run(case), case, 3)
    with evaluating(run.optimizer):
        early = weights(run)
    path = save_checkpoint(tmp_path, run, host)
    train(run, case, 3)
    late = weights(run)
    with weights_of(run, path):
        assert same(weights(run), early) and not same(early, late)
    assert same(weights(run), late)
    assert same(weights(train(run, case, 2)), weights(train(new_run(case), case, 8)))


def test_looking_at_the_weights_changes_nothing(case):
    looked, other = new_run(case), new_run(case)
    for _ in range(3):
        train(looked, case, 2)
        before = weights(looked)
        with pytest.raises(KeyError), evaluating(looked.optimizer), evaluating(looked.optimizer):
            raise KeyError
        assert same(weights(looked), before)
    assert same(weights(looked), weights(train(other, case, 6)))


def test_the_number_of_threads_changes_no_bit_where_that_is_said(case):
    if not case.part.elementwise:
        pytest.skip(f"{case.name} sums over weights, and does not say so")
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (70_003, 7, 32_771)]
            optimizer = build(case, params, 0.01)
            for _ in range(4):
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                optimizer.step()
            found.append([param.detach().clone() for param in params])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gradient_that_is_missing_or_zero(case):
    params = [nn.Parameter(torch.ones(64, 80)), nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 3))]
    optimizer = build(case, params)
    for step in range(3):
        params[0].grad = None if step < 2 else torch.ones_like(params[0])
        params[1].grad = torch.ones_like(params[1])
        params[2].grad = torch.zeros_like(params[2])
        optimizer.step()
        assert torch.equal(params[0].float(), torch.ones(64, 80)) == (step < 2)
    assert all(param.isfinite().all() for param in params)
    assert not torch.equal(params[1].float(), torch.ones(5)) and torch.equal(params[2].float(), torch.ones(2, 3))
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # nothing at all


def test_a_group_of_scale_0_stays(case):
    params = [nn.Parameter(torch.ones(64, 80)), nn.Parameter(torch.ones(64, 80))]
    optimizer = build(case, [{"params": params[:1], "lr_scale": 0.0}, {"params": params[1:]}], 0.01)
    for _ in range(3):
        set_rate_(optimizer, case.rate)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(params[0].float(), torch.ones(64, 80)) and not torch.equal(params[1].float(), torch.ones(64, 80))


def test_the_run_decides_what_is_drawn_and_nothing_else_is(case):
    runs = [new_run(case, seed=seed) for seed in (3, 3, 4)]
    before = torch.get_rng_state()
    one, again, other = (weights(train(run, case, 3)) for run in runs)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, again) and same(one, other) == (case.name != "adamw_bf16")


def test_each_used_field_changes_the_weights(case):
    settings = {"beta1": 0.8, "beta2": 0.9, "beta3": 0.95, "eps": 0.01, "kahan": not case.config.kahan, "prodigy_d0": 2e-4,
                "prodigy_d_coef": 0.5, "prodigy_growth": 1.5, "ademamix_alpha": 1.0,
                "adafactor_scale_parameter": not case.config.adafactor_scale_parameter,
                **{name: not getattr(case.config, name) for name in SWITCHES}}  # fmt: skip
    assert case.part.uses <= settings.keys()

    def moved(config):
        param = nn.Parameter(torch.zeros(70, 64))  # large enough for 8-bit states
        target = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
        optimizer = case.part.build(
            [param], config, 0.9 * case.rate, 0.01, 0
        )  # at 1 Prodigy's safeguard changes nothing
        for _ in range(8):
            (param - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return param.detach()

    plain = moved(case.config)
    for name, value in settings.items():
        changed = moved(replace(case.config, **{name: value}))
        assert torch.equal(plain, changed) == (name not in case.part.uses), name


def test_the_docs_say_who_uses_a_field():
    parts = {name: load("optimizer", name) for name in names("optimizer")}
    for field in fields_of(OptimizerConfig):
        users = [name for name, part in parts.items() if field.name in part.uses]
        others = [name for name in parts if name not in users]
        if field.name not in ("optimizer", "clip_by") and not field.name.startswith("lr_"):
            ends = (
                f"Used by: {', '.join(users)}.",
                f"Not used by: {', '.join(others)}.",
                "Used by all." if not others else "-",
            )
            assert field.doc.endswith(ends), (field.name, ends)
        if field.name.startswith("lr_"):
            users = [name for name, schedule in LR_SCHEDULES.items() if field.name in schedule.uses]
            assert field.doc.endswith(
                (f"Used by the schedule: {', '.join(users)}.", "Used by all schedules that fall.")
            )


def test_what_has_no_effect_is_told():
    part = load("optimizer", "optimi-lion")
    config = OptimizerConfig(optimizer="optimi-lion", kahan=True, beta1=0.8, lr_power=3.0, lr_min_ratio=0.1)
    told = describe_hints(TrainingConfig(lr_schedule="cosine"), config, part)
    assert told == [
        "OptimizerSettings.kahan is True, but optimi-lion does not use it: it has no effect",
        "OptimizerSettings.lr_power is 3.0, but the schedule cosine does not use it: it has no effect",
    ]
    for name in names("optimizer"):
        part, usual = load("optimizer", name), TrainingConfig(learning_rate=load("optimizer", name).usual_rates[0])
        config = replace(OptimizerConfig(optimizer=name), **(SWITCHES if name == "prodigy" else {}))
        assert describe_hints(usual, config, part) == []
        far = describe_hints(replace(usual, learning_rate=part.usual_rates[0] / 100), config, part)
        assert len(far) == 1 and "is usual, see docs/optimizers.md" in far[0]


def test_an_update_that_rounding_starts_beside_0_is_told():
    training = TrainingConfig(init="orthogonal")
    told = [
        line
        for name in ("adamw", "adamw_bf16")
        for line in describe_hints(training, OptimizerConfig(optimizer=name), load("optimizer", name))
    ]
    assert len(told) == 1 and told[0].startswith("init orthogonal with adamw_bf16") and told[0].endswith("another init")


def test_prodigy_asks_for_what_its_authors_recommend():
    def hints(training, **switches):
        return describe_hints(training, OptimizerConfig(optimizer="prodigy", **switches), load("optimizer", "prodigy"))

    warm, flat = (TrainingConfig(learning_rate=1.0, lr_schedule="constant", warmup_steps=n) for n in (20, 0))
    bias, safe = hints(warm)
    assert bias.startswith("prodigy without prodigy_bias_correction: the first 1,000 steps are up to 6 times as long")
    assert safe.startswith("warmup_steps is 20, and prodigy without prodigy_safeguard_warmup: steps with a low rate")
    assert hints(flat) == [bias] and hints(flat, prodigy_bias_correction=True) == []
    (restarts,) = hints(replace(flat, lr_schedule="cosine_with_restarts"), prodigy_bias_correction=True)
    assert restarts.startswith("lr_schedule is cosine_with_restarts, and prodigy without")


def test_an_average_wants_no_falling_rate():
    part, config = load("optimizer", "schedulefree-adamw"), OptimizerConfig(optimizer="schedulefree-adamw")
    (told,) = describe_hints(TrainingConfig(lr_schedule="cosine"), config, part)
    assert told.startswith(
        "lr_schedule is cosine, but schedulefree-adamw averages its weights instead of lowering the rate"
    )


@pytest.mark.parametrize("name", ["bnb-adamw8bit", "bnb-lion8bit-paged", "bnb-ademamix8bit"])
def test_what_is_missing_is_said(monkeypatch, name):
    from chroma_trainer.trainer_core.optim import bnb

    part = load("optimizer", name)
    monkeypatch.setattr(bnb.importlib.util, "find_spec", lambda _: None)
    assert part.extra == "bnb" and part.missing("cuda").startswith(
        "bitsandbytes is not installed; pip install 'chroma-trainer[bnb]' (or pip install bitsandbytes), or choose adamw_bf16"
    )
    monkeypatch.setattr(bnb.importlib.util, "find_spec", lambda _: object())
    for version, device, runs in [
        ("0.45.3", "cuda", True),
        ("0.49.1", "cpu", False),
        ("0.50.2", "cpu", True),
        ("0.50.2", "mps", False),
    ]:
        monkeypatch.setattr(bnb, "version", lambda _, version=version: version)
        assert (part.missing(device) == "") == runs, (version, device)
    assert "bitsandbytes 0.50.2 has no 8-bit optimizers for the device 'mps'" in part.missing("mps")


def test_defaults_are_those_of_no_settings():
    assert all(field.default == getattr(OptimizerConfig(), field.name) for field in fields(OptimizerConfig))
