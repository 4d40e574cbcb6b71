"""LoRA files of other programs: alpha in the header, keys of text encoders, wrappers and adapter names of peft."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.load import layer_updates, read_lora, read_lora_file
from chroma_trainer.trainer_core.adapters.lora import LoraPair
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import save_file

from tests.narrowing import of_type

MODULE = "transformer_blocks.0.attn.to_q"
DOWN, UP = torch.full((4, 64), 0.5), torch.full((64, 4), 0.25)


@pytest.fixture
def write(tmp_path):
    def save(tensors=None, metadata=None, name="a.safetensors", prefix=f"transformer.{MODULE}"):
        pair = {f"{prefix}.lora_A.weight": DOWN, f"{prefix}.lora_B.weight": UP}
        save_file(
            {key: tensor.clone() for key, tensor in {**pair, **(tensors or {})}.items()}, tmp_path / name, metadata
        )
        return tmp_path / name

    return save


def norm(path) -> float:
    return read_lora(path)[MODULE].delta(torch.zeros(64, 64)).norm().item()


PLAIN = (UP @ DOWN).norm().item()


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"transformer.lora_alpha": 16, "transformer.r": 4}, 4),
        ({"transformer.lora_alpha": 16, "transformer.use_rslora": True}, 16 / math.sqrt(4)),
        ({"transformer.lora_alpha": 16, "transformer.alpha_pattern": {"attn.to_q": 2}}, 0.5),
        ({"transformer.lora_alpha": 16, "transformer.alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 2}}, 0.5),
        ({"transformer.lora_alpha": 16, "transformer.alpha_pattern": {"to_k": 2, "(": 3}}, 4),
        ({"transformer.r": 4}, 1),
        ({"transformer.lora_alpha": "many"}, 1),
    ],
)
def test_alpha_stands_in_the_header(write, config, factor):
    assert norm(write(metadata={"lora_adapter_metadata": json.dumps(config)})) == pytest.approx(PLAIN * factor)


def test_an_alpha_of_its_own_comes_first(write):
    alpha = {f"transformer.{MODULE}.alpha": torch.tensor(2.0)}
    path = write(alpha, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16})})
    assert norm(path) == pytest.approx(PLAIN / 2)


def test_alpha_stands_in_the_file_beside(write, tmp_path):
    path = write(name="adapter_model.safetensors", prefix=f"base_model.model.{MODULE}")
    assert norm(path) == pytest.approx(PLAIN)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}', encoding="utf-8")
    assert norm(path) == pytest.approx(PLAIN * 2)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '"x"'])
def test_a_damaged_header_is_named(write, text):
    with pytest.raises(UserError, match=r"its alpha can't be read: lora_adapter_metadata in its header is damaged"):
        read_lora(write(metadata={"lora_adapter_metadata": text}))


def test_as_diffusers_itself_saves_it(tiny_chroma, tmp_path):
    """The weight that diffusers adds, with its own alpha."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer")
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]), "default")
    layer: Any = transformer.get_submodule("transformer_blocks.0.attn.to_q")  # of peft
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05, generator=torch.Generator().manual_seed(1))
    lora: Any = get_peft_model_state_dict(cast(Any, transformer))  # a model of diffusers will do
    ChromaPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=lora,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )  # fmt: skip
    update = read_lora(tmp_path / "pytorch_lora_weights.safetensors")[MODULE]
    torch.testing.assert_close(update.delta(torch.zeros(64, 64)).float(), layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    "prefix",
    [
        f"transformer.base_model.model.{MODULE}", f"base_model.model.transformer.{MODULE}", f"base_model.model.{MODULE}",
        MODULE, f"diffusion_model.{MODULE}",
    ],
)  # fmt: skip
def test_wrappers_of_peft(write, tiny_model, prefix):
    transformer = ChromaFamily().empty_transformer(tiny_model)
    assert list(layer_updates(transformer, write(prefix=prefix))) == [MODULE]


@pytest.mark.parametrize("adapter", ["default", "my_style", "v2"])
def test_names_of_adapters(tmp_path, adapter):
    tensors = {f"{MODULE}.lora_A.{adapter}.weight": DOWN, f"{MODULE}.lora_B.{adapter}.weight": UP}
    tensors[f"{MODULE}.lora_magnitude_vector.{adapter}.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "a.safetensors")
    assert of_type(read_lora(tmp_path / "a.safetensors")[MODULE], LoraPair).is_dora


def test_two_adapters_in_one_file_are_refused(write):
    other = {f"{MODULE}.lora_A.{name}.weight": DOWN for name in ("one", "two")}
    with pytest.raises(UserError, match=r"contains several adapters \(one, two\); save one of them alone"):
        read_lora(write(other))


FOREIGN = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "text encoders",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "text encoders",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "text encoders",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight": "text encoders",
    "text_encoders.clip_l.transformer.x.lora_up.weight": "text encoders",
    f"transformer.{MODULE}.lora_B.bias": "bias differences",
    "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": "bias differences",
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": "norm differences",
    "lora_unet_double_blocks_0_img_norm.w_norm": "norm differences",
    "diffusion_model.img_in.diff": "full weight differences",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_what_is_not_of_the_transformers_layers_is_left_out_and_said(write, key):
    file = read_lora_file(write({key: torch.ones(4)}))
    assert list(file.updates) == [MODULE] and file.left_out_text == f"1 keys of {FOREIGN[key]}"


def test_a_file_of_text_encoders_alone_says_so(tmp_path):
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file({key: DOWN.clone()}, tmp_path / "te.safetensors")
    with pytest.raises(UserError, match="is not a LoRA, DoRA, LoKr, LoHa or OFT file: it contains text encoders"):
        read_lora(tmp_path / "te.safetensors")


def test_a_run_says_what_it_leaves_out(workshop, write):
    path = write({"lora_te1_x.lora_down.weight": DOWN, "lora_te1_x.alpha": torch.tensor(1.0)})
    request = workshop.request(targets="all", rank=4, steps=1)
    host = workshop.host()
    run(replace(request, adapter=AdapterConfig(init_lora=str(path))), host)
    assert "a.safetensors: only the transformer's layers are used; left out: 2 keys of text encoders" in host.told()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_file_with_nan_is_refused_before_anything_is_loaded(workshop, write, monkeypatch, value):
    for name in ("load_transformer", "load_text_encoder"):
        monkeypatch.setattr(ChromaFamily, name, lambda *args, **keywords: pytest.fail("a model was loaded"))
    broken = {f"transformer.{MODULE}.lora_B.weight": torch.full((64, 4), value)}
    request = replace(workshop.request(rank=4), adapter=AdapterConfig(init_lora=str(write(broken))))
    with pytest.raises(UserError) as caught:
        run(request, workshop.host())
    assert str(caught.value) == (
        f"init_lora: a.safetensors is broken: 1 of 1 layers contain NaN or infinite values, such as {MODULE}; use an "
        "earlier checkpoint of it"
    )
