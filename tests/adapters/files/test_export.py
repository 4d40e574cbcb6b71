"""The one LoRA file: exact in diffusers and peft, the same bytes each time, checked before it replaces the old one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.keys import original_place
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_, read_lora, read_tensors
from chroma_trainer.trainer_core.adapters.inject import inject_
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FAMILY = ChromaFamily()
METADATA = {"ss_network_dim": "4", "modelspec.title": "a ▁ title", "prompt": '{"1": {}}'}
SIGMA = torch.tensor([0.3, 0.8])
HEIGHT, WIDTH = 8, 6


@pytest.fixture
def trained(tiny_model):
    """A tiny Chroma with a LoRA of rank 4 and alpha 6 (scale 1.5) on everything, as if trained."""
    transformer = FAMILY.load_transformer(tiny_model)
    generator = torch.Generator().manual_seed(1)
    names = resolve_targets(transformer, FAMILY, "all+ffs+embedder")
    layers = inject_(transformer, names, 4, 6, generator=generator)
    for layer in layers.values():
        up = layer.get_parameter("lora_B")
        up.data.copy_(torch.randn(up.shape, generator=generator) * 0.05)
    return transformer, layers


def text():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(7, 32, generator=generator) for _ in range(2)]


def latents():
    return torch.randn(2, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


def ours(transformer):
    return FAMILY.predict(transformer, latents(), SIGMA, text())


def theirs(transformer):
    """diffusers' own class, called as its pipeline calls it."""
    velocity = transformer(
        hidden_states=pack(latents()),
        encoder_hidden_states=torch.stack(text()),
        timestep=SIGMA,
        img_ids=image_ids(HEIGHT, WIDTH),
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]
    return unpack(velocity, HEIGHT, WIDTH)


def diffusers_base(folder):
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel.from_pretrained(folder / "transformer").eval()


def test_exact_in_diffusers(trained, tiny_chroma, tmp_path):
    """What ChromaPipeline.load_lora_weights does with the file."""
    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    base = diffusers_base(tiny_chroma)
    plain = theirs(base)
    base.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    assert (theirs(base) - plain).abs().max() > 0.01
    torch.testing.assert_close(theirs(base), ours(transformer), rtol=0, atol=1e-6)


def test_exact_in_the_diffusers_pipeline(trained, tiny_chroma, tmp_path):
    """load_lora_weights itself, on a pipeline of the transformer alone."""
    from diffusers import ChromaPipeline

    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    others: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipeline = ChromaPipeline(transformer=diffusers_base(tiny_chroma), **others)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(theirs(pipeline.transformer), ours(transformer), rtol=0, atol=1e-6)


def test_exact_in_peft(trained, tiny_chroma, tmp_path):
    """With alpha = r, for alpha / rank is in B."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    state = {
        f"base_model.model.{key.removeprefix('transformer.')}": tensor
        for key, tensor in load_file(tmp_path / "lora.safetensors").items()
    }
    model = get_peft_model(diffusers_base(tiny_chroma), LoraConfig(r=4, lora_alpha=4, target_modules=list(layers)))
    result = set_peft_model_state_dict(model, state)
    assert result.unexpected_keys == []
    torch.testing.assert_close(theirs(model), ours(transformer), rtol=0, atol=1e-6)


def test_exact_in_our_own_reader(trained, tiny_model, tmp_path):
    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    fresh = FAMILY.load_transformer(tiny_model)
    applied = apply_lora_(fresh, tmp_path / "lora.safetensors")
    assert list(applied) and not [p for p in fresh.parameters() if p.requires_grad]
    assert torch.equal(ours(fresh), ours(transformer))


def test_fused_native_weights_change_by_the_same_delta(trained, tiny_chroma):
    """ComfyUI adds B A to rows of the fused weight: the rows that keys.py names, on the base's own fused weight."""
    _, layers = trained
    hidden = 64
    fused: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        place = original_place(name)
        module = fused.setdefault(place.module, torch.zeros(_fused_rows(place, layer, hidden), layer.in_features))
        module[place.rows(hidden)] += layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    qkv = fused["double_blocks.0.img_attn.qkv"]
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        layer = layers[f"transformer_blocks.0.attn.{name}"]
        delta = layer.scale * layer.lora_B @ layer.lora_A
        assert torch.equal(qkv[part * hidden : (part + 1) * hidden], delta)
    linear1 = fused["single_blocks.1.linear1"]
    mlp = layers["single_transformer_blocks.1.proj_mlp"]
    assert linear1.shape == (7 * hidden, hidden)
    assert torch.equal(linear1[3 * hidden :], mlp.scale * mlp.lora_B @ mlp.lora_A)


def _fused_rows(place, layer, hidden):
    if place.part is None:
        return layer.out_features
    return 7 * hidden if place.module.endswith("linear1") else 3 * hidden


def test_the_format(trained, tmp_path):
    transformer, layers = trained
    exported = export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert keys == {f"transformer.{name}.lora_{side}.weight" for name in layers for side in "AB"}
    assert METADATA.items() <= metadata.items() and metadata.keys() - METADATA.keys() == {"sshs_model_hash"}
    assert exported.applied == exported.num_keys == len(keys)
    layer = layers["x_embedder"]
    tensors = load_file(tmp_path / "lora.safetensors")
    assert torch.equal(tensors["transformer.x_embedder.lora_A.weight"], layer.lora_A)
    assert torch.equal(tensors["transformer.x_embedder.lora_B.weight"], layer.lora_B * 1.5)


def test_model_hash_is_that_of_the_tensors_alone(trained, tmp_path):
    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", METADATA)
    data = (tmp_path / "lora.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header["__metadata__"]["sshs_model_hash"] == hashlib.sha256(data[8 + size :]).hexdigest()
    assert (8 + size) % 8 == 0


def test_equal_loras_give_equal_bytes(trained, tmp_path):
    transformer, layers = trained
    first = export_lora(layers, transformer, tmp_path / "a.safetensors", METADATA)
    shuffled = dict(reversed(METADATA.items()))
    second = export_lora(dict(reversed(layers.items())), transformer, tmp_path / "b.safetensors", shuffled)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.sha256 == second.sha256 == sha256_of(tmp_path / "a.safetensors")


def test_bf16_halves_the_file(trained, tmp_path):
    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    export_lora(layers, transformer, tmp_path / "b.safetensors", {}, dtype=torch.bfloat16)
    whole, half = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(half[key].dtype == torch.bfloat16 for key in half)
    for key, tensor in whole.items():
        torch.testing.assert_close(half[key].float(), tensor, rtol=2**-8, atol=0)


def test_a_lora_that_does_not_fit_is_not_saved(trained, tmp_path):
    transformer, layers = trained
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"the old file")
    wrong = {**layers, "transformer_blocks.9.attn.to_q": layers["x_embedder"]}
    with pytest.raises(RuntimeError, match=rf"{2 * len(layers)} of {2 * len(wrong)} keys apply; not those of "):
        export_lora(wrong, transformer, path, {})
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == ["lora.safetensors"]


def test_wrong_shapes_are_not_saved(trained, tmp_path):
    transformer, layers = trained
    wrong = {**layers, "x_embedder": layers["transformer_blocks.0.ff.net.2"]}
    with pytest.raises(RuntimeError, match="not those of x_embedder"):
        export_lora(wrong, transformer, tmp_path / "lora.safetensors", {})


# --- reading what others wrote ---


def write_native(layers, path, prefix, down, up, alpha, rename=lambda name: name):
    """A fused file: each row block has its own A and B; together they are A stacked and B block-diagonal."""
    places: dict[str, list] = {}
    for name, layer in layers.items():
        places.setdefault(original_place(name).module, []).append((original_place(name), layer))
    tensors = {}
    for module, parts in places.items():
        rank = 4 * len(parts)
        rows = _fused_rows(parts[0][0], parts[0][1], 64)
        fused_up = torch.zeros(rows, rank)
        for i, (place, layer) in enumerate(parts):
            fused_up[place.rows(64), 4 * i : 4 * i + 4] = layer.lora_B.detach()
        key = f"{prefix}{rename(module)}"
        tensors[f"{key}.{down}.weight"] = torch.cat([layer.lora_A.detach() for _, layer in parts])
        tensors[f"{key}.{up}.weight"] = fused_up
        if alpha:  # 6 / 4 of each part
            tensors[f"{key}.alpha"] = torch.tensor(6.0 * len(parts))
        else:
            tensors[f"{key}.{up}.weight"] *= 1.5
    save_file(tensors, path)


@pytest.mark.parametrize(
    "form",
    [
        {"prefix": "diffusion_model.", "down": "lora_down", "up": "lora_up", "alpha": True},
        {"prefix": "diffusion_model.", "down": "lora_A", "up": "lora_B", "alpha": False},
        {
            "prefix": "lora_unet_", "down": "lora_down", "up": "lora_up", "alpha": True,
            "rename": lambda name: name.replace(".", "_"),
        },
    ],
    ids=["comfyui with alpha", "comfyui", "kohya"],
)  # fmt: skip
def test_fused_files_of_others_apply_exactly(trained, tiny_model, tmp_path, form):
    transformer, layers = trained
    write_native(layers, tmp_path / "lora.safetensors", **form)
    fresh = FAMILY.load_transformer(tiny_model)
    applied = apply_lora_(fresh, tmp_path / "lora.safetensors")
    assert applied.keys() == layers.keys()
    torch.testing.assert_close(ours(fresh), ours(transformer), rtol=0, atol=1e-6)


def test_strength_is_taken(trained, tiny_model, tmp_path):
    transformer, layers = trained
    export_lora(layers, transformer, tmp_path / "lora.safetensors", {})
    fresh = FAMILY.load_transformer(tiny_model)
    base = ours(fresh)
    apply_lora_(fresh, tmp_path / "lora.safetensors", strength=0.0)
    assert torch.equal(ours(fresh), base)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is not a LoRA, DoRA, LoKr, LoHa or OFT file: it contains nothing"),
        (
            {"x_embedder.weight": torch.zeros(2, 2)},
            "is not a LoRA, DoRA, LoKr, LoHa or OFT file: it contains x_embedder.weight",
        ),
        (
            {"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2)},
            "is not a LoRA, DoRA, LoKr, LoHa or OFT file: it contains x_embedder",
        ),
        (
            {f"transformer.blocks.0.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
            "is not a LoRA of this model: 1 of 1 layers do not fit, such as blocks.0",
        ),
        (
            {f"transformer.x_embedder.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
            "is not a LoRA of this model: 1 of 1 layers do not fit, such as x_embedder",
        ),
    ],
)
def test_files_that_are_none_say_so_and_change_nothing(tiny_model, tmp_path, tensors, message):
    transformer = FAMILY.load_transformer(tiny_model)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as caught:
        apply_lora_(transformer, tmp_path / "lora.safetensors")
    assert str(caught.value).startswith("lora.safetensors: " + message)
    assert type(transformer.x_embedder) is torch.nn.Linear


def test_no_safetensors_at_all(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(UserError, match=r"lora\.safetensors: is not a readable LoRA file"):
        read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"missing\.safetensors: is not a readable LoRA file"):
        read_tensors(tmp_path / "missing.safetensors")
