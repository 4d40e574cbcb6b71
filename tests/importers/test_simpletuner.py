from __future__ import annotations

import json
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.validation import CLIP_REPO
from chroma_trainer.trainer_core.errors import UserError

from tests.importers.examples import BACKENDS, CHROMA_EXAMPLE, CHROMA_GUIDE, FLUX_GUIDE, LIBRARY, write_simpletuner
from tests.importers.reading import Result


def test_the_guide_to_chroma_is_taken_over_value_by_value(tmp_path: Path):
    result = Result(write_simpletuner(tmp_path, CHROMA_GUIDE))
    assert result.values("LoadChroma", "flavour", "dtype", "folder") == {
        "flavour": "base",
        "dtype": "bf16",
        "folder": "",
    }
    trainer = {"rank": 16, "alpha": 0, "learning_rate": 2e-4, "gradient_checkpointing": True, "name": "chroma-output"}
    density = {"sigma_density": "quadratic_tail", "shift": 1, "caption_dropout": 0, "warmup_steps": 20}
    assert result.values("LoRATrainer", *trainer, *density) == {**trainer, **density}
    assert not result.nodes("QuantizeModel") and set(result.missing) == {"lr_scheduler"}


def test_the_example_of_chroma_is_taken_over_value_by_value(tmp_path: Path):
    result = Result(write_simpletuner(tmp_path, CHROMA_EXAMPLE))
    expected = {
        "name": "my-chroma-lora", "rank": 16, "alpha": 16, "steps": 100, "epochs": 0, "batch_size": 1, "learning_rate": 1e-4,
        "lr_schedule": "constant", "shift": 3, "seed": 42, "checkpoint_every": 10, "validate_every": 50, "eval_images": 25,
        "trackers": "none", "sigma_density": "quadratic_tail",
    }  # fmt: skip
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("QuantizeModel", "level", "quantize_via") == {"level": "int8-quanto", "quantize_via": "cpu"}
    assert result.values("OptimizerSettings", "optimizer") == {"optimizer": "adamw_bf16"}
    drawn = {
        "prompts": "a cat with a sign",
        "negative_prompt": "ugly",
        "steps": 16,
        "resolutions": "1024x1024",
        "seed": 42,
    }
    assert result.values("ValidateSampler", *drawn) == drawn
    assert set(CHROMA_EXAMPLE) <= result.reported() and not result.missing


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (None, CLIP_REPO),
        (f"{CLIP_REPO}-336", CLIP_REPO),
        ("laion/CLIP-ViT-B-32", "laion/CLIP-ViT-B-32"),
        ("/data/clip", CLIP_REPO),
    ],
)
def test_clip_scores_are_taken_over(tmp_path: Path, model: str | None, taken: str):
    """Its own default is a pickle file, and a folder there is none here: the report says what is used."""
    option = "pretrained_evaluation_model_name_or_path"
    result = Result(
        write_simpletuner(tmp_path, {**CHROMA_EXAMPLE, "evaluation_type": "clip", **({option: model} if model else {})})
    )
    assert result.values("ValidateSampler", "score", "score_model") == {"score": "clip", "score_model": taken}
    assert "likeness" in result.taken["evaluation_type"] and (option in result.missing) == (model not in (None, taken))
    plain = Result(write_simpletuner(tmp_path, {**CHROMA_EXAMPLE, "evaluation_type": "none", option: "a/b"}))
    assert {"evaluation_type", option} <= set(plain.equal) and plain.values("ValidateSampler", "score") == {
        "score": "none"
    }


def test_the_guide_to_flux_with_its_backends_and_prompts(tmp_path: Path):
    result = Result(write_simpletuner(tmp_path, FLUX_GUIDE))
    assert result.values("LoadFlux", "flavour", "guidance", "drawn_guidance") == {
        "flavour": "dev", "guidance": 1, "drawn_guidance": 3,
    }  # fmt: skip
    expected = {
        "rank": 4, "targets": "all+ffs", "init": "pissa", "steps": 0, "epochs": 3, "accumulation": 2, "shift": 0,
        "sigma_density": "logit-normal", "lr_schedule": "polynomial", "warmup_steps": 100, "learning_rate": 1e-4,
        "max_grad_norm": 1, "caption_dropout": 0.1, "routed_share": 0.5, "route_first": 2, "route_last": -2,
        "keep_checkpoints": 5, "checkpoint_every": 500,
    }  # fmt: skip
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("OptimizerSettings", "optimizer") == {"optimizer": "optimi-lion"}
    memory = {"checkpointing_interval": 2, "mode": "manual"}
    assert result.values("MemorySettings", *memory) == memory
    prompts = json.loads(result.values("ValidateSampler", "prompts")["prompts"])
    assert prompts == {"validation": "a photo of sks", **LIBRARY}
    assert result.values("ValidateSampler", "resolutions") == {"resolutions": "1024x1024, 1280x768"}
    photos, subject = sorted(result.nodes("DatasetBackend"), key=lambda node: node["folder"])
    wanted = {
        "folder": "datasets/photos", "captions": "filename", "repeats": 1, "crop": True, "crop_aspect": "square",
        "min_size": 512, "resolution": 512, "resolution_type": "pixel_area", "prior_preservation": True,
    }  # fmt: skip
    assert wanted.items() <= photos.items()
    wanted = {
        "folder": "datasets/subject", "captions": "instance prompt", "instance_prompt": "a photo of sks", "crop": False,
        "repeats": 1001, "resolution": 1024, "masks": "datasets/masks", "prior_preservation": False,
    }  # fmt: skip
    assert wanted.items() <= subject.items()
    assert set(result.missing) == {"attention_mechanism"}
    assert {name.removeprefix("--") for name in FLUX_GUIDE} <= result.reported()
    assert {f"photos.{name}" for name in BACKENDS[0]} <= result.reported()


def test_a_transformer_of_its_own_as_in_the_guide(tmp_path: Path):
    dev2pro = {
        "model_family": "flux", "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "pretrained_transformer_model_name_or_path": "ashen0209/Flux-Dev2Pro",
        "pretrained_vae_model_name_or_path": "black-forest-labs/FLUX.1-dev", "pretrained_transformer_subfolder": "none",
        "data_backend_config": "config/multidatabackend.json",
    }  # fmt: skip
    result = Result(write_simpletuner(tmp_path, dev2pro))
    expected = {"flavour": "dev", "diffusion_model": "ashen0209/Flux-Dev2Pro", "vae": "from flavour"}
    assert result.values("LoadFlux", *expected) == expected


def test_config_env(tmp_path: Path):
    write_simpletuner(tmp_path, CHROMA_GUIDE)
    path = tmp_path / "config" / "config.env"
    path.write_text(
        "# settings\nexport MODEL_FAMILY='chroma'\nexport BASE_DIR=\"/data\"\nexport OUTPUT_DIR=\"${BASE_DIR}/my-style\"\n"
        "export MAX_NUM_STEPS=3000\nexport LEARNING_RATE=8e-5 # low\nexport DATALOADER_CONFIG=config/multidatabackend.json\n"
        'export TRAINER_EXTRA_ARGS="--lora_rank=8 --flow_schedule_shift=3"\n',
        "utf-8",
    )  # fmt: skip
    expected = {"name": "my-style", "steps": 3000, "learning_rate": 8e-5, "rank": 8, "shift": 3}
    assert Result(path).values("LoRATrainer", *expected) == expected


def test_lycoris_and_degraded_references(tmp_path: Path):
    path = write_simpletuner(
        tmp_path,
        {**CHROMA_GUIDE, "model_family": "flux", "model_flavour": "kontext", "lora_type": "lycoris", "lycoris_config": "lycoris.json"},
    )  # fmt: skip
    lokr = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "apply_preset": {}}
    (path.parent / "lycoris.json").write_text(json.dumps(lokr), "utf-8")
    conditioning = [{"type": "jpeg_artifacts", "quality_range": [10, 30], "compression_rounds": 2}, {"type": "canny"}]
    backends = [{"id": "a", "instance_data_dir": "a", "conditioning": conditioning}]
    (path.parent / "multidatabackend.json").write_text(json.dumps(backends), "utf-8")
    result = Result(path)
    expected = {"kind": "lokr", "lokr_factor": 16}
    assert result.values("AdapterSettings", *expected) == expected
    assert result.values("LoRATrainer", "rank", "alpha") == {"rank": 512, "alpha": 0}
    assert result.values("DatasetBackend", "degrade") == {"degrade": "jpeg 10-30 + jpeg 10-30"}
    assert "canny" in result.missing["a.conditioning"]


def test_what_is_unknown_or_has_no_equivalent_is_listed(tmp_path: Path):
    config = {
        **CHROMA_GUIDE,
        "learning_rat": 1,
        "an*odd*`name`": 1,
        "push_to_hub": True,
        "optimizer": "muon",
        "noise_offset": 0.1,
    }
    result = Result(write_simpletuner(tmp_path, config))
    assert "did you mean 'learning_rate'" in result.missing["learning_rat"]
    assert {"push_to_hub", "optimizer", "noise_offset"} < set(result.missing)
    (note,) = [node for node in result.imported.workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert "- **noise_offset**: " in note["widgets_values"][0]
    assert r"- **an\*odd\*\`name\`**: " in note["widgets_values"][0]  # what Markdown would take for marks


def test_a_full_fine_tune_becomes_kind_full(tmp_path: Path):
    change = {"model_type": "full", "gradient_accumulation_steps": 2, "lora_rank": 8, "flux_lora_target": "all"}
    result = Result(write_simpletuner(tmp_path, {**CHROMA_GUIDE, **change}))
    assert result.values("AdapterSettings", "kind") == {"kind": "full"}
    assert result.values("LoRATrainer", "targets", "rank", "accumulation") == {
        "targets": "all+ffs, norms, embedders", "rank": 16, "accumulation": 1,
    }  # fmt: skip
    assert "no adapter" in result.equal["lora_rank"] and "gradients" in result.missing["gradient_accumulation_steps"]
    assert result.values("OptimizerSettings", "clip_by") == {"clip_by": "step before"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_family": "sdxl"}, "there is chroma and flux"),
        ({"model_type": "embedding"}, "there is lora and full"),
        ({"learning_rate": "fast"}, "'fast' is not a number"),
        ({"network_rank": [1]}, "[1] is not a number"),
        ({"data_backend_config": "other.json"}, "give that file as well"),
        ({"data_backend_config": None}, "no folder of images"),
    ],
)
def test_what_is_wrong_is_one_error_that_names_the_option(tmp_path: Path, change: dict, wanted: str):
    with pytest.raises(UserError) as caught:
        Result(write_simpletuner(tmp_path, {**CHROMA_GUIDE, **change}))
    (problem,) = caught.value.problems
    assert wanted in str(problem) and (next(iter(change)) in str(problem) or "no folder" in wanted)
