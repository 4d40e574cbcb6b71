"""LoRATrainer with kind full, and what the nodes after it do with a whole model in place of a LoRA."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.nodes import CATALOGUE, lora_trainer, publish_lora, validate_sampler
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.validation import render
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from chroma_trainer.trainer_core.workflow.read import graph_from_json
from safetensors.torch import load_file


def inputs_of(workshop, **adapter):
    request = workshop.request(
        rank=16, alpha=16.0, max_grad_norm=0.0, learning_rate=0.01, steps=2, checkpoint_every=0, eval_images=0
    )
    settings = {field.name: getattr(request.training, field.name) for field in fields(TrainingConfig)}
    return lora_trainer.Inputs(
        model=replace(request.model, dtype="bf16"), dataset=request.dataset,
        adapter=AdapterConfig(kind="full", **adapter), optimizer=OptimizerConfig(optimizer="adafactor"), **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(workshop):
    host = workshop.host()
    return host, lora_trainer.run(inputs_of(workshop, extract_rank=16), host)


def test_the_outputs_are_a_model_and_a_lora_of_the_difference(trained):
    host, (model, weights, losses, name) = trained
    assert model.is_model and name == "tiny.safetensors" and len(losses["loss"]) == 2
    lora = load_file(host.paths.output / "loras" / "tiny.safetensors")
    assert weights.keys() == lora.keys() and any(key.endswith("lora_A.weight") for key in lora)
    assert max(min(tensor.shape) for key, tensor in lora.items() if "lora_A" in key) <= 16
    (text,) = [text for text in host.told() if text.startswith("extracted")]
    assert "relative error 0." in text
    # Layers that were not trained differ from the base, which is in fp32, by their rounding: that is no difference.
    assert not any("x_embedder" in key or "context_embedder" in key for key in lora)


@pytest.mark.slow
def test_without_extract_rank_the_output_lora_model_is_empty_and_the_log_says_so(workshop):
    host = workshop.host()
    _, weights, _, _ = lora_trainer.run(inputs_of(workshop), host)
    assert weights == {} and any("the output lora_model is empty; set extract_rank" in text for text in host.told())
    assert not (host.paths.output / "loras").exists()


def test_the_records_in_the_file_can_be_inspected(trained):
    _, (model, *_) = trained
    facts = describe(Path(model.path))
    assert facts["step"] == 2 and facts["request"]["adapter"]["kind"] == "full"
    assert "kind      chroma, all weights" in facts.text()


def test_the_sampler_draws_the_base_and_the_trained_model(trained, monkeypatch):
    host, (model, *_) = trained
    inputs = {"prompts": "a cat", "steps": 2, "cfg": 1.0, "resolutions": "32x32", "lora": model}
    loaded = []
    original = render.load_base
    monkeypatch.setattr(
        render, "load_base", lambda f, m, *rest, **k: (loaded.append(m.transformer_file), original(f, m, *rest, **k))[1]
    )
    _, _, pictures, labels = validate_sampler.run(validate_sampler.Inputs(**inputs), host)
    assert [label.split(",")[0] for label in labels] == ["base", "trained"] and loaded == ["", model.path]
    assert not torch.equal(*pictures)


def test_what_a_whole_model_does_not_have(trained):
    host, (model, *_) = trained
    settings = {"prompts": "a cat", "resolutions": "32x32", "lora": model}
    with pytest.raises(UserError, match=r"(?s)lora_strength: is 0.5, but tiny.safetensors is a whole.*checkpoints: "):
        validate_sampler.run(validate_sampler.Inputs(**settings, lora_strength="0.5", checkpoints="all"), host)
    with pytest.raises(UserError, match=r"is a whole model, .* upload the file with hf upload"):
        publish_lora.run(publish_lora.Inputs(lora=model, repo="a/b"), host)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_whole_model_does_not_have_is_reported_before_it_is_trained(workshop, kind):
    prompt = {
        "1": {"class_type": "AdapterSettings", "inputs": {"kind": kind}},
        "2": {"class_type": "LoRATrainer", "inputs": {"adapter": ["1", 0]}},
        "3": {"class_type": "PublishLora", "inputs": {"lora": ["2", 0], "repo": "a/b"}},
        "4": {"class_type": "ValidateSampler", "inputs": {"lora": ["2", 0], "prompts": "x", "lora_strength": "0.5"}},
    }
    problems = check(graph_from_json(prompt, schemas()), CATALOGUE, workshop.host())
    texts = {problem.field: problem.message for problem in problems if problem.field in ("lora", "lora_strength")}
    if kind == "lora":
        assert texts == {}
    else:
        assert "remove this node, and upload the file with hf upload" in texts["lora"]
        assert "which has the strength 1 alone; use 1.0" in texts["lora_strength"]
