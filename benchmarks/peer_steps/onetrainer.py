"""OneTrainer: its GenericTrainer, whole, with its loader of models, its LoRA, its checkpointing, its optimiser and its loop.

Ours here: the batches, in place of its data loader (its own caches give the same tensors), and the noise of the
checked step. Its layer filter "transformer_block" takes every Linear of every block: our `all+ffs`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from turns import CHECK_SIGMA, LEARNING_RATE, RANK, SCALING, SHIFT, Setting, Turns, import_from, started

TIMESTEPS = 1000


def batches_for(turns: Turns) -> Iterator[dict[str, Any]]:
    for batch in turns:
        yield {
            "latent_image": turns.latents(batch) / SCALING + SHIFT,
            "text_encoder_hidden_state": turns.text(batch),
            "tokens": turns.mask(batch, with_pad=True),
            "tokens_mask": turns.mask(batch, with_pad=True),
            "loss_weight": torch.ones(len(batch)),
            "concept_type": ["STANDARD"] * len(batch),
        }


class Loader:
    """Stands where its data loader does: one endless epoch, so that nothing but steps is measured."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def get_data_set(self) -> Loader:
        return self

    def get_data_loader(self) -> Iterator[dict[str, Any]]:
        return batches_for(self.turns)

    def start_next_epoch(self) -> None: ...

    def approximate_length(self) -> int:
        return 1_000_000


def config_of(setting: Setting, workspace: Path) -> Any:
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.DataType import DataType
    from modules.util.enum.ModelType import ModelType
    from modules.util.enum.Optimizer import Optimizer
    from modules.util.enum.TrainingMethod import TrainingMethod
    from modules.util.optimizer_util import OPTIMIZER_DEFAULT_PARAMETERS

    config = TrainConfig.default_values()
    dtype = {"fp32": DataType.FLOAT_32, "bf16": DataType.BFLOAT_16}[setting.precision]
    config.model_type, config.training_method = ModelType.CHROMA_1, TrainingMethod.LORA
    config.base_model_name = str(with_scheduler(Path(setting.model), workspace))
    config.workspace_dir, config.cache_dir = str(workspace / "workspace"), str(workspace / "cache")
    (workspace / "none.json").write_text("[]", encoding="utf-8")
    config.concept_file_name = config.sample_definition_file_name = str(workspace / "none.json")
    config.train_device = config.temp_device = "cpu"
    config.train_dtype = config.fallback_train_dtype = dtype
    for part in (config.transformer, config.text_encoder, config.vae):
        part.weight_dtype, part.gradient_checkpointing = dtype, setting.checkpointing
    config.text_encoder.train = config.text_encoder.train_embedding = False
    config.lora_weight_dtype = DataType.FLOAT_32
    config.lora_rank, config.lora_alpha, config.layer_filter = RANK, float(RANK), "transformer_block"
    config.batch_size, config.epochs, config.learning_rate = setting.batch, 1, LEARNING_RATE
    config.learning_rate_warmup_steps, config.tensorboard, config.validation = 0, False, False
    config.optimizer.optimizer = Optimizer.ADAMW
    for name, value in OPTIMIZER_DEFAULT_PARAMETERS[Optimizer.ADAMW].items():
        setattr(config.optimizer, name, value)
    config.sample_after, config.backup_after, config.save_every = 1_000_000_000, 1_000_000_000, 0
    return config


def with_scheduler(model: Path, workspace: Path) -> Path:
    """The model's folder with what its loader also looks for."""
    folder = workspace / "model"
    shutil.copytree(model, folder)
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS).save_pretrained(folder / "scheduler")
    (folder / "meta.json").write_text("{}", encoding="utf-8")
    return folder


def watch_(trainer: Any, turns: Turns) -> None:
    """In the checked step, noise and noise level are given; its loss is told."""
    setup = trainer.model_setup
    create_noise, get_timestep, calculate_loss = setup._create_noise, setup._get_timestep_discrete, setup.calculate_loss

    def noise(source: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return turns.noise(range(len(source))) if turns.checking else create_noise(source, *rest, **more)

    def timestep(*rest: Any, **more: Any) -> torch.Tensor:
        found = get_timestep(*rest, **more)
        return torch.full_like(found, round(CHECK_SIGMA * TIMESTEPS) - 1) if turns.checking else found

    def loss(*rest: Any, **more: Any) -> torch.Tensor:
        found = calculate_loss(*rest, **more)
        if turns.checking:
            turns.said["loss"] = found.item()
        return found

    setup._create_noise, setup._get_timestep_discrete, setup.calculate_loss = noise, timestep, loss


def main() -> None:
    setting, turns = started()
    import_from(setting.peer, str(Path(setting.peer).parent / "mgds" / "src"))
    os.chdir(setting.peer)
    from modules.trainer.GenericTrainer import GenericTrainer
    from modules.util.callbacks.TrainCallbacks import TrainCallbacks
    from modules.util.commands.TrainCommands import TrainCommands

    class Trainer(GenericTrainer):
        def create_data_loader(self, *_: Any, **__: Any) -> Loader:
            return Loader(turns)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config_of(setting, Path(folder)), TrainCallbacks(), TrainCommands())
        trainer.start()
        watch_(trainer, turns)
        turns.said["parameters"] = sum(parameter.numel() for parameter in trainer.parameters)
        trainer.train()


if __name__ == "__main__":
    main()
