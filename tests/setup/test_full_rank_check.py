"""What kind full can't be combined with is refused by name and with the reason, before anything is loaded."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import ELEMENTWISE, TOGETHER, OptimizerConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.full_rank import sharding
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.setup.preflight import problems_of, sharding_problems

SOUND = {"rank": 16, "alpha": 16.0, "max_grad_norm": 0.0, "learning_rate": 1e-5}


def problems(
    workshop,
    kind="full",
    training=None,
    adapter=None,
    optimizer=None,
    model=None,
    memory=None,
    validation=None,
    part=None,
):
    request = workshop.request(validation, **{**SOUND, **(training or {})})
    dataset = request.dataset
    if part:
        dataset = replace(dataset, parts=tuple(replace(one, **part) for one in dataset.parts))
    request = replace(
        request, dataset=dataset, model=replace(request.model, **{"dtype": "bf16", **(model or {})}),
        adapter=AdapterConfig(kind=kind, **(adapter or {})),
        optimizer=OptimizerConfig(**{"optimizer": "adafactor", **(optimizer or {})}),
        memory=MemoryConfig(**(memory or {})),
    )  # fmt: skip
    return {problem.field: problem.message for problem in problems_of(request, workshop.host())}


REFUSED = {
    "rank": ({"training": {"rank": 32, "alpha": 32.0}}, "no adapter, and so no rank"),
    "alpha": ({"training": {"alpha": 4.0}}, "no adapter that could be scaled; use 16.0"),
    "init": ({"training": {"init": "eva"}}, "starts from the model's weights"),
    "accumulation": ({"training": {"accumulation": 2}}, "can't be added; use 1, and a larger batch_size"),
    "max_grad_norm": ({"training": {"max_grad_norm": 1.0}}, "set clip_by in OptimizerSettings to 'step before'"),
    "skip_bad_steps": ({"training": {"skip_bad_steps": 1}}, "can't be undone"),
    "preservation": ({"training": {"preservation": 0.5}}, "of which no copy is in memory"),
    "devices": ({"training": {"devices": "cpu:2"}}, "set accumulation to 2, or use 1 devices"),
    "prior_preservation": ({"part": {"prior_preservation": True}}, "of which no copy is in memory"),
    "lora_strength": ({"validation": ValidationConfig(lora_strength="0.5, 1")}, "so strength 1 is all there is; use 1.0"),
    "format": ({"adapter": {"format": "kohya"}}, "always saved under its original names"),
    "init_lora": ({"adapter": {"init_lora": "/a.safetensors"}}, "merge it into the model"),
    "dropout": ({"adapter": {"dropout": 0.1}}, "input could be dropped; use 0.0"),
    "precision": ({"adapter": {"precision": "bf16"}}, "always saved in bf16"),
    "eva_batches": ({"adapter": {"eva_batches": 9}}, "initialized from data"),
    "level": ({"model": {"quantization": QuantizationConfig("int8-quanto")}}, "quantized weights can't be trained"),
    "dtype": ({"model": {"dtype": "fp16"}}, "fp16 weights lose the small steps"),
    "offload_to_disk": ({"memory": {"group_offload": "block", "offload_to_disk": True}}, "the disk can only be read"),
    "optimizer": ({"optimizer": {"optimizer": "prodigy"}}, "estimates one learning rate from all weights together"),
    "model.gguf": ({"model": {"transformer_file": "/models/model.gguf"}}, "is stored in GGUF blocks"),
}  # fmt: skip


def test_a_sound_request_has_no_problem(workshop):
    assert problems(workshop) == {}
    assert problems(workshop, training={"alpha": 0.0}) == {}  # as the rank
    clipped = {"training": {"max_grad_norm": 1.0}, "optimizer": {"clip_by": "step before"}}
    assert problems(workshop, **clipped) == {}
    assert problems(workshop, memory={"group_offload": "leaf"}) == problems(workshop, memory={"compile": True}) == {}
    assert problems(workshop, training={"devices": "cpu:2", "accumulation": 2}) == {}
    assert problems(workshop, training={"devices": "cpu:1"}) == {}  # one device, in a process of its own


@pytest.mark.parametrize("field", REFUSED)
def test_it_is_refused_by_name(workshop, field):
    changed, reason = REFUSED[field]
    (message,) = [text for name, text in problems(workshop, **changed).items() if name == field]
    assert reason in message


def test_all_are_reported_together(workshop):
    training = {"accumulation": 2, "max_grad_norm": 1.0, "preservation": 1.0, "rank": 4, "alpha": 4.0}
    assert problems(workshop, training=training).keys() == {"rank", "accumulation", "max_grad_norm", "preservation"}


@pytest.mark.parametrize("name", TOGETHER)
def test_an_optimizer_that_reads_all_weights(workshop, name):
    message = problems(workshop, optimizer={"optimizer": name})["optimizer"]
    assert TOGETHER[name] in message and "use adamw, adamw_bf16" in message and name in names("optimizer")


def test_weights_of_another_precision_than_the_model(workshop):
    message = problems(workshop, model={"dtype": "fp32"}, optimizer={"optimizer": "adamw_bf16"})["optimizer"]
    assert "set dtype to bf16, or use adamw" in message


def test_an_optimizer_that_moves_its_states_itself(workshop):
    found = problems(workshop, optimizer={"optimizer": "bnb-lion8bit-paged"}, memory={"group_offload": "block"})
    assert "moves its states by itself" in found["optimizer"]


def test_a_file_in_8_bits(workshop, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "fp8.safetensors"
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn), "b": torch.zeros(4)}, file)
    assert "is stored in F8_E4M3" in problems(workshop, model={"transformer_file": str(file)})["fp8.safetensors"]


def test_settings_that_only_it_has(workshop):
    message = problems(workshop, kind="lora", adapter={"extract_rank": 8})["extract_rank"]
    assert "kind lora trains a LoRA already" in message
    assert (
        "the norm of this step is known" in problems(workshop, "lora", optimizer={"clip_by": "step before"})["clip_by"]
    )
    assert problems(workshop, adapter={"extract_rank": 8}) == {}


SHARED = {"shard": "bf16", "accumulation": 4, "max_grad_norm": 1.0}
REFUSED_WHERE_SHARED = {
    "devices": ({"training": {"devices": "cpu:3"}}, "set accumulation to 6, or use 2 devices"),
    "shard": ({"model": {"dtype": "fp32"}}, "is bf16, and the model's dtype is fp32; use fp32"),
    "rollout_probability": ({"training": {"rollout_probability": 0.5}}, "only some batches have rollouts; use 0"),
    "activation_offload": ({"memory": {"activation_offload": True}}, "freed again block by block (shard); turn it off"),
    "model_offload": ({"memory": {"model_offload": True}}, "gathered and freed again"),
    "group_offload": ({"memory": {"group_offload": "leaf"}}, "use none, or block for weights and steps in RAM"),
    "offload_share": ({"memory": {"group_offload": "block", "offload_share": 0.5}}, "RAM holds all blocks or none; use 1"),
    "blocks_per_group": ({"memory": {"group_offload": "block", "blocks_per_group": 2}}, "use 1"),
    "skip_bad_steps": ({"training": {"skip_bad_steps": 1}}, "can't be undone"),
    "level": ({"model": {"quantization": QuantizationConfig("int8-quanto")}}, "quantized weights can't be trained"),
    "model.gguf": ({"model": {"transformer_file": "/models/model.gguf"}}, "is stored in GGUF blocks"),
    "offload_to_disk": ({"memory": {"group_offload": "block", "offload_to_disk": True}}, "the disk can only be read"),
    "offload_stream": ({"memory": {"group_offload": "block", "offload_stream": True}}, "freed again block by block"),
}  # fmt: skip


def shared(workshop, training=None, **settings):
    return problems(
        workshop, training={**SHARED, **(training or {})}, **{"optimizer": {"optimizer": "adamw"}, **settings}
    )


def test_weights_that_are_shared_out(workshop):
    """Each device may have several micro-batches, and the norm of this step is known."""
    for devices in ("", "cpu:1", "cpu:2", "cpu:4"):
        assert shared(workshop, {"devices": devices}) == {}
    assert shared(workshop, memory={"group_offload": "block"}) == {}
    assert shared(workshop, {"shard": "fp32"}) == {}
    assert (
        "stores weights in bf16"
        in shared(workshop, {"shard": "fp32"}, optimizer={"optimizer": "adamw_bf16"})["optimizer"]
    )
    assert "with kind lora each device holds the base" in problems(workshop, "lora", training=SHARED)["shard"]


@pytest.mark.parametrize("field", REFUSED_WHERE_SHARED)
def test_what_shared_weights_exclude(workshop, field):
    changed, reason = REFUSED_WHERE_SHARED[field]
    found = shared(workshop, **changed)
    assert reason in found.pop(field) and not found


def test_only_elementwise_optimizers_step_some_rows(workshop):
    assert {name for name in names("optimizer") if load("optimizer", name).elementwise} - set(TOGETHER) == set(
        ELEMENTWISE
    )
    for name in set(names("optimizer")) - set(ELEMENTWISE):
        message = shared(workshop, optimizer={"optimizer": name})["optimizer"]
        assert message.startswith(name) and message.endswith("use adamw, adamw_bf16, optimi-lion, or shard off")


def test_a_torch_that_can_not_share_out_weights(workshop, monkeypatch):
    request = workshop.request(**SHARED)
    assert sharding_problems(request) == []
    monkeypatch.setattr(sharding, "NEEDED", (*sharding.NEEDED, "set_more"))
    (problem,) = sharding_problems(request)
    assert problem.message.startswith(f"torch {torch.__version__} lacks set_more of FSDPModule; ")
    assert "install a newer torch (2.13 is tested), or use off" in problem.message


@pytest.mark.parametrize(
    "name", ["torch.distributed.fsdp", "torch.distributed.device_mesh", "torch.distributed.tensor"]
)
def test_a_torch_without_a_module_that_shares_need(workshop, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    (problem,) = sharding_problems(workshop.request(**SHARED))
    assert problem.message.startswith(f"torch {torch.__version__} has no {name} (") and problem.field == "shard"


def test_a_torch_that_needs_no_shares(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    assert sharding_problems(workshop.request()) == []
