"""Text: the rule of length, the tokenizer's two formats and where it is found, single files, and fp16's exception."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import ASSETS
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.t5.modules import T5Encoder, distance_buckets
from chroma_trainer.trainer_core.models.t5.text_encoder import T5TextEncoder, load_t5
from chroma_trainer.trainer_core.models.t5.tokenizer import COMFYUI_FOLDER, find_tokenizer, read_tokenizer
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
    block = half.model.encoder.block[0].layer[1].DenseReluDense
    assert block.wo.weight.dtype == torch.float32  # overflows in fp16
    assert block.wi_0.weight.dtype == torch.float16
    assert half.encode(["a cat"])[0].dtype == torch.float16
    assert load_t5(replace(tiny_model, dtype="bf16"), CPU).encode(["a cat"])[0].dtype == torch.bfloat16


def test_buckets_of_distances_are_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(distances, num_buckets=32, max_distance=128)
    assert torch.equal(distance_buckets(distances, 32, 128), theirs)


def test_other_kinds_of_t5_are_refused():
    with pytest.raises(UserError, match="is a T5 with 'relu' feed-forward layers"):
        T5Encoder({**load_shipped_config("t5_xxl"), "feed_forward_proj": "relu"})


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
    with torch.device("meta"):
        model = T5Encoder(load_shipped_config("t5_xxl"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656


# --- the tokenizer ---


def test_where_the_tokenizer_is_found(tiny_model, tiny_chroma, tmp_path):
    """In the order in which it is looked for: beside the file, in the repo, in a ComfyUI above the file."""
    models = tmp_path / "ComfyUI" / "models" / "text_encoders"
    models.mkdir(parents=True)
    model = replace(tiny_model, repo="", text_encoder_file=str(models / "t5.safetensors"))
    with pytest.raises(
        UserError, match=r"tokenizer was not found; put tokenizer\.json or spiece\.model .* into .*text_enc"
    ):
        find_tokenizer(model)
    places = [tmp_path / "ComfyUI" / COMFYUI_FOLDER, models, models / "t5_tokenizer", models / "tokenizer"]
    for folder in places:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_chroma / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
        assert find_tokenizer(model) == folder / "tokenizer.json"
    assert find_tokenizer(tiny_model) == tiny_chroma / "tokenizer" / "tokenizer.json"


def test_same_ids_as_transformers(tiny_chroma):
    from transformers import PreTrainedTokenizerFast

    ours = read_tokenizer(tiny_chroma / "tokenizer" / "tokenizer.json")
    theirs = PreTrainedTokenizerFast.from_pretrained(tiny_chroma / "tokenizer")
    for prompt in PROMPTS:
        assert ours.encode(prompt).ids == theirs(prompt)["input_ids"]


@pytest.mark.parametrize("prompt", ["Red Apple", "NEONGLOW style, Cat Face", "NeonGlow ﬁsh, Ⅳ"])
def test_the_normaliser_in_tokenizer_json_is_followed(prompt):
    """chroma-nano's vocabulary has no capitals; transformers' T5 classes drop the normaliser and would give unknowns."""
    from transformers import AutoTokenizer

    folder = ASSETS / "chroma-nano" / "tokenizer"
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode(prompt).ids
    assert ids == tokenizer.encode(prompt.lower()).ids == AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    assert tokenizer.token_to_id("<unk>") not in ids


def protobuf_field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """A ModelProto by hand: pieces (text, score, type), a trainer's field to skip, a normaliser without a table."""
    data = b""
    for text, score in pieces:
        piece = protobuf_field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + bytes([3 << 3, 1])
        data += protobuf_field(1, piece)
    return data + protobuf_field(2, bytes([3 << 3, 1])) + protobuf_field(3, protobuf_field(1, b"nmt_nfkc"))


def test_spiece_model_gives_the_same_ids(tiny_chroma, tmp_path):
    reference = read_tokenizer(tiny_chroma / "tokenizer" / "tokenizer.json")
    vocabulary = sorted(reference.get_vocab().items(), key=lambda item: item[1])
    import json

    scores = json.loads((tiny_chroma / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    file = tmp_path / "spiece.model"
    file.write_bytes(sentencepiece_model([(piece, score) for piece, score in scores]))
    tokenizer = read_tokenizer(file)
    assert tokenizer.get_vocab_size() == len(vocabulary) + 100
    assert tokenizer.token_to_id("<extra_id_0>") == len(vocabulary) + 99
    for prompt in ["", "a cat", "the  red   dog of the blue photo, sleeping"]:
        assert tokenizer.encode(prompt).ids == reference.encode(" ".join(prompt.split())).ids


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\x0a\x7f short", b"\x0b"])
def test_damaged_spiece_model(tmp_path, data):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(UserError, match=r"spiece\.model: is not a readable tokenizer: "):
        read_tokenizer(tmp_path / "spiece.model")


def test_damaged_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a readable tokenizer: "):
        read_tokenizer(tmp_path / "tokenizer.json")
