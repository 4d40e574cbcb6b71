"""Single files in every layout in the wild load to the right weights, and a wrong file is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.keys import original_parameter
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.checkpoint_keys import TRANSFORMER
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading.weights import Weights, read_header
from safetensors.torch import load_file, save_file

FAMILY = ChromaFamily()
HIDDEN = 64


def diffusers_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def original_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tiny model's weights in ComfyUI's layout."""
    rows: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in diffusers_state(folder).items():
        key, place = original_parameter(name)
        rows.setdefault(key, []).append((place.part or 0, tensor))
    return {key: torch.cat([tensor for _, tensor in sorted(parts, key=lambda p: p[0])]) for key, parts in rows.items()}


def scaled_fp8(state: dict[str, torch.Tensor], scale_name: str, num_scales: str) -> dict[str, torch.Tensor]:
    """As ComfyUI writes them: Linears of the blocks in e4m3, with what they were divided by."""
    result = {}
    for key, tensor in state.items():
        if tensor.ndim != 2 or "_blocks." not in key:
            result[key] = tensor.bfloat16()
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if num_scales == "rows" else tensor.abs().max()
        scale = largest.float() / 448
        result[key] = (tensor / scale).to(torch.float8_e4m3fn)
        result[key.replace(".weight", f".{scale_name}")] = scale
    return result


@pytest.fixture
def single(tiny_model, tmp_path):
    """Writes a state as a single file; gives the transformer loaded from it."""

    def load(state, dtype="fp32"):
        file = tmp_path / "single.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
        model = replace(tiny_model, transformer_file=str(file), dtype=dtype)
        return FAMILY.load_transformer(model)

    return load


def velocity(transformer):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 8, 6, generator=generator)
    text = [torch.randn(5, 32, generator=generator) for _ in range(2)]
    return FAMILY.predict(transformer, x, torch.tensor([0.3, 0.8]), text)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_layout_gives_the_same_output_exactly(single, tiny_model, tiny_chroma, prefix):
    transformer = single({prefix + key: tensor for key, tensor in original_state(tiny_chroma).items()})
    assert torch.equal(velocity(transformer), velocity(FAMILY.load_transformer(tiny_model)))


def test_diffusers_layout_in_a_single_file(single, tiny_model, tiny_chroma):
    transformer = single(diffusers_state(tiny_chroma))
    assert torch.equal(velocity(transformer), velocity(FAMILY.load_transformer(tiny_model)))


def test_norms_called_weight(single, tiny_model, tiny_chroma):
    """Newer ComfyUI files name a norm's scale `weight`."""
    state = {key.replace(".scale", ".weight"): tensor for key, tensor in original_state(tiny_chroma).items()}
    assert torch.equal(velocity(single(state)), velocity(FAMILY.load_transformer(tiny_model)))


def test_a_whole_checkpoint_holds_the_transformer_among_other_parts(single, tiny_model, tiny_chroma):
    state = {"model.diffusion_model." + key: tensor for key, tensor in original_state(tiny_chroma).items()}
    state |= {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.t5xxl.shared.weight": torch.zeros(2)}
    assert torch.equal(velocity(single(state)), velocity(FAMILY.load_transformer(tiny_model)))


def test_raw_fp8(single, tiny_chroma):
    state = {key: t.to(torch.float8_e4m3fn) for key, t in original_state(tiny_chroma).items()}
    loaded = single(state).state_dict()
    for name, tensor in diffusers_state(tiny_chroma).items():
        assert torch.equal(loaded[name], tensor.to(torch.float8_e4m3fn).float()), name


@pytest.mark.parametrize("num_scales", ["one", "rows"])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("layout", [original_state, diffusers_state])
def test_scaled_fp8_is_multiplied_out(single, tiny_chroma, layout, scale_name, num_scales):
    state = scaled_fp8(layout(tiny_chroma), scale_name, num_scales)
    if scale_name == "scale_weight":
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    else:  # the newer files describe each layer
        described = json.dumps({"format": "float8_e4m3fn"}).encode()
        for key in [key for key in state if key.endswith("weight_scale")]:
            state[key.replace("weight_scale", "comfy_quant")] = torch.tensor(list(described), dtype=torch.uint8)
            state[key.replace("weight_scale", "input_scale")] = torch.tensor(0.5)
    loaded = single(state).state_dict()
    wrong = 0
    for name, tensor in diffusers_state(tiny_chroma).items():
        step = tensor.abs().max().item() / 448 * 16 + 1e-9  # half of e4m3's widest step is 16 of 448
        torch.testing.assert_close(loaded[name], tensor, rtol=2**-4, atol=step)
        wrong += (loaded[name] - tensor).norm() > 0.05 * tensor.norm()
    assert wrong == 0  # without the scales, every weight of the blocks is off by orders of magnitude


def test_scaled_fp8_equals_the_product_exactly(single, tiny_chroma):
    """A fused tensor gives q, k and v: its rows times the scale, in fp32, then rounded to the model's dtype."""
    state = scaled_fp8(original_state(tiny_chroma), "scale_weight", "one")
    transformer = single({**state, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, dtype="bf16")
    key = "double_blocks.1.img_attn.qkv"
    expected = state[f"{key}.weight"].float() * state[f"{key}.scale_weight"]
    attention = transformer.transformer_blocks[1].attn
    for part, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
        assert torch.equal(layer.weight, expected[part * HIDDEN : (part + 1) * HIDDEN].bfloat16())


def test_dimensions_are_read_off_the_tensors(single, tiny_chroma):
    config = single(original_state(tiny_chroma)).config
    wanted = json.loads((tiny_chroma / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert {key: wanted[key] for key in wanted if not key.startswith("_")} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if key in wanted and not key.startswith("_")
    }


def test_a_config_beside_the_file_is_taken(single, tiny_chroma, tmp_path):
    config = json.loads((tiny_chroma / "transformer" / "config.json").read_text(encoding="utf-8"))
    config["axes_dims_rope"] = [8, 4, 4]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert single(original_state(tiny_chroma)).pos_embed.axes == (8, 4, 4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_everything_is_in_the_models_dtype_frozen_on_the_cpu_and_real(tiny_model, dtype):
    transformer = FAMILY.load_transformer(replace(tiny_model, dtype=dtype))
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {p.dtype for p in transformer.parameters()} == {wanted}
    assert {t.device.type for t in (*transformer.parameters(), *transformer.buffers())} == {"cpu"}
    assert not transformer.training and not [p for p in transformer.parameters() if p.requires_grad]
    assert velocity(transformer).dtype == torch.float32
    assert velocity(transformer).isfinite().all()


def test_the_buffer_that_is_in_no_file_is_computed(tiny_model, tiny_chroma):
    from diffusers import ChromaTransformer2DModel

    reference = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer")
    ours = FAMILY.load_transformer(tiny_model)
    assert torch.equal(*(model.get_buffer("time_text_embed.mod_proj") for model in (ours, reference)))


def test_shards(tiny_model, tiny_chroma, tmp_path):
    from diffusers import ChromaTransformer2DModel

    folder = tmp_path / "sharded"
    ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").save_pretrained(
        folder / "transformer", max_shard_size="500KB"
    )
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    transformer = FAMILY.load_transformer(replace(tiny_model, repo=str(folder)))
    assert torch.equal(velocity(transformer), velocity(FAMILY.load_transformer(tiny_model)))


# --- what is wrong is said ---


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_missing_and_unknown_keys_are_counted_in_one_message(single, tiny_chroma):
    state = original_state(tiny_chroma)
    for i in range(2):
        del state[f"double_blocks.{i}.img_mlp.0.weight"], state[f"double_blocks.{i}.img_mlp.0.bias"]
    state["guidance_in.weight"] = torch.zeros(2)
    text = message(lambda: single(state))
    assert text.startswith(
        "single.safetensors: does not match a Chroma transformer; keys: 4 missing (double_blocks.0.img_"
    )
    assert "..." in text and "; 1 unexpected (guidance_in.weight) (" in text


def test_other_shapes_are_named(single, tiny_chroma):
    state = original_state(tiny_chroma)
    state["double_blocks.1.img_mlp.0.bias"] = torch.zeros(3)
    text = message(lambda: single(state))
    assert "1 of another shape (double_blocks.1.img_mlp.0.bias is [3] instead of [256])" in text


def test_another_kind_of_file(single):
    flux = {"double_blocks.0.img_mod.lin.weight": torch.zeros(2), "img_in.weight": torch.zeros(2)}
    text = message(lambda: single(flux))
    assert text == (
        "single.safetensors: is not a Chroma transformer: none of its keys is distilled_guidance_layer.in_proj.weight "
        "(it has double_blocks.0.img_mod.lin.weight, img_in.weight, ...)"
    )


def test_an_integer_format_with_a_scale_is_refused(single, tiny_chroma):
    state = original_state(tiny_chroma)
    key = "double_blocks.0.img_mlp.0.weight"
    state[key] = state[key].to(torch.int8)
    state["double_blocks.0.img_mlp.0.weight_scale"] = torch.tensor(1.0)
    text = message(lambda: single(state))
    assert f"{key} is stored as I8 with a scale, which is not supported; use a bf16 or fp8 file" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[: len(data) // 2], "but its header expects"),
        (lambda data: b"PK\x03\x04" + data, "give a header size of"),
        (lambda data: data[:5], "give a header size of"),
        (lambda data: b"GGUF" + bytes(100), "only .safetensors files can be read"),
        (lambda data: b"", "header size of 0 bytes"),
        (lambda data: (20).to_bytes(8, "little") + b"[1, 2]              ", "is not a complete safetensors file"),
    ],
    ids=["cut", "zip", "tiny", "gguf", "empty", "list"],
)
def test_damaged_files(tiny_chroma, tmp_path, change, reason):
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(change((tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()))
    text = message(lambda: read_header(file))
    assert text.startswith("damaged.safetensors: is not a complete safetensors file: ") and reason in text


def test_a_missing_shard_is_named(tiny_model, tiny_chroma, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_chroma, folder)
    index = {"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    text = message(lambda: FAMILY.load_transformer(replace(tiny_model, repo=str(folder))))
    assert "names 1 files that do not exist, such as diffusion_pytorch_model-00002-of-00002.safetensors" in text


def test_tensors_are_mapped_not_copied(tiny_chroma):
    """A model in its file's own precision costs no memory of its own until it is quantised or moved."""
    file = tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = Weights([file], TRANSFORMER)
    first, second = weights.read("x_embedder.weight"), weights.read("x_embedder.weight", slice(0, 4))
    assert first.shape == (64, 64) and second.shape == (4, 64)
    assert torch.equal(first[:4], second)
