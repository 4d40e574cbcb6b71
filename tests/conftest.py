"""Fixtures that every test may use: a tiny random Chroma, the real architecture at toy widths, in diffusers layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Chroma: hidden 64 (4 heads x 16), 2 double and 2 single blocks, T5 of width 32,
    16-channel VAE of factor 8.

    Read-only by agreement: a test that changes files copies the folder first.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-chroma"
    write_tiny_chroma(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_chroma: Path):
    """ModelConfig of the tiny Chroma, in fp32."""
    from chroma_trainer.trainer_core.config.model import ModelConfig

    return ModelConfig(family="chroma", flavour="tiny", repo=str(tiny_chroma), dtype="fp32")


def write_tiny_chroma(folder: Path, seed: int = 0) -> None:
    """The whole model, from a seed: the same bytes each time."""
    import torch
    from diffusers import AutoencoderKL, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel

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
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        tokenizer = tiny_tokenizer()
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=tokenizer.get_vocab_size(),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                tie_word_embeddings=False,
            )
        )
        for name, parameter in (*transformer.named_parameters(), *text_encoder.named_parameters()):
            if "norm" in name:  # ones would hide a norm that is loaded wrongly
                parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}\n',
        encoding="utf-8",
    )
    (folder / "model_index.json").write_text(
        '{"_class_name": "ChromaPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], '
        '"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"], '
        '"transformer": ["diffusers", "ChromaTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}\n',
        encoding="utf-8",
    )


def tiny_tokenizer():
    """T5's rules (unigram, `▁` for spaces, `</s>` at the end) over letters and a few words."""
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
