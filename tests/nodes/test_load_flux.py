"""LoadFlux: flavours become options, and single files are looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.nodes.load_flux import Inputs, run
from chroma_trainer.trainer_core.config.flux import FLAVOURS, FluxOptions
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost

from tests.narrowing import present


@pytest.fixture
def host(tmp_path):
    kinds = {"diffusion_models": "flux", "text_encoders": "clip_l t5xxl", "vae": "ae", "loras": "helper"}
    models = {}
    for kind, names in kinds.items():
        models[kind] = (tmp_path / kind,)
        (tmp_path / kind).mkdir()
        for name in names.split():
            (tmp_path / kind / f"{name}.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    return SinkHost(paths=Paths(output=tmp_path, cache=tmp_path, models=models))


def test_a_flavour_is_its_repository_and_its_rules(host):
    assert next(iter(FLAVOURS)) == Inputs().flavour == "krea"
    (model,) = run(Inputs(), host)
    assert (model.family, model.flavour, model.repo) == ("flux", "krea", "black-forest-labs/FLUX.1-Krea-dev")
    flux = options_of(model)
    assert flux == FluxOptions(drawn_guidance=4.5) and flux.guidance == 1.0 and flux.max_tokens == 512
    options = {name: options_of(*run(Inputs(flavour=name), host)) for name in FLAVOURS}
    assert options["schnell"].is_fast and options["schnell"].max_tokens == 256
    assert options["libreflux"].is_masked and options["fluxbooru"].guidance == 3.5
    assert [name for name, o in options.items() if o.is_fast or o.is_masked] == ["schnell", "libreflux"]


def options_of(model: ModelConfig) -> FluxOptions:
    return present(model.flux)


def test_what_is_set_wins(host):
    own: dict[str, Any] = {
        "text_tokens": 300,
        "guidance": 4.0,
        "drawn_guidance": 2.0,
        "attention_mask": "on",
        "noise_levels": "as set",
    }
    (model,) = run(Inputs(flavour="schnell", **own), host)
    assert model.flux == FluxOptions("", 300, 4.0, 2.0, is_masked=True, is_fast=False)
    assert not options_of(*run(Inputs(flavour="libreflux", attention_mask="off"), host)).is_masked


def test_single_files(host, tmp_path):
    names = {"diffusion_model": "flux", "t5": "t5xxl", "clip": "clip_l", "vae": "ae", "assistant": "helper"}
    files: dict[str, Any] = {field: f"{name}.safetensors" for field, name in names.items()}
    (model,) = run(Inputs(**files), host)
    found = (
        model.transformer_file,
        model.text_encoder_file,
        options_of(model).clip_file,
        model.vae_file,
        options_of(model).assistant_file,
    )
    assert [Path(file).stem for file in found] == list(names.values()) and all(
        Path(file).is_absolute() for file in found
    )


def test_all_that_is_missing_is_told_at_once(host):
    with pytest.raises(UserError) as caught:
        run(Inputs(t5="t5xx.safetensors", assistant="none-such.safetensors"), host)
    assert [problem.where for problem in caught.value.problems] == ["t5", "assistant"]


def test_schnells_assistant_is_found_by_flavour(host, tmp_path, monkeypatch):
    import huggingface_hub

    cached = {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached.get((repo, file)))
    assert options_of(*run(Inputs(flavour="schnell"), host)).assistant_file == ""  # as in workflows saved so far
    (lacking,) = run(Inputs(flavour="schnell", assistant="by flavour"), host)
    assert "huggingface.co/ostris/FLUX.1-schnell-training-adapter" in lacking.training_hint
    cached["ostris/FLUX.1-schnell-training-adapter", "pytorch_lora_weights.safetensors"] = "/hub/adapter.safetensors"
    (from_hub,) = run(Inputs(flavour="schnell", assistant="by flavour"), host)
    assert options_of(from_hub).assistant_file == "/hub/adapter.safetensors" and from_hub.training_hint == ""
    (tmp_path / "loras" / "FLUX.1-Schnell-Training-Adapter.safetensors").touch()
    (from_folder,) = run(Inputs(flavour="schnell", assistant="by flavour"), host)
    assert Path(options_of(from_folder).assistant_file).parent == tmp_path / "loras"
    (dev,) = run(Inputs(flavour="dev", assistant="by flavour"), host)
    assert options_of(dev).assistant_file == "" == dev.training_hint
