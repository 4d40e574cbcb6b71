"""The file of a whole model has the tensors of the base's file, under the names that it uses."""

from __future__ import annotations

import torch
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.full_rank.model_file import base_weights, write_transformer
from chroma_trainer.trainer_core.registry import load
from safetensors.torch import load_file

from tests.conftest import write_tiny_radiance


def test_radiances_own_layers_and_markers(tmp_path):
    """Empty tensors say what the model predicts: without them ComfyUI would sample something else."""
    base, saved = tmp_path / "base.safetensors", tmp_path / "saved.safetensors"
    write_tiny_radiance(base, conv_head=True, x0=True, sequential=True)
    model = ModelConfig(family="radiance", flavour="radiance", repo="", transformer_file=str(base), dtype="fp32")
    family = load("family", "radiance")()
    write_transformer(saved, family.load_transformer(model), base_weights(model, family), {})
    before, after = load_file(base), load_file(saved)
    assert before.keys() == after.keys() and {"__x0__", "__sequential__"} < after.keys()
    assert all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values() if tensor.numel()} == {torch.bfloat16}
