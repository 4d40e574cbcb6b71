"""What a machine can't do is refused before a model loads, by field, with what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.quant import packages
from chroma_trainer.trainer_core.quant.loading import quantization_problems
from chroma_trainer.trainer_core.quant.native import Fp8Native
from chroma_trainer.trainer_core.registry import names

CPU = torch.device("cpu")


@pytest.mark.parametrize("level", [level for level in names("quantization") if level.endswith(("bnb", "torchao"))])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, level):
    monkeypatch.setattr(packages, "version_of", lambda package: "")
    problems = quantization_problems(QuantizationConfig(level, text_encoder=level), CPU)
    assert [problem.field for problem in problems] == ["level", "text_encoder"]
    extra = level.rpartition("-")[2]
    assert all(f"pip install {packages.EXTRAS[extra]}" in p.message and f"[{extra}]" in p.message for p in problems)


def test_levels_that_need_no_package_never_miss_one(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: "")
    own = [level for level in names("quantization") if not level.endswith(("bnb", "torchao", "quanto"))]
    assert len(own) == 2 and not [level for level in own if quantization_problems(QuantizationConfig(level), CPU)]


def test_a_missing_dependency_is_named_without_an_extra(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: "")
    (problem,) = quantization_problems(QuantizationConfig("int8-quanto"), CPU)
    assert problem.message == "int8-quanto: optimum-quanto is not installed; run pip install optimum-quanto"


def test_a_device_without_the_kernel_is_named(monkeypatch):
    def no_kernel(self, stored, shape, dtype):
        raise NotImplementedError("'mul' is not there for this device\nstack trace")

    monkeypatch.setattr(Fp8Native, "decode", no_kernel)
    (problem,) = quantization_problems(QuantizationConfig("fp8-native"), CPU)
    assert problem.field == "level" and "'mul' is not there" in problem.message
    assert "fp8-native can't run on cpu" in problem.message and "stack" not in problem.message


def test_a_run_says_so_before_it_loads(workshop_free_model, monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: "")
    from chroma_trainer.trainer_core.validation.render import Renderer

    host, model = workshop_free_model
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        Renderer(replace(model, quantization=QuantizationConfig("nf4-bnb")), None, ["x"], host)


@pytest.fixture
def workshop_free_model(tiny_model, tmp_path):
    from chroma_trainer.trainer_core.host import Paths, SinkHost

    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path), sinks=(), device="cpu"), tiny_model
