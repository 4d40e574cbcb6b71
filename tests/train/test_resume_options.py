"""Exact resume for every option the engine has: continued from step 3, or never interrupted, the bytes are the same.

The cases come from the registry and from the choices of the configs, so that a new part is held to it on arrival.
"""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any

import pytest
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.registry import PARTS
from chroma_trainer.trainer_core.spec import fields_of
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file

from tests.workshop import EVALUATED

NEEDS = {"loftq": {"level": "int8-quanto"}}  # inits that need a quantised base


def choices(config: type, name: str) -> tuple[str, ...]:
    """What a field may be, from its own annotation."""
    (found,) = (field for field in fields_of(config) if field.name == name)
    return tuple(found.choice.options) if found.choice else ()


# Settings without which a kind is refused.
NEEDED_BY = {"full": {"training": {"rank": 16, "alpha": 16.0, "max_grad_norm": 0.0}}}
QUICK = ("everything random",)  # `make quick` runs this case alone


def cases() -> list[Any]:
    found: dict[str, dict[str, dict[str, Any]]] = {
        "everything random": {"training": {
            "batch_size": 1, "accumulation": 2, "caption_dropout": 0.5, "init": "gaussian", "gradient_checkpointing": True,
            **EVALUATED,
        }},
        "random crop": {"dataset": {"crop_style": "random", "resolution": 16.0}},
        "held out": {"training": {"holdout": 0.25}},
    }  # fmt: skip
    names = [choices(TrainingConfig, name) for name in ("lr_schedule", "sigma_density", "init")]
    for schedule, density, init in zip_longest(*names):  # each once; they do not depend on each other
        values: dict[str, Any] = {"lr_schedule": schedule or "constant", "warmup_steps": 2 if schedule else 0}
        values |= {"sigma_density": density} if density else {}
        values |= {"init": init} if init else {}
        name = ", ".join(filter(None, (schedule, density, init)))
        found[f"training {name}"] = {"training": values, "model": NEEDS.get(init, {})}
    for name in choices(AdapterConfig, "kind"):
        found[f"adapter {name}"] = {"adapter": {"kind": name}, **NEEDED_BY.get(name, {})}
    for name in PARTS["optimizer"]:
        found[f"optimizer {name}"] = {"optimizer": {"optimizer": name}}
    for name in PARTS["quantization"]:
        found[f"quantization {name}"] = {"model": {"level": name}}
    adapter = {field.name for field in fields(AdapterConfig)}
    for name, value in (("ema_decay", 0.9), ("dropout", 0.3)):
        if name in adapter:
            found[f"adapter's {name}"] = {"adapter": {name: value}}
    return [
        pytest.param(values, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, values in found.items()
    ]


def request_of(workshop, values: dict[str, dict[str, Any]]) -> TrainRequest:
    request = workshop.request(**{"checkpoint_every": 3, **values.get("training", {})})
    if "dataset" in values:
        part: FolderConfig = replace(request.dataset.parts[0], **values["dataset"])
        request = replace(request, dataset=replace(request.dataset, parts=(part,)))
    if values.get("model"):
        request = replace(request, model=replace(request.model, quantization=QuantizationConfig(**values["model"])))
    return replace(
        request,
        adapter=AdapterConfig(**values.get("adapter", {})),
        optimizer=OptimizerConfig(**values.get("optimizer", {})),
    )


@pytest.mark.parametrize("values", cases())
def test_a_resumed_run_is_an_uninterrupted_one(workshop, values):
    request = request_of(workshop, values)
    whole_host = workshop.host()
    try:
        whole = run(request, whole_host)
    except UserError as error:
        if any(word in str(error) for word in ("not installed", "pip install", "needs CUDA", "needs an NVIDIA")):
            pytest.skip(f"NOT TESTED here: {error}")
        raise
    host = workshop.host()
    shutil.copytree(whole_host.paths.output / "chroma_trainer", host.paths.output / "chroma_trainer")
    shutil.rmtree(host.run_folder / "checkpoints" / "step-000006")  # as after a crash; cancels are in test_run.py
    result = run(request, host)
    assert result.report["resumed_from"] == 3
    assert result.losses == whole.losses and result.lora.sha256 == whole.lora.sha256
    one, two = (h.run_folder / "checkpoints" / "step-000006" for h in (whole_host, host))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    # The option does something: the optimiser moved the weights.
    assert any(tensor.abs().max() > 0 for tensor in load_file(one / "adapter.safetensors").values())
