"""A Flux goes the same way as a Chroma: it learns, repeats to the bit, resumes, draws, exports and is planned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.config.flux import FLAVOURS
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.flow.sigma_density import SCHNELL_SIGMAS
from chroma_trainer.trainer_core.host import LoraSaved, PreviewReady
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.train.planning import plan_request
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import write_tiny_flux
from tests.workshop import EVALUATED

DRAWN = ValidationConfig(prompts="a cat", resolutions="32x32", steps=2, cfg=1.0)
QUANTISED = QuantizationConfig("int8-quanto", "cpu")


@pytest.fixture(scope="module")
def request_of(workshop, tiny_flux_model):
    def make(validation=None, memory=None, quantization=None, model=None, **values):
        model = model or tiny_flux_model
        model = replace(model, quantization=quantization or QUANTISED)
        request = workshop.request(validation, model, **{"targets": "ai-toolkit", **values})
        return replace(request, memory=memory or MemoryConfig())

    return make


@pytest.fixture(scope="module")
def finished(workshop, request_of):
    host = workshop.host()
    return host, run(request_of(DRAWN, gradient_checkpointing=True, **EVALUATED), host)


def test_the_file_and_what_it_says(finished):
    host, result = finished
    (saved,) = host.all(LoraSaved)
    tensors = load_file(host.lora)
    assert saved.applied == saved.num_keys == len(tensors)
    assert {
        "transformer.transformer_blocks.0.norm1.linear.lora_B.weight",
        "transformer.single_transformer_blocks.1.norm.linear.lora_A.weight",
    } <= tensors.keys()
    with safe_open(host.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora" and metadata["ss_base_model_version"] == "flux1"
    assert describe(host.lora)["request"]["model"]["family"] == "flux"
    assert host.all(PreviewReady) and result.report["memory"]["predicted"]


@pytest.mark.slow
def test_cancelled_and_resumed_it_is_the_same(workshop, request_of, finished):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request_of(DRAWN, gradient_checkpointing=True, **EVALUATED), host)
    resumed = run(request_of(DRAWN, gradient_checkpointing=True, **EVALUATED), workshop.host(host.paths.output))
    assert resumed.lora.sha256 == finished[1].lora.sha256 and resumed.losses == finished[1].losses


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(
            {"group_offload": "block", "activation_offload": True, "checkpointing_interval": 3}, marks=pytest.mark.slow
        ),
        {"group_offload": "leaf", "offload_to_disk": True, "text_encoder": "blocks"},
    ],
)
def test_the_same_wherever_weights_wait(workshop, request_of, finished, memory):
    again = run(request_of(DRAWN, MemoryConfig(**memory), gradient_checkpointing=True), workshop.host())
    assert again.losses == finished[1].losses


@pytest.mark.slow
def test_it_learns(workshop, request_of):
    host = workshop.host()
    asked = request_of(
        steps=40, rank=16, alpha=16.0, learning_rate=0.02, checkpoint_every=0, targets="all+ffs", **EVALUATED
    )
    losses = run(asked, host).report["eval_loss"]
    assert losses["after"] < 0.95 * losses["before"]


def test_the_exported_file_on_the_clean_base_is_the_trained_model(tiny_flux_model, tmp_path):
    """Last modulation among them, whose halves are the other way round in the original names."""
    from chroma_trainer.trainer_core.adapters.files.load import apply_lora_

    family, draw = FluxFamily(), torch.Generator().manual_seed(0)
    given = torch.randn(1, 16, 8, 6, generator=draw), torch.tensor([0.6]), [torch.randn(7, 32, generator=draw)]
    names = [n for n, m in family.load_transformer(tiny_flux_model).named_modules() if isinstance(m, torch.nn.Linear)]
    assert "norm_out.linear" in names and "time_text_embed.guidance_embedder.linear_1" in names
    for form in ("universal", "comfyui", "kohya"):
        transformer = family.load_transformer(tiny_flux_model)
        layers = inject_(transformer, names, 3, 6.0, generator=draw)
        with torch.no_grad():
            for _, parameter in trainable_parameters(layers):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
            wanted = family.predict(transformer, *given)
            saved = export_lora(layers, transformer, tmp_path / f"{form}.safetensors", {}, form=form)
            assert saved.applied == saved.num_keys
            fresh = family.load_transformer(tiny_flux_model)
            base = family.predict(fresh, *given)
            apply_lora_(fresh, tmp_path / f"{form}.safetensors")
            torch.testing.assert_close(family.predict(fresh, *given), wanted, rtol=1e-4, atol=1e-5)
            assert (base - wanted).abs().max() > 0.01


def test_diffusers_reads_the_file(tiny_flux_model, finished):
    """FluxPipeline.load_lora_weights finds every key, and computes what we do."""
    from chroma_trainer.trainer_core.adapters.files.load import apply_lora_
    from diffusers import FluxPipeline, FluxTransformer2DModel

    from tests.models.flux.test_transformer import diffusers_velocity, inputs

    host, _ = finished
    folder = tiny_flux_model.repo
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    pipeline = FluxPipeline.from_pretrained(folder, transformer=transformer)
    pipeline.load_lora_weights(str(host.lora))
    ours = FluxFamily().load_transformer(tiny_flux_model)
    layers = apply_lora_(ours, host.lora)
    adapted = [name for name, module in pipeline.transformer.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(layers)
    with torch.no_grad():
        theirs = diffusers_velocity(pipeline.transformer, *inputs(lengths=(9,)))
        torch.testing.assert_close(FluxFamily().predict(ours, *inputs(lengths=(9,))), theirs, rtol=1e-4, atol=1e-5)


def test_the_plan_counts_all_rows_of_text(workshop, request_of):
    short, _, _ = plan_request(request_of(), workshop.host())
    model = request_of().model
    long, _, _ = plan_request(
        request_of(model=replace(model, flux=replace(model.flux, max_tokens=256))), workshop.host()
    )
    assert long.flops_per_step > 2 * short.flops_per_step and long.disk["text"] > 8 * short.disk["text"]


@pytest.mark.slow
def test_schnell_trains_at_its_own_levels(workshop, request_of, tmp_path):
    write_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    model = request_of().model
    fast = replace(model, repo=str(tmp_path / "schnell"), flavour="schnell", flux=replace(model.flux, is_fast=True))
    host = workshop.host()
    result = run(request_of(model=fast, steps=2, checkpoint_every=0), host)
    assert result.lora.model == fast
    assert describe(host.lora)["request"]["training"]["sigma_density"] == "schnell"
    assert any("noise levels (sigma) in training (schnell)" in text for text in host.told())
    assert any(text.startswith("schnell is trained without its assistant") for text in host.told())
    assert set(SCHNELL_SIGMAS) == {1.0, 0.75, 0.5, 0.25} and FLAVOURS["schnell"].is_fast


def test_cfg_where_none_is_wanted_is_told(workshop, request_of):
    host = workshop.host()
    plan_run(request_of(ValidationConfig(prompts="a cat", cfg=3.5)), host)
    assert any(text.startswith("cfg 3.5 oversaturates images of dev") for text in host.told())
    booru = replace(request_of().model, flavour="fluxbooru")
    assert FluxFamily().warning(booru, ValidationConfig(prompts="a cat", cfg=6.0)) == ""


def test_drawing_has_guidance_of_its_own(tiny_flux_model):
    family = FluxFamily()
    transformer = family.load_transformer(tiny_flux_model)
    assert transformer.guidance == 1.0
    with family.drawing(transformer):
        assert transformer.guidance == 3.5
    assert transformer.guidance == 1.0
