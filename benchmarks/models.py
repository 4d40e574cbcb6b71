"""Models and pictures to measure with: the real classes with random, seeded weights, written once to a cache folder.

    tiny    4 heads x 32 (RoPE axes 8, 12, 12), 2 + 4 blocks, T5 64 wide, approximator 64
    medium  12 x 64 (16, 24, 24), 4 + 8 blocks, T5 256 wide, approximator 768

`python benchmarks/models.py tiny medium` writes them and says where they are.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
TOKENIZER = PROJECT / "assets" / "chroma-nano" / "tokenizer"
WORDS = [
    "red",
    "blue",
    "green",
    "fox",
    "cat",
    "dog",
    "glass",
    "paper",
    "neon",
    "wooden",
    "photo",
    "drawing",
    "of",
    "with",
    "under",
    "behind",
    "a",
    "the",
    "small",
    "large",
]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 4, "head": 32, "axes": (8, 12, 12), "double": 2, "single": 4, "text": 64, "approximator": 64},
    "medium": {"heads": 12, "head": 64, "axes": (16, 24, 24), "double": 4, "single": 8, "text": 256, "approximator": 768},
}  # fmt: skip
VAE_CHANNELS = (32, 64, 128, 128)


def cache_folder() -> Path:
    """CHROMA_TRAINER_BENCHMARKS, or a folder among the system's temporary ones."""
    return Path(
        os.environ.get("CHROMA_TRAINER_BENCHMARKS") or Path(tempfile.gettempdir()) / "chroma-trainer-benchmarks"
    )


def model_folder(size: str, seed: int = 0) -> Path:
    """A diffusers folder with the model of this size; written where it is not there yet."""
    folder = cache_folder() / f"{size}-{seed}"
    if not (folder / "model_index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _write_model(folder, SIZES[size], seed)
    return folder


def _write_model(folder: Path, size: dict[str, Any], seed: int) -> None:
    import torch
    from diffusers import AutoencoderKL, ChromaTransformer2DModel
    from tokenizers import Tokenizer
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ChromaTransformer2DModel(
            in_channels=64, num_layers=size["double"], num_single_layers=size["single"],
            attention_head_dim=size["head"], num_attention_heads=size["heads"], joint_attention_dim=size["text"],
            axes_dims_rope=size["axes"], approximator_num_channels=64, approximator_hidden_dim=size["approximator"],
            approximator_layers=5,
        ).save_pretrained(folder / "transformer")  # fmt: skip
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=VAE_CHANNELS, layers_per_block=2, norm_num_groups=32, latent_channels=16,
            shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False,
        ).save_pretrained(folder / "vae")  # fmt: skip
        vocabulary = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).get_vocab_size()
        T5EncoderModel(
            T5Config(
                vocab_size=vocabulary, d_model=size["text"], d_kv=32, d_ff=size["text"] * 5 // 2, num_layers=6,
                num_heads=max(2, size["text"] // 32), feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        ).save_pretrained(folder / "text_encoder")  # fmt: skip
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "ChromaPipeline"}\n', encoding="utf-8")


def picture_folder(count: int, edge: int, mixed: bool = True, seed: int = 0, words: tuple[int, int] = (4, 30)) -> Path:
    """`count` PNG pictures with captions of so many words; mixed: of five shapes with an area of about edge^2."""
    import numpy as np
    from PIL import Image

    kind = f"{'mixed' if mixed else 'square'}-{seed}" + ("" if words == (4, 30) else f"-{words[0]}-{words[1]}")
    folder = cache_folder() / f"pictures-{count}-{edge}-{kind}"
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(count):
        aspect = (1.0, 1.5, 0.66, 1.33, 0.75)[i % 5] if mixed else 1.0
        size = max(16, round(edge * aspect**0.5)), max(16, round(edge / aspect**0.5))
        coarse = draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)  # smooth, as photographs are, so that PNG packs it
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:06}.png", compress_level=1)
        text = " ".join(draw.choice(WORDS, int(draw.integers(*words))))
        (folder / f"{i:06}.txt").write_text(text, encoding="utf-8")
    (folder / "complete").write_text("", encoding="utf-8")
    return folder


def request(model: Path, pictures: Path, resolution: int, memory: dict[str, Any] | None = None, **training: Any) -> Any:
    """A TrainRequest in fp32 for a model and pictures of this module."""
    from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
    from chroma_trainer.trainer_core.config.memory import MemoryConfig
    from chroma_trainer.trainer_core.config.model import ModelConfig
    from chroma_trainer.trainer_core.config.request import TrainRequest
    from chroma_trainer.trainer_core.config.training import TrainingConfig

    values = {
        "name": "benchmark", "rank": 16, "alpha": 16.0, "targets": "all+ffs", "steps": 1_000_000, "warmup_steps": 0,
        "gradient_checkpointing": False, "checkpoint_every": 0,
    } | training  # fmt: skip
    return TrainRequest(
        ModelConfig(family="chroma", flavour="benchmark", repo=str(model), dtype="fp32"),
        DatasetConfig(parts=(FolderConfig(folder=str(pictures), resolution=resolution),), roots=(str(pictures),)),
        TrainingConfig(**values),
        memory=MemoryConfig(**(memory or {})),
    )


def host(output: Path, cache: Path | None = None) -> Any:
    """A host that shows nothing, on the CPU."""
    from chroma_trainer.trainer_core.host import Paths, SinkHost

    return SinkHost(paths=Paths(output=output, cache=cache or cache_folder() / "cache"), device="cpu")


def surroundings() -> dict[str, Any]:
    """What a figure depends on."""
    import torch

    names = ("torch", "diffusers", "transformers", "peft")
    return {
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def hardware() -> str:
    """The processor's name and the number of its cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["tiny"], help=f"of {', '.join(SIZES)}")
    for size in parser.parse_args().sizes:
        print(model_folder(size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
