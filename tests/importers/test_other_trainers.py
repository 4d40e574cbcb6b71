"""The forms that other trainers' guides and presets have, value by value. Written by hand with the same keys."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.setup.full_rank_check import full_rank_problems

from tests.importers.examples import (
    AI_TOOLKIT,
    DATASET_TOML,
    FLUX_COMMAND,
    GUI,
    ONETRAINER_CHROMA,
    ONETRAINER_CONCEPTS,
    ONETRAINER_FLUX,
    PIPE,
    PIPE_DATASET,
)
from tests.importers.reading import Result


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_kohyas_command_line_with_its_dataset(tmp_path: Path):
    dataset, prompts = (
        write(tmp_path / "data.toml", DATASET_TOML),
        "a shrine --n ugly --w 512 --h 768 --l 4.0 --g 0.0 --s 20 --d 1\n",
    )
    write(tmp_path / "prompts.txt", prompts)
    result = Result(write(tmp_path / "train.sh", FLUX_COMMAND), dataset)
    expected = {
        "diffusion_model": "flux1-dev.safetensors",
        "clip": "clip_l.safetensors",
        "t5": "t5xxl_fp16.safetensors",
        "vae": "ae.safetensors",
        "flavour": "dev",
        "guidance": 1,
    }
    assert result.values("LoadFlux", *expected) == expected
    expected = {
        "name": "my_flux_lora", "rank": 16, "alpha": 1, "learning_rate": 1e-4, "steps": 0, "epochs": 10, "sigma_density": "logit-normal", "shift": 0,
        "targets": "ai-toolkit", "lr_schedule": "constant", "batch_size": 2, "caption_dropout": 0, "warmup_steps": 0, "weight_decay": 0.1,
    }  # fmt: skip
    assert result.values("LoRATrainer", *expected) == expected
    assert "keep the learning rate" in result.taken["network_alpha"]
    expected = {"group_offload": "block", "offload_share": 0.32, "mode": "manual"}
    assert result.values("MemorySettings", *expected) == expected
    assert result.values("OptimizerSettings", "optimizer", "beta2") == {"optimizer": "bnb-adamw8bit", "beta2": 0.99}
    assert result.values("QuantizeModel", "level") == {"level": "fp8-native"}
    drawn = {
        "prompts": "a shrine",
        "negative_prompt": "ugly",
        "cfg": 4,
        "steps": 20,
        "seed": 1,
        "resolutions": "512x768",
    }
    assert result.values("ValidateSampler", *drawn) == drawn
    first, second = sorted(result.nodes("DatasetBackend"), key=lambda node: -node["resolution"])
    assert {
        "folder": "C:\\pictures\\cats",
        "repeats": 3,
        "resolution": 1024,
        "crop_aspect": "preserve",
        "tag_orders": 8,
        "kept_tags": 1,
    }.items() <= first.items()
    assert {"resolution": 768, "repeats": 1, "captions": "textfile"}.items() <= second.items()
    assert "datasets[1].subsets[0].batch_size" in result.missing and (first["flip"], second["flip"]) == (0.5, 0.5)


def test_kohyas_switches_of_prodigy(tmp_path: Path):
    arguments = '"d_coef=2" "use_bias_correction=True" "safeguard_warmup=False" "decouple=True"'
    command = FLUX_COMMAND.replace('"AdamW8bit"', "Prodigy").replace('"weight_decay=0.1" "betas=0.9,0.99"', arguments)
    result = Result(write(tmp_path / "train.sh", command), write(tmp_path / "data.toml", DATASET_TOML))
    expected = {
        "optimizer": "prodigy",
        "prodigy_d_coef": 2,
        "prodigy_bias_correction": True,
        "prodigy_safeguard_warmup": False,
    }
    assert result.values("OptimizerSettings", *expected) == expected


def test_kohyas_chroma_from_a_config_file(tmp_path: Path):
    write(tmp_path / "data.toml", DATASET_TOML)
    config = (
        '[model]\npretrained_model_name_or_path = "/models/Chroma1-Base.safetensors"\nmodel_type = "chroma"\nt5xxl = "t5.safetensors"\n'
        '[training]\nguidance_scale = 0.0\ntimestep_sampling = "shift"\ndiscrete_flow_shift = 3.1582\napply_t5_attn_mask = true\n'
        'network_module = "lycoris.kohya"\nnetwork_args = ["algo=lokr", "factor=8", "preset=full"]\nattn_mode = "flash"\n'
        'max_train_steps = 2000\ndataset_config = "data.toml"\nloss_type = "huber"\n'
    )  # fmt: skip
    result = Result(write(tmp_path / "config.toml", config))
    expected = {"diffusion_model": "Chroma1-Base.safetensors", "flavour": "base", "text_encoder": "t5.safetensors"}
    assert result.values("LoadChroma", *expected) == expected
    expected = {"steps": 2000, "sigma_density": "logit-normal", "shift": 3.16}
    trainer = result.values("LoRATrainer", *expected)
    assert trainer["steps"] == 2000 and trainer["shift"] == pytest.approx(3.1582)
    assert result.values("AdapterSettings", "kind", "lokr_factor") == {"kind": "lokr", "lokr_factor": 8}
    assert result.values("MemorySettings", "attention") == {"attention": "flash"}
    assert result.values("LoRATrainer", "loss") == {"loss": "huber"} and "apply_t5_attn_mask" in result.equal


def test_a_batch_file_of_windows(tmp_path: Path):
    write(tmp_path / "dataset.toml", DATASET_TOML)
    command = (
        "@echo off\r\nREM made by a GUI\r\naccelerate launch ^\r\n  sd-scripts/flux_train_network.py ^\r\n"
        '  --pretrained_model_name_or_path "C:\\models\\flux1-schnell.safetensors" ^\r\n  --network_module networks.lora_flux ^\r\n'
        "  --network_dim 4 --learning_rate 8e-4 --max_train_epochs 16 --save_every_n_epochs 4 ^\r\n"
        '  --dataset_config "C:\\out\\dataset.toml" --output_name my-lora --optimizer_type adafactor ^\r\n'
        '  --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" --split_mode'
    )  # fmt: skip
    result = Result(write(tmp_path / "train.bat", command))
    assert result.values("LoadFlux", "flavour", "diffusion_model") == {
        "flavour": "schnell",
        "diffusion_model": "flux1-schnell.safetensors",
    }
    assert result.values("LoRATrainer", "rank", "epochs", "learning_rate") == {
        "rank": 4,
        "epochs": 16,
        "learning_rate": 8e-4,
    }
    assert result.values("OptimizerSettings", "optimizer", "adafactor_scale_parameter") == {
        "optimizer": "adafactor", "adafactor_scale_parameter": False,
    }  # fmt: skip


def test_kohya_ss(tmp_path: Path):
    result = Result(write(tmp_path / "gui.json", GUI))
    expected = {
        "name": "gui-lora",
        "rank": 32,
        "alpha": 16,
        "learning_rate": 2e-4,
        "max_grad_norm": 0,
        "epochs": 8,
        "shift": 3,
    }
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("DatasetBackend", "folder", "resolution") == {"folder": "/data/img", "resolution": 768}
    assert "rank_dropout" in result.missing and "REPEATS_NAME" in result.missing["train_data_dir"]
    assert set(GUI) - {"optimizer", "max_resolution", "epoch", "flux1_t5xxl", "xformers"} <= {
        name.removeprefix("train_data_dir.") for name in result.reported()
    }


def test_ai_toolkits_example_of_chroma(tmp_path: Path):
    result = Result(write(tmp_path / "chroma.yaml", AI_TOOLKIT))
    expected = {"flavour": "hd", "dtype": "bf16"}
    assert result.values("LoadChroma", *expected) == expected and "its release" in result.taken["model.name_or_path"]
    expected = {
        "name": "my_first_chroma_lora_v1", "rank": 16, "alpha": 16, "steps": 2000, "batch_size": 1, "learning_rate": 1e-4, "checkpoint_every": 250,
        "keep_checkpoints": 4, "validate_every": 250, "sigma_density": "logit-normal", "caption_dropout": 0.05,
    }  # fmt: skip
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("QuantizeModel", "level") == {"level": "fp8-quanto"}
    assert result.values("AdapterSettings", "ema_decay", "precision") == {"ema_decay": 0.99, "precision": "fp16"}
    assert result.values("MemorySettings", "attention") == {"attention": "flash"}
    drawn = {
        "prompts": "p3r5on plays chess\na horse as a DJ",
        "cfg": 4,
        "steps": 25,
        "resolutions": "1024x1024",
        "seed": 42,
    }
    assert result.values("ValidateSampler", *drawn) == drawn
    folders = result.nodes("DatasetBackend")
    assert [node["resolution"] for node in folders] == [512, 768, 1024]
    assert {node["trigger"] for node in folders} == {"p3r5on"}


def test_onetrainers_presets_with_concepts(tmp_path: Path):
    concepts = write(tmp_path / "concepts.json", ONETRAINER_CONCEPTS)
    result = Result(write(tmp_path / "chroma.json", ONETRAINER_CHROMA), concepts)
    expected = {
        "sigma_density": "chroma", "learning_rate": 3e-4, "batch_size": 2, "epochs": 100, "steps": 0, "rank": 16, "alpha": 1,
        "targets": "*attn*,*ff.net*,*proj_mlp*", "warmup_steps": 200,
    }  # fmt: skip
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("LoadChroma", "flavour") == {"flavour": "hd"}
    assert result.values("QuantizeModel", "level", "text_encoder") == {
        "level": "fp8-native",
        "text_encoder": "fp8-native",
    }
    assert result.values("MemorySettings", "group_offload", "offload_share") == {
        "group_offload": "block",
        "offload_share": 0.6,
    }
    assert result.values("AdapterSettings", "precision") == {"precision": "bf16"}
    (folder,) = result.nodes("DatasetBackend")
    assert {"folder": "/data/cat", "resolution": 512, "repeats": 3, "crop_style": "random"}.items() <= folder.items()
    assert folder["flip"] == 0.5 and "held out" in result.missing
    flux = Result(write(tmp_path / "flux.json", ONETRAINER_FLUX), concepts)
    assert flux.values("LoRATrainer", "sigma_density", "shift", "name") == {
        "sigma_density": "logit-normal",
        "shift": 0,
        "name": "lora",
    }
    assert flux.values("QuantizeModel", "level", "text_encoder") == {"level": "nf4-bnb", "text_encoder": "nf4-bnb"}


def test_diffusion_pipe(tmp_path: Path):
    write(tmp_path / "dataset.toml", PIPE_DATASET)
    result = Result(write(tmp_path / "main.toml", PIPE))
    expected = {
        "name": "my-run",
        "rank": 32,
        "alpha": 0,
        "epochs": 100,
        "accumulation": 4,
        "learning_rate": 2e-5,
        "warmup_steps": 100,
        "shift": 0,
    }
    assert result.values("LoRATrainer", *expected) == expected
    assert result.values("OptimizerSettings", "optimizer", "beta1", "beta2") == {
        "optimizer": "adamw",
        "beta1": 0.9,
        "beta2": 0.99,
    }
    assert result.values("LoadChroma", "diffusion_model", "flavour") == {
        "diffusion_model": "Chroma1-HD.safetensors",
        "flavour": "hd",
    }
    assert [(node["resolution"], node["repeats"]) for node in result.nodes("DatasetBackend")] == [(512, 5), (1024, 5)]
    assert [len(node["aspects"].split(",")) for node in result.nodes("DatasetBackend")] == [7, 7] and not result.missing
    assert result.values("LoRATrainer", "loss", "huber_c") == {"loss": "huber", "huber_c": 0.5}


def assert_is_full(result: Result, targets: str):
    """Kind full, without anything that an adapter alone has, and nothing that `check` would refuse."""
    assert result.values("AdapterSettings", "kind") == {"kind": "full"}
    names = {field.name for field in fields(TrainingConfig)}
    training = TrainingConfig(
        **{name: value for name, value in result.nodes("LoRATrainer")[0].items() if name in names}
    )
    adapter, request = AdapterConfig(**result.nodes("AdapterSettings")[0]), result.nodes("OptimizerSettings")[0]
    model = ModelConfig(family="chroma", flavour="hd", repo="", dtype=result.nodes("LoadChroma")[0]["dtype"])
    whole = TrainRequest(model, DatasetConfig((), ()), training, adapter=adapter, optimizer=OptimizerConfig(**request))
    assert full_rank_problems(whole, SinkHost(paths=Paths(output=Path(), cache=Path()))) == []
    assert training.targets == targets
    assert all(node["level"] == "none" for node in result.nodes("QuantizeModel"))


def test_full_fine_tunes_become_kind_full(tmp_path: Path):
    value = {**ONETRAINER_CHROMA, "training_method": "FINE_TUNE", "gradient_accumulation_steps": 4, "lora_rank": 64}
    value["transformer"] = {**value.get("transformer", {}), "weight_dtype": "NFLOAT_4"}
    value |= {"layer_filter": "", "concepts": ONETRAINER_CONCEPTS}
    result = Result(write(tmp_path / "a.json", value))
    assert_is_full(result, "all+ffs, norms, embedders")
    assert "no adapter" in result.equal["lora_rank"] and "training_method" in result.taken
    assert "a batch_size of" in result.missing["gradient_accumulation_steps"]
    assert "can't be trained" in result.missing["transformer.weight_dtype"]
    pipe = re.sub(r"(?ms)^\[adapter\].*?(?=^\[|\Z)", "", PIPE)
    assert "adapter" not in pipe
    (tmp_path / "dataset.toml").write_text(PIPE_DATASET, "utf-8")
    assert_is_full(Result(write(tmp_path / "a.toml", pipe)), "all+ffs, norms, embedders")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.yaml", AI_TOOLKIT.replace("arch: chroma", "arch: wan21"), "'wan21' can't be trained here"),
        ("a.json", {**ONETRAINER_CHROMA, "model_type": "STABLE_DIFFUSION_15"}, "can't be trained here"),
        ("a.json", {**ONETRAINER_CHROMA, "training_method": "EMBEDDING"}, "of LoRAs and of full fine-tunes (FINE_TUNE) are"),
        ("a.toml", PIPE.replace("'chroma'", "'wan'"), "'wan' can't be trained here"),
        ("a.toml", "x = [", "is not valid TOML"),
        ("a.yaml", "a: !!python/object:os.system {}", "is not valid YAML"),
        ("a.yaml", "a: [" * 30, "nested too deeply"),
        ("a.json", "{'a'}", "is not JSON"),
        ("a.json", {"nodes": []}, "can be imported (SimpleTuner, OneTrainer"),
    ],
)  # fmt: skip
def test_what_can_not_be_imported_is_one_error(tmp_path: Path, name: str, content: object, wanted: str):
    with pytest.raises(UserError) as caught:
        Result(write(tmp_path / name, content))
    assert len(caught.value.problems) == 1 and wanted in str(caught.value)
