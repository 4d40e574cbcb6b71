"""Options that mean something else there than their names say: the training is as long, and of the same kind, as there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .examples import write_simpletuner
from .reading import Result

KOHYA = "network_module = 'networks.lora_flux'\ndataset_config = 'data.toml'\n"


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def imported_kohya(tmp_path: Path, options: str, dataset: str = "") -> Result:
    write(tmp_path / "data.toml", f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'cats'\n")
    return Result(write(tmp_path / "config.toml", KOHYA + options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The sigmas of a scheduler, which discrete_flow_shift shifts (3 by default), at the density of weighting_scheme.
        ("timestep_sampling = 'sigma'", {"sigma_density": "uniform", "shift": 3}),
        ("", {"sigma_density": "uniform", "shift": 3}),
        ("discrete_flow_shift = 1.15", {"sigma_density": "uniform", "shift": 1.15}),
        ("weighting_scheme = 'logit_normal'", {"sigma_density": "logit-normal", "shift": 3}),
        ("weighting_scheme = 'mode'", {"sigma_density": "mode", "shift": 3}),
        ("timestep_sampling = 'uniform'", {"sigma_density": "uniform", "shift": 1}),
        ("timestep_sampling = 'sigmoid'", {"sigma_density": "logit-normal", "shift": 1}),
        ("timestep_sampling = 'shift'\ndiscrete_flow_shift = 2.5", {"sigma_density": "logit-normal", "shift": 2.5}),
        ("weighting_scheme = 'sigma_sqrt'", {"loss_weighting": "sigma_sqrt"}),
        ("weighting_scheme = 'sigma_sqrt'\nmodel_prediction_type = 'raw'", {"loss_weighting": "none"}),
    ],
)
def test_kohyas_noise_levels(tmp_path: Path, options: str, expected: dict[str, Any]):
    result = imported_kohya(tmp_path, options)
    assert result.values("LoRATrainer", *expected) == expected


def test_kohyas_dataset_has_its_own_batch_size(tmp_path: Path):
    result = imported_kohya(tmp_path, "train_batch_size = 1", "batch_size = 4")
    assert result.values("LoRATrainer", "batch_size") == {"batch_size": 4} and not result.missing
    result = imported_kohya(tmp_path, "train_batch_size = 3")
    assert result.values("LoRATrainer", "batch_size") == {"batch_size": 3}


def test_lycoris_without_an_algorithm_is_lora(tmp_path: Path):
    write(tmp_path / "data.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\n")
    result = Result(write(tmp_path / "config.toml", KOHYA.replace("networks.lora_flux", "lycoris.kohya")))
    assert {node["kind"] for node in result.nodes("AdapterSettings")} <= {"lora"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epoch": 10, "max_train_epochs": 0, "max_train_steps": 0}, {"steps": 0, "epochs": 10}),
        ({"epoch": 10}, {"steps": 0, "epochs": 10}),
        ({"epoch": 1, "max_train_steps": 1600}, {"steps": 1600, "epochs": 0}),
        ({"epoch": 1, "max_train_epochs": 5, "max_train_steps": 1600}, {"steps": 0, "epochs": 5}),
    ],
)
def test_how_long_kohya_ss_trains(tmp_path: Path, options: dict[str, Any], expected: dict[str, Any]):
    main = {"LoRA_type": "Flux1", "train_data_dir": "/data/img", "learning_rate": 3e-4, "unet_lr": 0}
    result = Result(write(tmp_path / "gui.json", main | options))
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("LoRATrainer", "learning_rate") == {"learning_rate": 3e-4}  # 0 is none of its own


def imported_ai_toolkit(tmp_path: Path, train: dict[str, Any], **more: Any) -> Result:
    process = {
        "type": "sd_trainer", "model": {"arch": "chroma", "name_or_path": "lodestones/Chroma1-HD"},
        "datasets": [{"folder_path": "cats"}], "train": {"lr": 1e-4, **train},
        "save": {"save_every": 200}, "sample": {"sample_every": 250, "prompts": ["a cat"]},
        **more,
    }  # fmt: skip
    return Result(write(tmp_path / "job.json", {"job": "extension", "config": {"name": "cats", "process": [process]}}))


def test_ai_toolkits_steps_are_micro_batches(tmp_path: Path):
    train = {"steps": 2002, "gradient_accumulation_steps": 4, "lr_scheduler_params": {"warmup_steps": 40}}
    result = imported_ai_toolkit(tmp_path, train)
    expected = {"steps": 501, "accumulation": 4, "warmup_steps": 10, "checkpoint_every": 50, "validate_every": 63}
    assert (
        result.values("LoRATrainer", *expected) == expected and "gradient_accumulation" in result.taken["train.steps"]
    )


def test_ai_toolkits_newer_accumulation_is_within_a_step(tmp_path: Path):
    result = imported_ai_toolkit(tmp_path, {"steps": 2000, "gradient_accumulation": 4})
    expected = {"steps": 2000, "accumulation": 4, "checkpoint_every": 200}
    assert result.values("LoRATrainer", *expected) == expected
    both = imported_ai_toolkit(tmp_path, {"steps": 2000, "gradient_accumulation": 2, "gradient_accumulation_steps": 4})
    assert both.values("LoRATrainer", "steps", "accumulation") == {"steps": 500, "accumulation": 8}


def test_a_lokr_of_whole_matrices_is_not_scaled(tmp_path: Path):
    """A dimension of 10000 with an alpha of 1 is a scale of 1 there: alpha divides only factors."""
    result = imported_kohya(
        tmp_path, "network_dim = 10000\nnetwork_alpha = 1\nnetwork_args = ['algo=lokr', 'factor=8']"
    )
    assert result.values("LoRATrainer", "rank", "alpha") == {"rank": 512, "alpha": 0}
    assert imported_kohya(tmp_path, "network_dim = 768\nnetwork_alpha = 384").values("LoRATrainer", "alpha") == {
        "alpha": 256
    }
    assert imported_kohya(tmp_path, "network_dim = 32\nnetwork_alpha = 8").values("LoRATrainer", "alpha") == {
        "alpha": 8
    }
    network = {"type": "lokr", "linear": 32, "linear_alpha": 32, "lokr_full_rank": True, "lokr_factor": 8}
    assert imported_ai_toolkit(tmp_path, {}, network=network).values("LoRATrainer", "rank", "alpha") == {
        "rank": 512,
        "alpha": 0,
    }
    network["lokr_full_rank"] = False
    assert imported_ai_toolkit(tmp_path, {}, network=network).values("LoRATrainer", "rank", "alpha") == {
        "rank": 32,
        "alpha": 32,
    }


@pytest.mark.parametrize("kind", ["shift", "flux_shift", "lumina2_shift"])
def test_ai_toolkits_shift_is_of_uniform_sigmas(tmp_path: Path, kind: str):
    result = imported_ai_toolkit(tmp_path, {"timestep_type": kind})
    assert result.values("LoRATrainer", "sigma_density", "shift") == {"sigma_density": "uniform", "shift": 0}


def test_an_epoch_of_onetrainer_has_every_image_at_one_resolution(tmp_path: Path):
    main = {"model_type": "CHROMA_1", "training_method": "LORA", "resolution": "512, 768, 1024", "epochs": 100}
    concepts = [{"path": "cats", "name": "cats"}]
    result = Result(write(tmp_path / "main.json", {**main, "concepts": concepts}))
    assert result.values("LoRATrainer", "epochs") == {"epochs": 34} and "one of them there" in result.taken["epochs"]
    image = {"enable_resolution_override": True, "resolution_override": "512"}
    result = Result(write(tmp_path / "main.json", {**main, "concepts": [{**concepts[0], "image": image}]}))
    assert "cats.image.resolution_override" in result.missing


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (
            "enable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 3",
            {"crop_aspect": "closest", "aspects": "0.5, 1, 2", "min_aspect": 0, "max_aspect": 0},
        ),
        ("enable_ar_bucket = true\nar_buckets = [1.0, [2, 3]]", {"crop_aspect": "closest", "aspects": "1, 0.666667"}),
        ("ar_buckets = [1.0, 1.5]\nmin_ar = 0.5", {"crop_aspect": "square", "aspects": "", "min_aspect": 0}),
        ("enable_ar_bucket = true", {"crop_aspect": "preserve", "aspects": ""}),
    ],
)
def test_diffusion_pipe_crops_images_to_its_buckets(tmp_path: Path, dataset: str, expected: dict[str, Any]):
    """No image is left out for its shape: one beyond min_ar and max_ar goes to the nearest bucket."""
    write(tmp_path / "dataset.toml", f"resolutions = [512]\n{dataset}\n[[directory]]\npath = 'cats'\n")
    main = "output_dir = 'o'\ndataset = 'dataset.toml'\nepochs = 10\n[model]\ntype = 'chroma'\n[adapter]\ntype = 'lora'\nrank = 16\n"
    (folder,) = Result(write(tmp_path / "main.toml", main)).nodes("DatasetBackend")
    assert {name: folder[name] for name in expected} == expected


def test_simpletuners_backends_without_options_of_their_own(tmp_path: Path):
    """The main file's count for them; images are not cropped unless that is set."""
    main = {
        "model_family": "chroma", "data_backend_config": "config/multidatabackend.json", "lr_scheduler": "constant",
        "resolution": 768, "minimum_image_size": 256, "caption_strategy": "filename", "aspect_bucket_alignment": 32,
    }  # fmt: skip
    path = write_simpletuner(tmp_path, main)
    backend = {"type": "local", "instance_data_dir": "cats"}
    backends = [{"id": "a", **backend}, {"id": "b", **backend, "resolution": 512, "crop": True}]
    write(tmp_path / "config" / "multidatabackend.json", backends)
    first, second = sorted(Result(path).nodes("DatasetBackend"), key=lambda node: -node["resolution"])
    expected = {"resolution": 768, "min_size": 256, "captions": "filename", "bucket_step": "32", "crop": False}
    assert {name: first[name] for name in expected} == expected
    expected = {"resolution": 512, "min_size": 256, "crop": True, "crop_style": "random", "crop_aspect": "square"}
    assert {name: second[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "shift"),
    [
        ({}, 3),
        ({"flow_schedule_shift": None, "flow_schedule_auto_shift": False}, 3),
        ({"flow_use_uniform_schedule": True}, 3),
        ({"flow_schedule_shift": 1.5}, 1.5),
        ({"flow_schedule_shift": 0}, 1),
        ({"flow_schedule_auto_shift": True}, 0),
        ({"flux_fast_schedule": True}, 1),
        ({"model_family": "chroma"}, 1),
    ],
)
def test_simpletuners_shift_for_flux_is_3_unless_it_is_set(tmp_path: Path, options: dict[str, Any], shift: float):
    main = {"model_family": "flux", "data_backend_config": "config/multidatabackend.json", **options}
    assert Result(write_simpletuner(tmp_path, main)).values("LoRATrainer", "shift") == {"shift": shift}
