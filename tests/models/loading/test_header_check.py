"""Wrong files are refused by their headers: each by what it is, on the field that chose it, and nothing right is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from chroma_trainer.nodes.load_chroma import SPEC as LOAD_CHROMA
from chroma_trainer.nodes.load_flux import SPEC as LOAD_FLUX
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.loading.header_check import kind_of, part_fault
from chroma_trainer.trainer_core.models.loading.locate import weight_files
from safetensors.torch import load_file, save_file

BLOCKS = "_blocks."


@pytest.fixture
def save(tmp_path):
    def write(tensors, name="wrong.safetensors"):
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def parts(tiny_chroma):
    """parts("vae") are the tensors of the tiny Chroma's part."""

    def tensors(part):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        return load_file(tiny_chroma / part / f"{stem}.safetensors")

    return tensors


def fault(file, part, family="chroma", **config):
    return part_fault((file,), part, family, config)


def quantized(tensors, weight, scale, extra=None):
    """The transformer with every weight of its blocks as weight(t), beside it scale(t) and the extra tensors."""
    result = {}
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and BLOCKS in key:
            module = key.removesuffix(".weight")
            result |= {key: weight(tensor), f"{module}.weight_scale": scale(tensor)}
            result |= {f"{module}.{name}": value for name, value in (extra or {}).items()}
        else:
            result[key] = tensor
    return result


def fp8(tensor):
    return tensor.to(torch.float8_e4m3fn)


def blocks_of(size, dtype):
    return lambda tensor: torch.ones(tensor.shape[0], max(2, tensor.shape[1] // size), dtype=dtype)


def described(format):
    raw = json.dumps({"format": format}).encode()
    return {"comfy_quant": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}


def packed(tensor):
    return torch.zeros(tensor.shape[0], tensor.shape[1] // 2, dtype=torch.uint8)


def eight_bits(tensor):
    return tensor.to(torch.int8)


UNREADABLE = {
    "mxfp8": ((fp8, blocks_of(32, torch.uint8)), "mxfp8 (fp8, one scale for every 32 values)"),
    "mxfp8 cut": (
        (fp8, blocks_of(16, torch.uint8), described("mxfp8")),
        "mxfp8, but single_transformer_blocks.0.attn.to_k.weight_scale has 256 values instead of 512",
    ),
    "nvfp4": (
        (packed, blocks_of(16, torch.float8_e4m3fn), {"weight_scale_2": torch.ones(())}),
        "nvfp4 (4 bits, one scale for every 16 values)",
    ),
    "fp8 blocks": ((fp8, blocks_of(8, torch.float32)), "fp8 with one scale for each block of a weight"),
    "int8": (
        (eight_bits, blocks_of(64, torch.float32), described("int8_convrot")),
        "'int8_convrot', an unknown format, in single_transformer_blocks.0.attn.to_k",
    ),
    "int8 per row": ((eight_bits, lambda t: torch.ones(t.shape[0], 1)), "int8"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_block_scales_are_refused_by_name(save, parts, tiny_model, monkeypatch, name):
    arguments, storage = UNREADABLE[name]
    file = save(quantized(parts("transformer"), *arguments))
    expected = f"is quantized as {storage}, which can't be read here; use a bf16, fp8, fp8_scaled, mxfp8, nvfp4, int8 or nf4 file, or a GGUF file of Q4_0 to Q8_0 or Q2_K to Q6_K"
    assert fault(file, "transformer") == expected
    problems = ChromaFamily().problems(replace(tiny_model, transformer_file=str(file)))
    assert [str(problem) for problem in problems] == [f"wrong.safetensors: {expected} ({file})"]


@pytest.mark.parametrize(
    ("keys", "storage"),
    [
        (("weight.absmax", "weight.quant_map"), "nf4 or fp4 of bitsandbytes"),
        (("qweight", "wscales"), "int4 of Nunchaku (SVDQuant)"),
        (("qweight", "qzeros"), "int4 of GPTQ or AWQ"),
        (("weight._data", "weight._scale"), "a format of optimum-quanto"),
    ],
)
def test_packed_formats_are_refused_by_name(save, parts, keys, storage):
    extra = {f"transformer_blocks.0.attn.to_q.{key}": torch.zeros(4) for key in keys}
    assert fault(save(parts("transformer") | extra), "transformer").startswith(f"is quantized as {storage}, ")


@pytest.mark.parametrize(
    "scale", [lambda t: torch.ones(()), lambda t: torch.ones(t.shape[0]), lambda t: torch.ones(t.shape[0], 1)]
)
def test_fp8_with_a_scale_for_a_weight_or_a_row_is_read(save, parts, tiny_model, scale):
    file = save(quantized(parts("transformer"), fp8, scale, described("float8_e4m3fn")))
    assert fault(file, "transformer") == ""
    ChromaFamily().load_transformer(replace(tiny_model, transformer_file=str(file)))


def test_radiance_is_called_by_its_name(save):
    keys = ("distilled_guidance_layer.in_proj.weight", "img_in_patch.weight", "nerf_blocks.0.param_generator.weight")
    for prefix in ("", "model.diffusion_model."):
        file = save({prefix + key: torch.zeros(8, 8) for key in keys})
        assert fault(file, "transformer") == (
            "is a Chroma Radiance transformer, which works on pixels; choose its file as diffusion_model of LoadChroma"
        )
        assert fault(file, "transformer", family="flux") == (
            "is a Chroma Radiance transformer, not a Flux.1 transformer; use LoadChroma for it"
        )
        assert fault(file, "transformer", family="radiance") == ""


def test_t5_1_0(save, parts, tiny_model):
    tensors = {key.replace("wi_0", "wi"): t for key, t in parts("text_encoder").items() if "wi_1" not in key}
    file = save(tensors)
    assert fault(file, "text_encoder") == (
        "is a text encoder T5 1.0 (such as t5_base of Stable Audio), whose layers differ from those of T5 1.1; use a "
        "T5-XXL text encoder (t5xxl)"
    )
    (problem, *_) = ChromaFamily().problems(replace(tiny_model, text_encoder_file=str(file)))
    assert "T5 1.0" in problem.message


def test_umt5(save, parts):
    key = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert fault(save(parts("text_encoder") | {key: torch.zeros(32, 4)}), "text_encoder").startswith(
        "is the text encoder UMT5"
    )


def test_vaes(save, parts):
    tensors = parts("vae")
    decoder = {key: tensor for key, tensor in tensors.items() if not key.startswith("encoder.")}
    assert fault(save(decoder), "vae", norm_num_groups=4).startswith("has no encoder, only the decoder, so images")
    for channels, name in ((4, "a VAE of Stable Diffusion 1, 2 or XL"), (32, "the VAE of Flux.2"), (8, "another VAE")):
        other = tensors | {"decoder.conv_in.weight": torch.zeros(8, channels, 3, 3)}
        assert fault(save(other), "vae") == (
            f"is {name}: it has {channels} latent channels instead of 16; use the VAE of Flux.1 (ae.safetensors)"
        )
    video = tensors | {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3, 3)}
    assert fault(save(video), "vae").startswith("is a VAE of a video model")
    fewer = {key: tensor for key, tensor in tensors.items() if ".down_blocks.3." not in key}
    assert fault(save(fewer), "vae").startswith("reduces images by 4 instead of 8 (3 levels)")


def test_a_vae_whose_norms_do_not_fit(save, parts):
    file = save(parts("vae"))
    assert fault(file, "vae", norm_num_groups=4) == ""
    assert fault(file, "vae") == (
        "has layers of 8 channels, which 32 groups do not divide; put its config.json (with norm_num_groups) beside it"
    )


@pytest.mark.parametrize(
    ("key", "part", "message"),
    [
        ("transformer.x.lora_A.weight", "transformer", "is a LoRA, not a Chroma transformer; choose another file"),
        ("model.diffusion_model.input_blocks.0.0.weight", "transformer", "is a U-Net of Stable Diffusion, not a Chroma"),
        ("double_blocks.0.img_mod.lin.weight", "transformer", "is a Flux.1 transformer, not a Chroma transformer; use LoadFlux"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "vae", "is a T5 text encoder, not the VAE of Flux.1"),
        ("text_model.embeddings.token_embedding.weight", "text_encoder", "is a CLIP text encoder, not a T5-XXL"),
        ("model.layers.0.self_attn.q_proj.weight", "text_encoder", "is a language model (such as Qwen"),
        ("decoder.middle.0.residual.0.gamma", "vae", "is a VAE of a video model (such as Wan"),
        ("taesd_decoder.1.weight", "vae", "is a tiny VAE for previews (TAESD)"),
        ("nonsense", "vae", ""),
    ],
)  # fmt: skip
def test_another_file_is_called_by_its_name(save, key, part, message):
    text = fault(save({key: torch.zeros(2, 2)}), part)
    assert text.startswith(message) and bool(text) == bool(message)


def test_clip_g_and_chroma_in_loadflux(save, tiny_flux_model, parts):
    layers = {"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2)}
    layers["text_model.encoder.layers.31.mlp.fc1.weight"] = torch.zeros(2, 2)
    assert fault(save(layers), "clip", "flux").startswith("is the text encoder CLIP-G")
    text = fault(save(parts("transformer")), "transformer", "flux")
    assert text == "is a Chroma transformer, not a Flux.1 transformer; use LoadChroma for it"
    assert FluxFamily().problems(tiny_flux_model) == []


def test_nothing_right_is_refused(tiny_chroma, tiny_flux):
    nano = ASSETS / "chroma-nano"
    for folder, family, names in (
        (tiny_chroma, "chroma", {"transformer": "transformer", "text_encoder": "text_encoder", "vae": "vae"}),
        (nano, "chroma", {"transformer": "transformer", "text_encoder": "text_encoder", "vae": "vae"}),
        (tiny_flux, "flux", {"transformer": "transformer", "text_encoder": "text_encoder_2", "clip": "text_encoder"}),
    ):
        for part, name in names.items():
            files = weight_files(folder / name)
            config = json.loads((folder / name / "config.json").read_text("utf-8"))
            assert files and part_fault(files, part, family, config) == ""


def test_damage_is_left_to_the_loading(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    assert fault(tmp_path / "a.safetensors", "vae") == "" and kind_of([]) == ""


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_weight_map(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: has no weight_map"):
        weight_files(tmp_path)


def test_an_index_whose_files_are_missing_or_elsewhere(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}', "utf-8")
    with pytest.raises(UserError, match=r"names 1 files that do not exist, such as gone\.safetensors"):
        weight_files(tmp_path)
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}', "utf-8")
    with pytest.raises(UserError, match="names a file outside of its folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize(("spec", "field"), [(LOAD_CHROMA, "text_encoder"), (LOAD_FLUX, "t5")])
def test_the_problem_is_on_the_field_that_chose_the_file(tmp_path, save, spec, field):
    file = save(
        {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3), "text_model.x": torch.zeros(1)}, "model.safetensors"
    )
    (tmp_path / "text_encoders").mkdir()
    file.rename(tmp_path / "text_encoders" / "clip.safetensors")
    paths = Paths(output=tmp_path, cache=tmp_path, models={"text_encoders": (tmp_path / "text_encoders",)})
    save({"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2)}, "text_encoders/clip.safetensors")
    with pytest.raises(UserError) as caught:
        spec.run(spec.inputs(**{field: "clip.safetensors"}), SinkHost(paths=paths))
    (problem,) = caught.value.problems
    assert problem.field == field and problem.message.startswith(
        "clip.safetensors is a CLIP text encoder, not a T5-XXL"
    )


def test_a_folders_parts_are_checked_too(tmp_path, tiny_chroma):
    import shutil

    shutil.copytree(tiny_chroma, tmp_path / "diffusers" / "mine")
    (tmp_path / "diffusers/mine/vae/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusers/mine/vae/model.safetensors.index.json").write_text("{}", "utf-8")
    paths = Paths(output=tmp_path, cache=tmp_path, models={"diffusers": (tmp_path / "diffusers",)})
    with pytest.raises(UserError) as caught:
        LOAD_CHROMA.run(LOAD_CHROMA.inputs(folder="mine"), SinkHost(paths=paths))
    (problem,) = caught.value.problems
    assert problem.field == "folder" and "has no weight_map" in problem.message
