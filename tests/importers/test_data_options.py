"""Options of captions, shapes and losses, which are taken over where they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.importers.examples import AI_TOOLKIT, ONETRAINER_CHROMA, write_simpletuner
from tests.importers.reading import Result

KOHYA = """
model_type = "chroma"
pretrained_model_name_or_path = "/m/Chroma1-HD.safetensors"
network_module = "networks.lora_flux"
dataset_config = "data.toml"
"""


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def imported_kohya(tmp_path: Path, options: str, subset: str) -> Result:
    write(tmp_path / "data.toml", f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\n{subset}")
    return Result(write(tmp_path / "config.toml", KOHYA + options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("loss_type = 'l1'", {"loss": "mae"}),
        ("loss_type = 'huber'\nhuber_c = 0.2\nhuber_schedule = 'constant'", {"loss": "huber", "huber_c": 0.2}),
        ("loss_type = 'l2'\nhuber_c = 0.2", {"loss": "mse", "huber_c": 0.1}),
        ("weighting_scheme = 'sigma_sqrt'", {"loss_weighting": "sigma_sqrt"}),
        ("weighting_scheme = 'logit_normal'", {"loss_weighting": "none"}),
    ],
)
def test_kohyas_losses(tmp_path: Path, options: str, expected: dict[str, Any]):
    result = imported_kohya(tmp_path, options, "")
    assert result.values("LoRATrainer", *expected) == expected and not result.missing


def test_a_huber_schedule_is_named(tmp_path: Path):
    result = imported_kohya(tmp_path, "loss_type = 'smooth_l1'\nhuber_schedule = 'snr'", "")
    assert result.missing == {"huber_schedule": "'snr': not there; huber_c is the same at all noise levels"}
    assert "up to a factor" in result.taken["loss_type"]


def test_kohyas_captions_and_flips(tmp_path: Path):
    subset = (
        "flip_aug = true\ncaption_prefix = 'photo of'\ncaption_suffix = ', sharp'\ncaption_tag_dropout_rate = 0.2\n"
        "keep_tokens = 1\nmetadata_file = 'C:\\\\data\\\\meta_cap.json'\nface_crop_aug_range = '2.0,4.0'"
    )
    result = imported_kohya(tmp_path, "", subset)
    (folder,) = result.nodes("DatasetBackend")
    expected = {
        "flip": 0.5, "caption_prefix": "photo of", "caption_suffix": ", sharp", "tag_dropout": 0.2, "kept_tags": 1,
        "captions": "table", "table": "meta_cap.json",
    }  # fmt: skip
    assert expected.items() <= folder.items()
    assert set(result.missing) == {"datasets[0].subsets[0].face_crop_aug_range"}


def imported_simpletuner(tmp_path: Path, backend: dict[str, Any], **options: Any) -> Result:
    main = {"model_family": "chroma", "data_backend_config": "config/multidatabackend.json", "lr_scheduler": "constant"}
    backends = [{"id": "cats", "type": "local", "instance_data_dir": "cats", "caption_strategy": "textfile", **backend}]
    path = write_simpletuner(tmp_path, {**main, **options})
    write(tmp_path / "config" / "multidatabackend.json", backends)
    return Result(path)


def test_simpletuners_parquet_block(tmp_path: Path):
    parquet = {
        "path": "tables/photos.parquet", "filename_column": "id", "caption_column": "cogvlm_caption",
        "fallback_caption_column": "tags", "width_column": "w", "height_column": "h",
        "identifier_includes_extension": False,
    }  # fmt: skip
    result = imported_simpletuner(
        tmp_path, {"caption_strategy": "parquet", "metadata_backend": "parquet", "parquet": parquet}
    )
    (folder,) = result.nodes("DatasetBackend")
    expected = {
        "captions": "table", "table": "photos.parquet", "file_column": "id", "caption_column": "cogvlm_caption | tags",
    }  # fmt: skip
    assert expected.items() <= folder.items() and not result.missing


@pytest.mark.parametrize(
    ("backend", "expected", "missing"),
    [
        (
            {"type": "aws", "aws_bucket_name": "pictures", "aws_data_prefix": "cats/", "aws_endpoint_url": "https://r2.example",
             "aws_access_key_id": "KEY"},
            {"folder": "s3://pictures/cats", "captions": "textfile"},
            {"type", "aws_endpoint_url", "aws_access_key_id"},
        ),
        (
            {"type": "huggingface", "dataset_name": "someone/cats", "caption_strategy": "huggingface",
             "huggingface": {"caption_column": "short"}},
            {"folder": "hf://someone/cats", "captions": "table", "caption_column": "short"},
            {"type"},
        ),
        (
            {"type": "csv", "csv_file": "urls.csv", "csv_caption_column": "prompt", "caption_strategy": "csv"},
            {"folder": "urls.csv", "captions": "table", "caption_column": "prompt"},
            {"type"},
        ),
    ],
)  # fmt: skip
def test_simpletuners_other_places(
    tmp_path: Path, backend: dict[str, Any], expected: dict[str, Any], missing: set[str]
):
    result = imported_simpletuner(tmp_path, backend)
    (folder,) = result.nodes("DatasetBackend")
    assert expected.items() <= folder.items()
    assert set(result.missing) == {f"cats.{name}" for name in missing}
    assert "KEY" not in str(folder)


@pytest.mark.parametrize(
    ("backend", "expected", "missing"),
    [
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.75]}, {"aspects": "1, 0.75"}, ""),
        ({"crop_aspect": "random", "crop_aspect_buckets": [0.5, "1.5"]}, {"crop_aspect": "random"}, ""),
        ({"crop_aspect": "closest"}, {"crop_aspect": "preserve", "aspects": ""}, ""),
        ({"crop_aspect": "random"}, {"aspects": ""}, "crop_aspect"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [5.0]}, {"aspects": ""}, "crop_aspect"),
        ({"crop": False, "crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, {"aspects": ""}, ""),
        ({"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 3.0}, {"min_aspect": 0.5, "max_aspect": 3.0}, ""),
        ({"max_upscale_threshold": 0.2}, {"max_upscale": 0}, "max_upscale_threshold"),
        ({"crop_style": "face"}, {"crop_style": "center"}, "crop_style"),
        ({"metadata_backend": "parquet", "skip_file_discovery": "vae", "write_batch_size": 64}, {"table": ""}, ""),
    ],
)
def test_simpletuners_shapes(tmp_path: Path, backend: dict[str, Any], expected: dict[str, Any], missing: str):
    result = imported_simpletuner(tmp_path, {"crop": True, **backend})
    (folder,) = result.nodes("DatasetBackend")
    assert expected.items() <= folder.items()
    assert set(result.missing) == ({f"cats.{missing}"} if missing else set())


def test_simpletuners_huber(tmp_path: Path):
    result = imported_simpletuner(tmp_path, {}, loss_type="huber", huber_c=0.3, huber_schedule="constant")
    assert result.values("LoRATrainer", "loss", "huber_c") == {"loss": "huber", "huber_c": 0.3} and not result.missing


def with_training(lines: str, dataset: str = "") -> str:
    text = AI_TOOLKIT.replace("      train:\n", f"      train:\n{lines}", 1)
    return text.replace("        - folder_path:", f"        - {dataset}folder_path:", 1)


def test_ai_toolkits_preservation(tmp_path: Path):
    training = (
        "        diff_output_preservation: true\n        diff_output_preservation_multiplier: 0.8\n"
        "        diff_output_preservation_class: woman\n        optimal_noise_pairing_samples: 4\n"
        "        loss_type: mae\n"
    )
    result = Result(write(tmp_path / "a.yaml", with_training(training, "flip_x: true\n          ")))
    expected = {"preservation": 0.8, "noise_choice": 4, "loss": "mae"}
    assert result.values("LoRATrainer", *expected) == expected
    assert {(node["class_word"], node["flip"]) for node in result.nodes("DatasetBackend")} == {("woman", 0.5)}
    assert not {name for name in result.missing if "preserv" in name or "flip" in name}
    blank = Result(write(tmp_path / "b.yaml", with_training("        blank_prompt_preservation: true\n")))
    assert blank.values("LoRATrainer", "preservation") == {"preservation": 1}
    assert {node["class_word"] for node in blank.nodes("DatasetBackend")} == {""}


@pytest.mark.parametrize(
    ("options", "expected", "missing"),
    [
        ({"mse_strength": 0.0, "mae_strength": 1.0}, {"loss": "mae"}, ""),
        ({"mse_strength": 0.0, "huber_strength": 1.0, "huber_delta": 0.5}, {"loss": "huber", "huber_c": 0.5}, ""),
        ({"mse_strength": 1.0, "mae_strength": 1.0}, {"loss": "mse"}, "mae_strength"),
        ({"loss_weight_fn": "SIGMA"}, {"loss_weighting": "sigma"}, ""),
        ({"loss_weight_fn": "MIN_SNR_GAMMA"}, {"loss_weighting": "none"}, "loss_weight_fn"),
    ],
)
def test_onetrainers_losses(tmp_path: Path, options: dict[str, Any], expected: dict[str, Any], missing: str):
    concept = {"path": "/data/cat", "text": {"tag_dropout_enable": True, "tag_dropout_mode": "RANDOM",
                                             "tag_dropout_probability": 0.3}}  # fmt: skip
    concepts = write(tmp_path / "concepts.json", [concept])
    result = Result(write(tmp_path / "a.json", {**ONETRAINER_CHROMA, **options}), concepts)
    assert result.values("LoRATrainer", *expected) == expected
    assert result.nodes("DatasetBackend")[0]["tag_dropout"] == 0.3
    assert (missing in result.missing) == bool(missing)
    assert json.dumps(result.imported.workflow)
