"""Flux's text: both encoders as the pipeline calls them, the rule of length, and their files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.config.serialize import to_record
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.flux.text_encoder import flux_text_identity, join, load_flux_text, part
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.text.clip import build_clip, load_clip
from chroma_trainer.trainer_core.models.text.tokenizer import CLIP_IN_COMFYUI, find_clip_tokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from tests.conftest import write_clip_pair

FAMILY = FluxFamily()
CPU = torch.device("cpu")
PROMPTS = ["", "a red cat", "The CAT of the blue photo's 7 dogs, and many more words than it has places for"]


def padded(tokenizer, prompt: str, length: int, pad: int) -> torch.Tensor:
    ids = tokenizer(prompt).input_ids
    ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
    return torch.tensor([ids + [pad] * (length - len(ids))])


@torch.no_grad()
def test_pooled_text_is_transformers(tiny_flux_model):
    """They pad with the end token; the first of them is pooled."""
    theirs = CLIPTextModel.from_pretrained(tiny_flux_model.repo, subfolder="text_encoder").eval()
    ours = load_clip(tiny_flux_model, CPU)
    assert ours.max_tokens == 20
    end = ours.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for prompt, pooled in zip(PROMPTS, ours.encode(PROMPTS), strict=True):
        wanted = theirs(padded(ours.tokenizer, prompt, 20, end)).pooler_output[0]
        torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_are_t5s_without_a_mask(tiny_flux_model):
    theirs = T5EncoderModel.from_pretrained(tiny_flux_model.repo, subfolder="text_encoder_2").eval()
    encoder = FAMILY.load_text_encoder(tiny_flux_model, CPU)
    pooled = encoder.clip.encode(PROMPTS)
    for prompt, rows, vector in zip(PROMPTS, encoder.encode(PROMPTS), pooled, strict=True):
        ids = padded(encoder.t5.tokenizer, prompt, 24, 0)
        wanted = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        assert rows.shape == (25, 32)
        torch.testing.assert_close(rows[:-1], wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(rows[-1, :16], vector) and not rows[-1, 16:].any()


def test_a_masked_flavour_keeps_the_real_tokens_alone(tiny_flux_model):
    """The encoder still sees all pads: they decide what it says of the real tokens."""
    masked = replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, is_masked=True))
    whole, cut = (FAMILY.load_text_encoder(m, CPU).encode(PROMPTS) for m in (tiny_flux_model, masked))
    for prompt, all_rows, rows in zip(PROMPTS, whole, cut, strict=True):
        real = min(24, len(FAMILY.load_text_encoder(masked, CPU).t5.tokenizer(prompt).input_ids))
        assert len(rows) == real + 1
        assert torch.equal(rows[:-1], all_rows[:real]) and torch.equal(rows[-1], all_rows[-1])
    assert FAMILY.identity(masked, "text_encoder") != FAMILY.identity(tiny_flux_model, "text_encoder")


def test_join_and_part_are_inverse():
    tokens, pooled = torch.randn(2, 3, 8), torch.randn(2, 5)
    rows = [join(*both) for both in zip(tokens, pooled, strict=True)]
    assert torch.equal(torch.stack(part(rows, 5)[0]), tokens) and torch.equal(part(rows, 5)[1], pooled)


@pytest.fixture
def pair(tmp_path) -> Path:
    return write_clip_pair(tmp_path / "pair")


def test_a_single_clip_file_and_comfyuis_tokenizer(tiny_flux_model, tiny_flux, pair, tmp_path):
    """clip_l.safetensors: `text_model.` before every key, and what pooling needs not."""
    root = tmp_path / "ComfyUI"
    file = root / "models" / "text_encoders" / "clip_l.safetensors"
    file.parent.mkdir(parents=True)
    state = load_file(tiny_flux / "text_encoder" / "model.safetensors")
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    save_file({**state, "text_projection.weight": torch.zeros(16, 16), "logit_scale": torch.zeros(())}, file)
    shutil.copy(tiny_flux / "text_encoder" / "config.json", file.parent / "config.json")  # of the tiny one's 2 heads
    shutil.copytree(pair, root / CLIP_IN_COMFYUI)
    model = replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, clip_file=str(file)))
    assert find_clip_tokenizer(replace(model, repo="")) == (
        root / CLIP_IN_COMFYUI / "vocab.json",
        root / CLIP_IN_COMFYUI / "merges.txt",
    )
    for one, other in zip(
        load_clip(model, CPU).encode(PROMPTS), load_clip(tiny_flux_model, CPU).encode(PROMPTS), strict=True
    ):
        assert torch.equal(one, other)
    assert FAMILY.problems(model) == []


def test_a_clip_that_transformers_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"is a CLIP that transformers can't build: .*'sine'"):
        build_clip({**load_shipped_config("clip_l"), "hidden_act": "sine"})


def test_what_is_missing_is_named(tiny_flux_model, tiny_flux, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tiny_flux, folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "text_encoder")
    found = "\n".join(str(problem) for problem in FAMILY.problems(replace(tiny_flux_model, repo=str(folder))))
    assert "has no folder 'text_encoder'" in found and "CLIP's tokenizer was not found; put vocab.json" in found
    with pytest.raises(UserError, match="is not a CLIP-L text encoder"):
        wrong = str(tiny_flux / "vae" / "diffusion_pytorch_model.safetensors")
        load_clip(replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, clip_file=wrong)), CPU)


def test_padding_of_zeros(tiny_flux_model):
    zeroed = replace(tiny_flux_model, flux=replace(tiny_flux_model.flux, t5_padding="zero"))
    plain, zeros = (load_flux_text(model, CPU).encode(PROMPTS) for model in (tiny_flux_model, zeroed))
    for prompt, one, other in zip(PROMPTS, plain, zeros, strict=True):
        count = len(load_flux_text(tiny_flux_model, CPU).t5.tokenizer(prompt).input_ids)
        assert torch.equal(one[:count], other[:count]) and torch.equal(
            one[-1], other[-1]
        )  # the caption, and CLIP's row
        assert count >= len(one) - 1 or (one[count:-1].any() and not other[count:-1].any())
    assert any(len(rows) - 1 > 20 and not rows[20:-1].any() for rows in zeros)
    assert flux_text_identity(zeroed) != flux_text_identity(tiny_flux_model)
    assert "t5_padding" not in to_record(tiny_flux_model.flux) and to_record(zeroed.flux)["t5_padding"] == "zero"


def test_padding_that_is_masked_is_neither(tiny_flux_model):
    options = replace(tiny_flux_model.flux, is_masked=True)
    masked, zeroed = (replace(tiny_flux_model, flux=replace(options, t5_padding=p)) for p in ("unmodified", "zero"))
    assert flux_text_identity(masked) == flux_text_identity(zeroed)
