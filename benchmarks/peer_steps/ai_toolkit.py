"""ai-toolkit: its SDTrainer, whole: data loader, model, LoRA, noise scheduler, loss, optimiser, loop.

Its data loader reads the same pictures and caches their latents and captions; of each batch the latents and embeddings
are then replaced by ours, so that all train on the same numbers. Its own encoders are asked for on a hub: here they are
those of the measured model. Its sound library is not needed for pictures, and stands empty.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import tempfile
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from turns import CHECK_SIGMA, LEARNING_RATE, RANK, Setting, Turns, fit_dimensions_, import_from, started

TIMESTEPS = 1000


def config_of(setting: Setting, folder: Path) -> OrderedDict[str, Any]:
    dtype = {"fp32": "float32", "bf16": "bf16"}[setting.precision]
    process = {
        "type": "sd_trainer", "training_folder": str(folder), "device": "cpu",
        "network": {"type": "lora", "linear": RANK, "linear_alpha": RANK},
        "save": {"dtype": "float32", "save_every": 100_000_000},
        "datasets": [{
            "folder_path": setting.pictures, "caption_ext": "txt", "caption_dropout_rate": 0.0, "cache_latents": True,
            "cache_text_embeddings": True, "resolution": [setting.edge], "num_workers": 0,
        }],
        "train": {
            "batch_size": setting.batch, "steps": 1_000_000, "gradient_accumulation": 1, "train_unet": True,
            "train_text_encoder": False, "gradient_checkpointing": setting.checkpointing, "noise_scheduler": "flowmatch",
            "timestep_type": "linear", "optimizer": "adamw", "lr": LEARNING_RATE, "dtype": dtype, "max_grad_norm": 1.0,
            "skip_first_sample": True, "disable_sampling": True,
        },
        "model": {
            "name_or_path": str(Path(setting.material) / "original.safetensors"), "arch": "chroma", "quantize": False,
            "dtype": dtype,
        },
        "sample": {"sampler": "flowmatch", "sample_every": 100_000_000, "prompts": []},
        "logging": {"log_every": 100},
    }  # fmt: skip
    return OrderedDict(job="extension", config=OrderedDict(name="measured", process=[process]), meta={})


class Local:
    """A class whose from_pretrained reads the measured model's folder in place of a hub's."""

    def __init__(self, kind: Any, folder: Path):
        self.kind, self.folder = kind, folder

    def from_pretrained(self, *_: Any, torch_dtype: Any = None, **__: Any) -> Any:
        return (
            self.kind.from_pretrained(self.folder)
            if torch_dtype is None
            else self.kind.from_pretrained(self.folder, torch_dtype=torch_dtype)
        )


def at_home_(model: Path) -> None:
    from diffusers import AutoencoderKL
    from extensions_built_in.diffusion_models.chroma import chroma_model as theirs
    from transformers import AutoTokenizer, T5EncoderModel

    theirs.T5TokenizerFast = Local(AutoTokenizer, model / "tokenizer")
    theirs.T5EncoderModel = Local(T5EncoderModel, model / "text_encoder")
    theirs.AutoencoderKL = Local(AutoencoderKL, model / "vae")
    fit_dimensions_(theirs.chroma_params, model)


def without_other_models_(clone: Path) -> None:
    """Of its extensions only the trainer and Chroma are read: others want a diffusers that is newer than ours."""
    for folder in (clone / "extensions_built_in").iterdir():
        if folder.is_dir() and folder.name != "sd_trainer":
            _empty(f"extensions_built_in.{folder.name}").__path__ = [str(folder)]
    from extensions_built_in.diffusion_models.chroma.chroma_model import ChromaModel

    sys.modules["extensions_built_in.diffusion_models"].AI_TOOLKIT_MODELS = [ChromaModel]  # type: ignore[attr-defined]


def _empty(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


def trainer_class(turns: Turns) -> Any:
    from extensions_built_in.sd_trainer.SDTrainer import SDTrainer
    from toolkit.prompt_utils import PromptEmbeds

    class Trainer(SDTrainer):
        order: Any = None

        def hook_train_loop(self, batch: Any) -> Any:
            if self.order is None:
                turns.said["parameters"] = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
                self.order = iter(turns)
            numbers = next(self.order, None)
            if numbers is None:
                os._exit(0)  # its end would save the LoRA and write a page about it
            one = batch[0] if isinstance(batch, list) else batch
            assert len(one.file_items) == len(numbers)
            one.latents = turns.latents(numbers)
            one.prompt_embeds = PromptEmbeds(turns.text(numbers))
            one.prompt_embeds.attention_mask = turns.mask(numbers, with_pad=False)
            told = super().hook_train_loop(batch)
            if turns.checking:
                turns.said["loss"] = told["loss"]
            return told

        def get_noise(self, latents: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            return turns.noise(range(len(latents))) if turns.checking else super().get_noise(latents, *rest, **more)

        def process_general_training_batch(self, batch: Any) -> Any:
            if not turns.checking:
                return super().process_general_training_batch(batch)
            wanted = torch.full((len(batch.file_items),), round((1 - CHECK_SIGMA) * TIMESTEPS), dtype=torch.long)
            drawn, torch.randint = torch.randint, lambda *_, **__: wanted  # the noise level's index, noise first
            try:
                return super().process_general_training_batch(batch)
            finally:
                torch.randint = drawn

    return Trainer


def main() -> None:
    setting, turns = started()
    import_from(setting.peer)
    os.chdir(setting.peer)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    _empty("torchaudio")
    from diffusers import AutoencoderKL  # noqa: F401  before its own imports, which stumble otherwise

    package = _empty("extensions_built_in.diffusion_models.chroma")
    package.__path__ = [str(Path(setting.peer) / "extensions_built_in" / "diffusion_models" / "chroma")]
    without_other_models_(Path(setting.peer))
    from toolkit.job import get_job

    at_home_(Path(setting.model))
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"  # it writes its caches beside the pictures
        pictures.mkdir()
        for file in Path(setting.pictures).iterdir():
            (pictures / file.name).write_bytes(file.read_bytes())
        from dataclasses import replace

        config = config_of(replace(setting, pictures=str(pictures)), Path(folder) / "output")
        job = get_job(config)
        process = job.process[0]
        process.__class__ = trainer_class(turns)
        job.run()


if __name__ == "__main__":
    main()
