"""Folders that peft saved: the scale is in adapter_config.json, and the weights are peft's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.load import read_lora
from chroma_trainer.trainer_core.adapters.lora import LoraPair
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.setup.identities import init_identity
from torch import nn

from tests.narrowing import of_type


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def save(tmp_path):
    def make(**settings):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(target_modules=["first", "second"], init_lora_weights=False, **settings)
        model = get_peft_model(Model(), config)
        model.save_pretrained(tmp_path)
        return model, tmp_path / "adapter_model.safetensors"

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 16}},
    ],
    ids=["alpha = r", "alpha", "rslora", "patterns"],
)
def test_the_update_is_pefts(save, settings):
    model, file = save(**settings)
    updates = read_lora(file)
    assert updates.keys() == {"first", "second"}
    for name, update in updates.items():
        layer = model.base_model.model.get_submodule(name)
        wanted = layer.get_delta_weight("default").double()
        torch.testing.assert_close(update.delta(layer.base_layer.weight), wanted, rtol=1e-5, atol=1e-6)


def test_another_config_is_another_start(save, workshop):
    _, file = save(r=4, lora_alpha=4)
    request = workshop.request()
    request = replace(request, adapter=replace(request.adapter, init_lora=str(file)))
    before = init_identity(request)
    config = file.with_name("adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "lora_alpha": 8}), encoding="utf-8")
    assert init_identity(request) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "OFT"}', "belongs to an adapter of peft's type OFT; only its type LORA can be read"),
        ("{", "is not a readable config of peft"),
        ("[]", "is not a readable config of peft"),
    ],
)
def test_other_configs_are_refused(save, text, message):
    _, file = save(r=4, lora_alpha=4)
    file.with_name("adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}"):
        read_lora(file)


def test_a_config_beside_another_file_is_not_its(save):
    _, file = save(r=4, lora_alpha=8)
    other = file.rename(file.with_name("other.safetensors"))
    unscaled = up_of(other)
    assert torch.equal(unscaled, up_of(other))
    other.rename(file)
    torch.testing.assert_close(up_of(file), unscaled * 2)


def up_of(file: Path) -> torch.Tensor:
    return of_type(read_lora(file)["first"], LoraPair).up
