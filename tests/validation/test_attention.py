"""The kernel that pictures are drawn with. SageAttention itself was never run here: a stand-in of its name and signature computes exactly."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from chroma_trainer.nodes import ALL_NODES
from chroma_trainer.nodes.validate_sampler import Inputs
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.models.attention_backends import attention_modules, set_attention_
from chroma_trainer.trainer_core.models.mmdit_layers import attend
from chroma_trainer.trainer_core.quant import packages
from chroma_trainer.trainer_core.train import prepare
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.validation import attention
from chroma_trainer.trainer_core.validation.render import Renderer, draw
from safetensors.torch import load_file

from tests.narrowing import present
from tests.workshop import EVALUATED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = ValidationConfig(prompts="cat", resolutions="32x32", steps=2, cfg=2.0, attention="sage")
STAND_IN = """
import torch

calls = []  # whether gradients were on, one a call
factor = 1.0


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "HND" and not is_causal and sm_scale is None
    calls.append(torch.is_grad_enabled())
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return factor * (weights @ v)
"""


@pytest.fixture
def sage(tmp_path, monkeypatch):
    """A distribution as pip would have installed it, and its module."""
    (tmp_path / "sageattention.py").write_text(STAND_IN, encoding="utf-8")
    info = tmp_path / "sageattention-2.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 2.2.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    yield importlib.import_module("sageattention")
    sys.modules.pop("sageattention", None)


@pytest.fixture
def anywhere(monkeypatch):
    """The device is not asked for: the stand-in computes on a CPU as well."""
    monkeypatch.setattr(attention, "sage_fault", lambda device, dtype, width=128: "")


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: "")


def studio_of(workshop, settings: ValidationConfig | None = SETTINGS) -> Renderer:
    with torch.no_grad():
        return Renderer(workshop.model, None, ["cat", ""], workshop.host(), settings)


@pytest.mark.slow
def test_it_draws_and_goes(workshop, sage, anywhere):
    studio = studio_of(workshop)
    modules = attention_modules(studio.transformer)
    set_attention_(studio.transformer, "math")
    before = [module.attend for module in modules]
    with torch.no_grad():
        plain = studio.draw(replace(SETTINGS, attention="same"), 0.0, lambda: None)
        assert sage.calls == []
        drawn = studio.draw(SETTINGS, 0.0, lambda: None)
    assert sage.calls == [False] * len(modules) * 2 * 2  # attentions, prompts of CFG, steps
    assert [module.attend for module in modules] == before
    (one,), (other,) = plain[32, 32], drawn[32, 32]
    assert abs(one.astype(int) - other).max() <= 1  # of 255 levels


def test_native_is_torchs_own_whatever_trains(workshop):
    studio = studio_of(workshop, None)
    (module, *_) = attention_modules(studio.transformer)
    set_attention_(studio.transformer, "math")
    trained = module.attend
    with attention.use_attention(studio.transformer, "native"):
        assert module.attend is attend
    assert module.attend is trained


def test_a_cancel_leaves_the_model_as_it_was(workshop, sage, anywhere):
    studio = studio_of(workshop)
    before = [module.attend for module in attention_modules(studio.transformer)]

    def cancel():
        raise Cancelled

    object.__setattr__(studio.host, "check_cancelled", cancel)
    with pytest.raises(Cancelled), torch.no_grad():
        studio.draw(SETTINGS, 0.0, lambda: None)
    assert sage.calls and [module.attend for module in attention_modules(studio.transformer)] == before


def test_gradients_never_pass_it(sage):
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(AssertionError, match="use it only for sampling"):
        attention.attend_by_sage(query, query, query, None)
    assert sage.calls == []


def test_a_mask_is_left_to_torch(sage):
    query = torch.randn(2, 1, 4, 8)
    mask = torch.tensor([[True, True, True, False], [True] * 4])[:, None, None]
    with torch.no_grad():
        assert torch.equal(attention.attend_by_sage(query, query, query, mask), attend(query, query, query, mask))
    assert sage.calls == []


def test_a_run_draws_with_it_and_learns_without(workshop, sage, anywhere):
    """The LoRA is that of a run that draws as it trains, under the same name: what draws is no part of it."""
    loras = []
    for settings in (SETTINGS, replace(SETTINGS, attention="same")):
        request: TrainRequest = workshop.request(
            settings, steps=2, validate_every=1, gradient_checkpointing=True, **EVALUATED
        )
        host = workshop.host()
        run(request, host)
        loras.append((host.run_folder.name, host.lora.read_bytes(), load_file(host.lora)))
        assert sage.calls and not any(sage.calls)
    assert loras[0][0] == loras[1][0]
    assert all(torch.equal(value, loras[1][2][key]) for key, value in loras[0][2].items())
    assert b"sage" in loras[0][1] and b"sage" not in loras[1][1]  # the record says how its pictures were drawn


def test_a_missing_package_is_named_before_a_model_loads(workshop, missing):
    for refuse in (
        lambda: studio_of(workshop),
        lambda: prepare.plan_run(workshop.request(SETTINGS), workshop.host()),
        lambda: draw(SETTINGS, workshop.model, None, workshop.host()),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        (problem,) = caught.value.problems
        assert problem.field == "attention" and '"chroma-trainer[sage]"' in problem.message
    preflight = present(ALL_NODES["ValidateSampler"].preflight)
    (problem,) = preflight(Inputs(prompts="cat", attention="sage"), workshop.host())
    assert problem.field == "attention"


def test_a_cpu_is_refused(sage):
    (problem,) = attention.drawing_problems(SETTINGS, CPU, torch.bfloat16)
    assert problem.field == "attention" and "needs a CUDA device; this run's is cpu" in problem.message
    assert attention.drawing_problems(replace(SETTINGS, attention="same"), CPU, torch.bfloat16) == []


def test_a_kernel_is_tried_with_the_models_width_and_dtype(sage, monkeypatch):
    assert attention.try_kernel(CPU, torch.bfloat16, 128) == ""
    sage.factor = 0.0
    assert attention.try_kernel(CPU, torch.bfloat16, 128) == "is inaccurate on cpu in bfloat16: the relative error is 1"
    sage.factor = float("nan")
    assert "error is nan" in attention.try_kernel(CPU, torch.bfloat16, 128)

    def broken(q, k, v, **keywords):
        assert (q.dtype, q.shape[-1]) == (torch.bfloat16, 128)
        raise FileNotFoundError("no compiler\nstack")

    monkeypatch.setattr(sage, "sageattn", broken)
    assert attention.try_kernel(CPU, torch.bfloat16, 128) == "does not run on cpu in bfloat16 (no compiler)"
