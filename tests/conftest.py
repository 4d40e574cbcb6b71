"""Fixtures for all tests: tiny random Chroma and Flux models with the real architecture, in diffusers layout."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may access the Hugging Face Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower on tiny tensors


pytest_plugins = ["tests.workshop", "tests.pictures", "tests.processor_time"]

# If set, all tests run on a second device in the host's memory. 1: as strict as CUDA; mps: like MPS. See
# tests/device/second.py.
SECOND = "CHROMA_TRAINER_SECOND_DEVICE"
DEVICE = "second" if os.environ.get(SECOND) else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE != "cpu":
        sys.path.insert(0, str(Path(__file__).with_name("device")))
        import second

        library = second.register(second.folder())
        second.as_mps(library) if os.environ[SECOND] == "mps" else second.as_cuda()


def pytest_collection_finish() -> None:
    gc.freeze()  # a full garbage collection scans 60 ms of pytest's and the libraries' objects, and runs collect often


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def tiny_chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Chroma.

    It has hidden size 64 (4 heads x 16), 2 double and 2 single blocks, a T5 of width 32, and a 16-channel VAE of
    factor 8.

    Tests must not write to it; a test that changes files copies the folder first.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-chroma"
    write_tiny_chroma(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_chroma: Path):
    """ModelConfig of the tiny Chroma, in fp32."""
    from chroma_trainer.trainer_core.config.model import ModelConfig

    return ModelConfig(family="chroma", flavour="tiny", repo=str(tiny_chroma), dtype="fp32")


@pytest.fixture(scope="session")
def tiny_chroma_model(tiny_model):
    return tiny_model


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Flux with guidance.

    It has the tiny Chroma's dimensions, and a CLIP of width 16 besides the T5. Tests must not write to it.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    write_tiny_flux(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux_model(tiny_flux: Path):
    """ModelConfig of the tiny Flux, in fp32, with 24 text tokens."""
    return flux_model(tiny_flux)


@pytest.fixture(scope="session")
def tiny_radiance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a tiny random Radiance, as released: the tiny Chroma's blocks, a linear head. Tests must not write to it."""
    file = tmp_path_factory.mktemp("models") / "tiny-radiance.safetensors"
    write_tiny_radiance(file)
    return file


@pytest.fixture(scope="session")
def tiny_radiance_model(tiny_radiance: Path, tiny_chroma: Path):
    """ModelConfig of the tiny Radiance, in fp32, with the tiny Chroma's text encoder."""
    return radiance_model(tiny_radiance, tiny_chroma)


def radiance_model(file: Path, repo: Path):
    from chroma_trainer.trainer_core.config.model import ModelConfig

    return ModelConfig(family="radiance", flavour="radiance", repo=str(repo), transformer_file=str(file), dtype="fp32")


TINY_RADIANCE = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 2,
    "nerf_hidden_size": 8, "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 3,
}  # fmt: skip


def write_tiny_radiance(
    file: Path, conv_head: bool = False, x0: bool = False, sequential: bool = False, seed: int = 0, prefix: str = ""
) -> None:
    """Write a random Radiance with the keys of released files, from a seed.

    Args:
        conv_head: Its last layer is a convolution.
        x0: It predicts clean images, which an empty tensor says.
        sequential: Its text tokens have positions, which an empty tensor says.
        prefix: Before each key.
    """
    import torch
    from chroma_trainer.trainer_core.models.radiance.checkpoint_keys import SEQUENTIAL, X0, layout_of
    from chroma_trainer.trainer_core.models.radiance.transformer import RadianceTransformer
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = RadianceTransformer(**TINY_RADIANCE, has_conv_head=conv_head)
        vary_norms_(transformer)
    layout, rows = layout_of(transformer.inner_dim), {}
    for name, tensor in transformer.state_dict().items():
        keys, place = layout(name)
        rows.setdefault(keys[0], []).append((place.start or 0, tensor))
    tensors = {
        key: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])]) for key, parts in rows.items()
    }
    marks = [mark for mark, is_set in ((X0, x0), (SEQUENTIAL, sequential)) if is_set]
    tensors |= {mark: torch.empty(0) for mark in marks}
    save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def flux_model(folder: Path, **options: object):
    from chroma_trainer.trainer_core.config.flux import FluxOptions
    from chroma_trainer.trainer_core.config.model import ModelConfig

    flux = FluxOptions(**{"max_tokens": 24, **options})
    return ModelConfig(family="flux", flavour="dev", repo=str(folder), dtype="fp32", flux=flux)


def write_tiny_flux(folder: Path, seed: int = 1, guidance_embeds: bool = True) -> None:
    """Write a whole model, from a seed, in the layout of black-forest-labs' repositories."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        tokenizer, clip_tokenizer = tiny_tokenizer(), tiny_clip_tokenizer()
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_tokenizer.get_vocab_size(),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=20,
                bos_token_id=clip_tokenizer.token_to_id("<|startoftext|>"),
                eos_token_id=clip_tokenizer.token_to_id("<|endoftext|>"),
            )
        )
        t5, vae = tiny_t5(tokenizer), tiny_vae()
        vary_norms_(transformer, clip, t5)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    for name, rules in (("tokenizer", clip_tokenizer), ("tokenizer_2", tokenizer)):
        (folder / name).mkdir()
        rules.save(str(folder / name / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", '
        '"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 20}\n',
        encoding="utf-8",
    )
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(T5_TOKENIZER_CONFIG, encoding="utf-8")
    (folder / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], '
        '"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], '
        '"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5Tokenizer"], '
        '"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}\n',
        encoding="utf-8",
    )


def write_tiny_chroma(folder: Path, seed: int = 0) -> None:
    """Write a whole model, from a seed: the same bytes each time."""
    import torch
    from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChromaTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=64,
            approximator_hidden_dim=64,
            approximator_layers=2,
        )
        vae = tiny_vae()
        tokenizer = tiny_tokenizer()
        text_encoder = tiny_t5(tokenizer)
        vary_norms_(transformer, text_encoder)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(T5_TOKENIZER_CONFIG, encoding="utf-8")
    (folder / "model_index.json").write_text(
        '{"_class_name": "ChromaPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], '
        '"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"], '
        '"transformer": ["diffusers", "ChromaTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}\n',
        encoding="utf-8",
    )


T5_TOKENIZER_CONFIG = (
    '{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}\n'
)


def tiny_vae():
    """Return a random VAE of 16 channels and factor 8."""
    from diffusers import AutoencoderKL

    levels: dict[str, Any] = {  # which diffusers declares as tuples of one item
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def tiny_t5(tokenizer):
    """Return a random T5 encoder of width 32."""
    from transformers import T5Config, T5EncoderModel

    untied: dict[str, Any] = {"tie_word_embeddings": False}  # transformers 5 does not declare it
    return T5EncoderModel(
        T5Config(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **untied,
        )
    )


def vary_norms_(*modules) -> None:
    """Randomize the weights of norms, because ones would hide a norm that is loaded wrongly."""
    import torch

    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        if "norm" in name and parameter.ndim == 1:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))


def tiny_clip_tokenizer():
    """Return a tokenizer by CLIP's rules (lower case, byte pairs, start and end tokens): bytes and a few merges."""
    import tempfile

    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  # an alias in transformers 5

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:  # as files, which every version of transformers reads
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random CLIP with both towers, as transformers saves it. Tests must not write to it."""
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


def write_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write a random CLIP for images of 16 pixels, from a seed."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    tokenizer = tiny_clip_tokenizer()
    text = {
        "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 20,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"), "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=8))
        vary_norms_(model)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_clip_pair(folder: Path) -> Path:
    """The tiny tokenizer as CLIP's older files have it: vocab.json and merges.txt."""
    whole = json.loads(tiny_clip_tokenizer().to_str())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(m) if isinstance(m, list) else m for m in whole["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return folder


def tiny_tokenizer():
    """Return a tokenizer by T5's rules (unigram, `▁` for spaces, `</s>` at the end): letters and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["▁a", "▁the", "▁cat", "▁dog", "▁red", "▁blue", "▁photo", "▁of", "ing", "er"]
    letters = ["▁", *"etaoinshrdlcumwfgypbvkjxqz", *"ETAOINSHRDLCUMWFGYPBVKJXQZ", *"0123456789.,-_'!?:;()/"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(word, -2.0 - 0.01 * i) for i, word in enumerate(words)]
    vocabulary += [(letter, -5.0 - 0.01 * i) for i, letter in enumerate(letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
