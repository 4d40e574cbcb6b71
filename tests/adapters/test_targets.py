"""The table of targets, counted on the real Chroma's 19 + 38 blocks (on the meta device) and on the tiny one."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config

FAMILY = ChromaFamily()


@pytest.fixture(scope="module")
def chroma():
    """The released model's modules, without memory."""
    from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer

    with torch.device("meta"):
        return ChromaTransformer.from_config(load_shipped_config("chroma_transformer"))


@pytest.mark.parametrize(
    ("preset", "num_modules"),
    [
        ("mmdit", 19 * 4 + 38 * 3),
        ("all", 19 * 8 + 38 * 3),
        ("context", 19 * 4),
        ("context+ffs", 19 * 6),
        ("all+ffs", 19 * 12 + 38 * 5),  # 418: not 419, for the final projection stays out
        ("all+ffs+embedder", 19 * 12 + 38 * 5 + 1),
        ("ai-toolkit", 19 * 12 + 38 * 5),
        ("tiny", 2),
        ("nano", 1),
    ],
)
def test_presets_of_the_released_chroma(chroma, preset, num_modules):
    names = resolve_targets(chroma, FAMILY, preset)
    assert len(names) == len(set(names)) == num_modules
    assert "proj_out" not in names
    assert not [name for name in names if "distilled" in name]


def test_every_preset_is_counted_above(chroma):
    assert set(FAMILY.targets) == {
        "mmdit", "all", "context", "context+ffs", "all+ffs", "all+ffs+embedder", "ai-toolkit", "tiny", "nano",
    }  # fmt: skip


def test_names_come_in_the_models_order_whatever_the_order_of_words(chroma):
    order = [name for name, _ in chroma.named_modules()]
    names = resolve_targets(chroma, FAMILY, "x_embedder, *.proj_mlp\n*.attn.to_q")
    assert names == sorted(names, key=order.index)
    assert len(names) == 1 + 38 + 19 + 38


def test_presets_and_patterns_mix_without_doubles(chroma):
    assert len(resolve_targets(chroma, FAMILY, "context, context+ffs, x_embedder")) == 19 * 6 + 1


def test_a_pattern_is_a_whole_name(chroma):
    assert resolve_targets(chroma, FAMILY, "proj_out") == ["proj_out"]
    assert len(resolve_targets(chroma, FAMILY, "single_transformer_blocks.*.proj_out")) == 38
    assert resolve_targets(chroma, FAMILY, "transformer_blocks.3.attn.to_q") == ["transformer_blocks.3.attn.to_q"]


def test_the_star_never_takes_the_approximator(chroma):
    names = resolve_targets(chroma, FAMILY, "*")
    assert len(names) == 19 * 12 + 38 * 5 + 3
    assert not [name for name in names if "distilled" in name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "to_q",
            "targets: 'to_q' matches no layer; similar names: transformer_blocks.*.attn.to_q, single_transformer_blocks.*.",
        ),
        ("al", "targets: 'al' matches no layer; did you mean 'all'?; similar names: "),
        ("transformer_blocks.*.attn.to_qq", "similar names: transformer_blocks.*.attn.to_q, "),
        ("transformer_blocks.19.attn.to_q", "similar names: transformer_blocks.*.attn.to_q"),
        (
            "distilled_guidance_layer.in_proj",
            "layers that only kind full of AdapterSettings trains (distilled_guidance_",
        ),
        ("norms", "'norms' names layers that only kind full of AdapterSettings trains (*.attn.norm_q, "),
        (" , ", "targets: is empty; use one of mmdit, all, "),
    ],
)
def test_no_match_names_the_nearest(chroma, text, message):
    with pytest.raises(UserError) as caught:
        resolve_targets(chroma, FAMILY, text)
    assert message in str(caught.value)


def test_kind_full_also_trains_what_no_lora_can(chroma):
    norms = resolve_targets(chroma, FAMILY, "norms", is_full=True)
    assert len(norms) == 19 * 4 + 38 * 2 and norms[0] == "transformer_blocks.0.attn.norm_q"
    assert resolve_targets(chroma, FAMILY, "approximator", is_full=True)[0] == "distilled_guidance_layer.in_proj"
    assert resolve_targets(chroma, FAMILY, "embedders", is_full=True) == ["context_embedder", "x_embedder", "proj_out"]
    whole = resolve_targets(chroma, FAMILY, "*", is_full=True)
    own = sum(p.numel() for name in whole for p in chroma.get_submodule(name).parameters(recurse=False))
    assert own == sum(p.numel() for p in chroma.parameters())
    assert resolve_targets(chroma, FAMILY, "all+ffs", is_full=True) == resolve_targets(chroma, FAMILY, "all+ffs")
    with pytest.raises(UserError, match="did you mean 'norms'"):
        resolve_targets(chroma, FAMILY, "norm", is_full=True)


def test_every_word_without_a_match_is_named(chroma):
    with pytest.raises(UserError) as caught:
        resolve_targets(chroma, FAMILY, "to_q, all, to_k")
    assert len(caught.value.problems) == 2


def test_a_preset_for_blocks_that_a_small_model_lacks(tiny_model):
    with pytest.raises(UserError, match=r"'nano' needs single_transformer_blocks\.7\.proj_out, which this model"):
        resolve_targets(FAMILY.load_transformer(tiny_model), FAMILY, "nano")
