"""T5's text: the rule of length, the mask, single files, quantised layers, and fp16's exception."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.text.t5 import T5TextEncoder, build_t5, empty_t5, load_t5, t5_config
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

CPU = torch.device("cpu")
PROMPTS = ["", "a cat", "the red dog of the blue photo, sleeping", "Ünknown ▁ signs 猫"]


@pytest.fixture
def encoder(tiny_model) -> T5TextEncoder:
    return load_t5(tiny_model, CPU)


def test_real_tokens_and_one_pad(encoder):
    ids, num_real = encoder.token_ids("a cat")
    assert ids == [3, 5, 1, 0] and num_real == 3  # a, cat, end, pad
    assert encoder.token_ids("") == ([1, 0], 1)
    for prompt, tokens in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        assert len(tokens) == len(encoder.token_ids(prompt)[0])


def test_a_long_prompt_is_cut_and_keeps_its_end(encoder):
    ids, num_real = encoder.token_ids("cat " * 600)
    assert len(ids) == num_real == 512 and ids[-1] == 1  # no room for a pad
    ids, num_real = encoder.token_ids("cat " * 509 + "cat")
    assert len(ids) == 512 and num_real == 511 and ids[-2:] == [1, 0]
    assert encoder.encode(["cat " * 600])[0].shape == (512, 32)


def test_equals_the_pipelines_padding_to_512(encoder, tiny_chroma):
    """diffusers: pad to 512, give the encoder the tokenizer's mask, keep the real tokens and one pad."""
    reference = T5EncoderModel.from_pretrained(tiny_chroma / "text_encoder").double()
    encoder.model.double()
    for prompt, ours in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        ids, num_real = encoder.token_ids(prompt)
        padded = torch.tensor([ids[:num_real] + [0] * (512 - num_real)])
        mask = (torch.arange(512) < num_real)[None].long()
        theirs = reference(padded, attention_mask=mask)[0][0, : num_real + 1]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # theirs has a softmax in fp32


def test_an_embedding_does_not_depend_on_its_company(encoder):
    together = encoder.encode(PROMPTS)
    assert all(torch.equal(a, encoder.encode([prompt])[0]) for a, prompt in zip(together, PROMPTS, strict=True))


def test_dtypes(tiny_model):
    half = load_t5(replace(tiny_model, dtype="fp16"), CPU)
    block = half.model.get_submodule("encoder.block.0.layer.1.DenseReluDense")
    assert block.get_parameter("wo.weight").dtype == torch.float32  # overflows in fp16
    assert block.get_parameter("wi_0.weight").dtype == torch.float16
    assert half.encode(["a cat"])[0].dtype == torch.float16
    assert load_t5(replace(tiny_model, dtype="bf16"), CPU).encode(["a cat"])[0].dtype == torch.bfloat16


def test_other_kinds_of_t5_are_refused():
    with pytest.raises(UserError, match="is a T5 with 'relu' feed-forward layers"):
        build_t5({**load_shipped_config("t5_xxl"), "feed_forward_proj": "relu"})


# --- single files ---


def single_file(tiny_model, tiny_chroma, tmp_path, change=lambda state: state, repo=""):
    """text_encoders/t5.safetensors with a folder `tokenizer` beside it."""
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    state = load_file(tiny_chroma / "text_encoder" / "model.safetensors")
    save_file(change(dict(state)), folder / "t5.safetensors")
    shutil.copytree(tiny_chroma / "tokenizer", folder / "tokenizer")
    return replace(tiny_model, repo=repo, text_encoder_file=str(folder / "t5.safetensors"))


def scaled(state):
    """ComfyUI's t5xxl_fp8_e4m3fn_scaled."""
    result = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        if tensor.ndim != 2 or "relative" in key or "shared" in key:
            result[key] = tensor
            continue
        scale = tensor.abs().max() / 448
        result[key] = (tensor / scale).to(torch.float8_e4m3fn)
        result[key.replace(".weight", ".scale_weight")] = scale
    return result


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,
        lambda state: {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in state.items()},
        lambda state: {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()},
        lambda state: {key.replace("shared", "encoder.embed_tokens"): tensor for key, tensor in state.items()},
        lambda state: {**state, "decoder.final_layer_norm.weight": torch.zeros(32), "lm_head.weight": torch.zeros(2)},
    ],
    ids=["comfyui", "prefix", "both tables", "other table", "with decoder"],
)
def test_single_files_embed_the_same(encoder, tiny_model, tiny_chroma, tmp_path, change):
    single = load_t5(single_file(tiny_model, tiny_chroma, tmp_path, change), CPU)
    assert all(torch.equal(a, b) for a, b in zip(single.encode(PROMPTS), encoder.encode(PROMPTS), strict=True))


def test_scaled_fp8_is_multiplied_out(encoder, tiny_model, tiny_chroma, tmp_path):
    single = load_t5(single_file(tiny_model, tiny_chroma, tmp_path, scaled), CPU)
    for ours, exact in zip(single.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        assert (ours - exact).norm() < 0.1 * exact.norm()


def test_missing_weights_are_named(tiny_model, tiny_chroma, tmp_path):
    def cut(state):
        del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
        return state

    with pytest.raises(UserError, match=r"does not match a T5 text encoder; keys: 1 missing \(encoder\.block\.1"):
        load_t5(single_file(tiny_model, tiny_chroma, tmp_path, cut), CPU)


def test_the_shipped_config_is_t5_xxl():
    model = build_t5(load_shipped_config("t5_xxl"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656
    assert all(parameter.is_meta for parameter in model.parameters())


def test_both_names_of_the_table_are_one_tensor(encoder):
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight


def test_the_config_alone_gives_the_shapes(tiny_model, encoder):
    empty = empty_t5(tiny_model)
    assert empty.state_dict().keys() == encoder.model.state_dict().keys()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert t5_config(tiny_model)["d_model"] == 32


def test_building_and_loading_draw_no_random_numbers(tiny_model):
    before = torch.get_rng_state()
    load_t5(tiny_model, CPU)
    assert torch.equal(torch.get_rng_state(), before)
