"""Merge, resize, strengths and extract: exact where they say so, else with the error that they state."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.load import layer_updates
from chroma_trainer.trainer_core.adapters.inject import inject_
from chroma_trainer.trainer_core.adapters.loha import LohaUpdate
from chroma_trainer.trainer_core.adapters.lokr import LokrUpdate
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.lora_tools.factors import as_product, decompose, overlap, spectrum
from chroma_trainer.trainer_core.lora_tools.reader import of_tensors, open_lora
from chroma_trainer.trainer_core.lora_tools.report.compare import compare
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import RANK, assert_equal, delta, diffusers_tensors, expected, kohya_tensors, native_tensors

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def kind_tensors(kind: str) -> dict[str, torch.Tensor]:
    name = "transformer.transformer_blocks.0.attn.to_q"
    if kind == "loha":
        parts = {
            "hada_w1_a": randn(64, 3),
            "hada_w1_b": randn(3, 64),
            "hada_w2_a": randn(64, 3),
            "hada_w2_b": randn(3, 64),
        }
    elif kind == "lokr":
        parts = {"lokr_w1": randn(4, 4), "lokr_w2_a": randn(16, 2), "lokr_w2_b": randn(2, 16)}
    elif kind == "dora":
        parts = {"lora_A.weight": randn(4, 64), "lora_B.weight": randn(64, 4), "dora_scale": randn(64, 1).abs() + 1}
    else:
        parts = {"oft_blocks": randn(16, 4, 4) * 0.1}
    return {f"{name}.{end}": tensor for end, tensor in parts.items()} | (
        {} if kind in ("dora", "oft") else {f"{name}.alpha": torch.tensor(2.0)}
    )


@pytest.mark.parametrize("update", [
    LohaUpdate(randn(20, 3), randn(3, 12), randn(20, 3), randn(3, 12), 1.5),
    LokrUpdate(w1=randn(4, 3), w2_a=randn(5, 2), w2_b=randn(2, 4), alpha=3.0),
    LokrUpdate(w1=randn(4, 3), w2=randn(5, 4)),
    LokrUpdate(w1_a=randn(4, 1), w1_b=randn(1, 3), w2_a=randn(5, 2), w2_b=randn(2, 4), alpha=1.0),
], ids=["loha", "lokr", "lokr full", "lokr both"])  # fmt: skip
def test_other_kinds_are_products_of_two_factors(update):
    wanted = update.delta(torch.zeros(update.shape, dtype=torch.float64))
    product = as_product(update)
    torch.testing.assert_close(product.up.double() @ product.down.double(), wanted, rtol=1e-5, atol=1e-5)
    values = spectrum(update)
    assert values is not None
    torch.testing.assert_close(values, torch.linalg.svdvals(wanted)[: len(values)], rtol=1e-4, atol=1e-4)


# --- merge ---


def test_a_merge_is_exact_and_ranks_add(save, tmp_path, capsys):
    one, two = save(kohya_tensors(2.0), name="one.safetensors"), save(diffusers_tensors(), name="two.safetensors")
    assert main(["lora", "merge", f"{one}:0.8", f"{two}:-0.5", "-o", str(tmp_path / "c.safetensors")]) == 0
    out = capsys.readouterr().out
    keys = len(load_file(tmp_path / "c.safetensors"))
    assert (
        f"{keys} of {keys} keys load in ComfyUI; {keys} of {keys} keys load in diffusers" in out
        and "rank 8 -> 8" in out
    )
    assert_equal(delta(tmp_path / "c.safetensors"), expected(0.8 * 0.5 - 0.5))


def test_a_file_of_strength_0_adds_no_layers(save, tmp_path, capsys):
    """Also not those that it has alone."""
    one, two = diffusers_tensors(), diffusers_tensors()
    layer = next(iter(two)).rpartition(".lora_")[0]
    paths = [
        save(one, name="one.safetensors"),
        save({k: v for k, v in two.items() if not k.startswith(layer)}, name="two.safetensors"),
    ]
    assert main(["lora", "merge", f"{paths[0]}:0", str(paths[1]), "-o", str(tmp_path / "c.safetensors")]) == 0
    assert delta(tmp_path / "c.safetensors").keys() == delta(paths[1]).keys()
    assert main(["lora", "merge", f"{paths[0]}:0", f"{paths[1]}:0", "-o", str(tmp_path / "d.safetensors")]) == 2
    assert "would have no layers" in capsys.readouterr().err


def test_a_merge_to_a_rank_states_its_error(save, tmp_path, capsys):
    one, two = (
        save(diffusers_tensors(), name="one.safetensors"),
        save({key: tensor.flip(-1) for key, tensor in diffusers_tensors().items()}, name="two.safetensors"),
    )
    assert (
        main(["lora", "merge", str(one), str(two), "--rank", "3", "--json", "-o", str(tmp_path / "c.safetensors")]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    exact, cut = tmp_path / "exact.safetensors", delta(tmp_path / "c.safetensors")
    assert main(["lora", "merge", str(one), str(two), "-o", str(exact)]) == 0
    whole = delta(exact)
    lost = sum(float((whole[name] - cut[name]).norm() ** 2) for name in whole)
    total = sum(float(tensor.norm() ** 2) for tensor in whole.values())
    assert result["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4) and set(result["ranks"]) == {3}
    for name, tensor in whole.items():  # no matrix of rank 3 is nearer
        best = torch.linalg.svdvals(tensor)[3:].norm()
        assert (tensor - cut[name]).norm() == pytest.approx(float(best), rel=1e-4, abs=1e-6)


def test_parents_stay_in_the_metadata(save, tmp_path):
    one = save(
        native_tensors(),
        {"prompt": '{"1": 1}', "modelspec.trigger_phrase": "sks", "ss_base_model_version": "chroma"},
        "one.safetensors",
    )
    two = save(
        native_tensors(),
        {"prompt": '{"2": 2}', "modelspec.trigger_phrase": "nekox", "ss_base_model_version": "chroma"},
        "two.safetensors",
    )
    assert main(["lora", "merge", str(one), f"{two}:0.5", "-o", str(tmp_path / "c.safetensors")]) == 0
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata = file.metadata()
    edit = json.loads(metadata["chroma_trainer_edit"])
    assert [parent["name"] for parent in edit["parents"]] == ["one.safetensors", "two.safetensors"]
    assert [parent["metadata"]["prompt"] for parent in edit["parents"]] == ['{"1": 1}', '{"2": 2}']
    assert edit["parents"][1]["applied"] == "strength 0.5"
    with open_lora(two) as lora:
        assert edit["parents"][1]["sha256"] == lora.sha256
    assert metadata["modelspec.trigger_phrase"] == "sks, nekox" and metadata["ss_base_model_version"] == "chroma"
    assert "prompt" not in metadata and metadata["ss_network_dim"] == "8"


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_are_merged_exactly(save, tmp_path, kind):
    path, plain = save(kind_tensors(kind), name="kind.safetensors"), save(diffusers_tensors(), name="plain.safetensors")
    assert main(["lora", "merge", str(path), str(plain), "-o", str(tmp_path / "c.safetensors")]) == 0
    name = "transformer_blocks.0.attn.to_q"
    wanted = {**expected(), name: expected()[name] + delta(path)[name]}
    assert_equal(delta(tmp_path / "c.safetensors"), wanted)


@pytest.mark.parametrize(("kind", "name"), [("dora", "DoRA"), ("oft", "OFT")])
def test_kinds_that_depend_on_the_base_are_refused_by_name(save, tmp_path, capsys, kind, name):
    path = save(kind_tensors(kind), name="kind.safetensors")
    assert main(["lora", "merge", str(path), str(path), "-o", str(tmp_path / "c.safetensors")]) == 2
    error = capsys.readouterr().err
    assert f"transformer_blocks.0.attn.to_q is a {name} layer" in error and "use lora extract on both" in error
    assert not (tmp_path / "c.safetensors").exists()
    assert main(["lora", "strength", str(path), "double_blocks.0=0.5", "-o", str(tmp_path / "c.safetensors")]) == 2
    assert f"is a {name} layer" in capsys.readouterr().err


def test_loras_of_different_models_are_not_merged(save, tmp_path, capsys):
    one = save(diffusers_tensors(), name="one.safetensors")
    two = save(
        {key: tensor[:, :32] if "lora_A" in key else tensor for key, tensor in diffusers_tensors().items()},
        name="two.safetensors",
    )
    assert main(["lora", "merge", str(one), str(two), "-o", str(tmp_path / "c.safetensors")]) == 2
    assert (
        "has different shapes in the files ((64, 32), (64, 64)); they belong to different models"
        in capsys.readouterr().err
    )
    stranger = save(
        {
            "lora_unet_input_blocks_1.lora_down.weight": torch.ones(2, 2),
            "lora_unet_input_blocks_1.lora_up.weight": torch.ones(2, 2),
        },
        name="sdxl.safetensors",
    )
    assert main(["lora", "merge", str(one), str(stranger), "-o", str(tmp_path / "c.safetensors")]) == 2
    assert "1 of its 1 layers are none of Chroma or Flux" in capsys.readouterr().err


# --- resize ---


def test_a_resize_keeps_the_energy_and_states_the_error(save, tmp_path, capsys):
    path = save(diffusers_tensors())
    assert main(["lora", "resize", str(path), "--energy", "0.8", "--json", "-o", str(tmp_path / "b.safetensors")]) == 0
    result = json.loads(capsys.readouterr().out)
    small = delta(tmp_path / "b.safetensors")
    for name, tensor in expected().items():
        values = torch.linalg.svdvals(tensor)
        share = float(small[name].norm() ** 2 / tensor.norm() ** 2)
        rank = int((values.square().cumsum(0) / values.square().sum() < 0.8).sum()) + 1
        assert share >= 0.8 - 1e-6 and int((torch.linalg.svdvals(small[name]) > 1e-6).sum()) == rank
    assert 0 < result["error"] < 0.2**0.5 + 1e-6 and max(result["ranks"]) <= RANK


def test_a_resize_to_a_rank_and_the_same_rank(save, tmp_path, capsys):
    path = save(kohya_tensors(2.0))
    assert main(["lora", "resize", str(path), "--rank", "4", "-o", str(tmp_path / "same.safetensors")]) == 0
    assert_equal(delta(tmp_path / "same.safetensors"), expected(0.5))
    assert main(["lora", "resize", str(path), "-o", str(tmp_path / "b.safetensors")]) == 2
    assert "--rank: is needed, or --energy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lora", "resize", str(path), "--rank", "0", "-o", str(tmp_path / "b.safetensors")])


def test_a_resized_dora_keeps_its_scales(save, tmp_path):
    path = save(kind_tensors("dora"))
    assert main(["lora", "resize", str(path), "--rank", "2", "-o", str(tmp_path / "b.safetensors")]) == 0
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_q."
    assert torch.equal(before[f"{key}dora_scale"], after[f"{key}dora_scale"]) and len(after[f"{key}lora_A.weight"]) == 2


def test_row_norms_of_a_dora_are_not_rounded(save, tmp_path):
    """They belong to whole rows of the base: 0.2 % of these is a tenth of an update of 2 %."""
    weight = randn(64, 64) * 0.03
    norms = weight.norm(dim=1, keepdim=True) * (1 + 0.01 * randn(64, 1))
    name = "transformer.transformer_blocks.0.attn.to_q."
    factors = {"lora_A.weight": randn(4, 64) * 0.125, "lora_B.weight": randn(64, 4) * 0.002, "dora_scale": norms}
    path = save({name + end: tensor for end, tensor in factors.items()})
    assert (
        main(["lora", "resize", str(path), "--rank", "4", "--dtype", "bf16", "-o", str(tmp_path / "b.safetensors")])
        == 0
    )
    exact, rounded = (open_lora(file).layer(name[12:-1]).delta(weight) for file in (path, tmp_path / "b.safetensors"))
    assert (rounded - exact).norm() <= 0.01 * exact.norm()
    assert load_file(tmp_path / "b.safetensors")[f"{name}lora_A.weight"].dtype == torch.bfloat16


def test_rounding_that_loses_the_update_is_refused(save, tmp_path, capsys):
    tensors = {key: tensor * (1e-9 if "lora_B" in key else 1) for key, tensor in diffusers_tensors().items()}
    assert main(["lora", "strength", str(save(tensors)), "--dtype", "fp16", "-o", str(tmp_path / "b.safetensors")]) == 2
    assert "float16 changes what" in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()


# --- strengths ---


def test_strengths_by_block(save, tmp_path):
    path = save(diffusers_tensors())
    rules = ["double_blocks.0=0.5", "transformer_blocks.0.attn.to_q=2", "single_blocks.*=0"]
    assert main(["lora", "strength", str(path), *rules, "--all", "0.5", "-o", str(tmp_path / "b.safetensors")]) == 0
    factors = {name: 0.5 for name in expected() if not name.startswith("single")}
    factors |= {name: 0.25 for name in factors if name.startswith("transformer_blocks.0.")} | {
        "transformer_blocks.0.attn.to_q": 1.0
    }
    assert_equal(
        delta(tmp_path / "b.safetensors"), {name: factor * expected()[name] for name, factor in factors.items()}
    )


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_strengths_of_other_kinds(save, tmp_path, kind):
    path = save(kind_tensors(kind))
    assert main(["lora", "strength", str(path), "--all", "0.5", "-o", str(tmp_path / "b.safetensors")]) == 0
    assert_equal(delta(tmp_path / "b.safetensors"), {name: tensor * 0.5 for name, tensor in delta(path).items()})


def test_presets_and_rules_that_match_nothing(save, tmp_path, capsys):
    path = save(diffusers_tensors())
    assert (
        main(["lora", "strength", str(path), "--preset", "single blocks", "-o", str(tmp_path / "b.safetensors")]) == 0
    )
    assert all(name.startswith("single") for name in delta(tmp_path / "b.safetensors"))
    assert main(["lora", "strength", str(path), "double_blocks.7=0", "-o", str(tmp_path / "c.safetensors")]) == 2
    assert "'transformer_blocks.7=0' matches none of the 11 layers" in capsys.readouterr().err
    assert main(["lora", "strength", str(path), "nonsense", "-o", str(tmp_path / "c.safetensors")]) == 2
    assert "is not a valid rule" in capsys.readouterr().err
    assert main(["lora", "strength", str(path), "*=0", "-o", str(tmp_path / "c.safetensors")]) == 2
    assert "would have no layers" in capsys.readouterr().err


# --- extract ---


@pytest.fixture
def tuned(tiny_chroma, tiny_model, tmp_path):
    """A tiny Chroma whose weights were changed by a LoRA of rank 3, in diffusers' layout, and that LoRA's updates."""
    family = ChromaFamily()
    transformer = family.load_transformer(tiny_model)
    layers: dict[str, Any] = inject_(
        transformer, resolve_targets(transformer, family, "all+ffs"), 3, 3, generator=GENERATOR, config=AdapterConfig()
    )
    for layer in layers.values():
        layer.lora_B.data.copy_(randn(*layer.lora_B.shape) * 0.05)
    shutil.copytree(tiny_chroma / "transformer", tmp_path / "tuned")
    (file,) = (tmp_path / "tuned").glob("*.safetensors")
    weights = load_file(file)
    for name, layer in layers.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.delta().float()
    save_file(weights, file)
    return tmp_path / "tuned", {name: layer.delta() for name, layer in layers.items()}


def test_what_was_trained_is_extracted(tiny_chroma, tuned, tiny_model, tmp_path, capsys):
    folder, deltas = tuned
    target = tmp_path / "lora.safetensors"
    assert (
        main(
            [
                "lora",
                "extract",
                str(tiny_chroma),
                str(folder),
                "--rank",
                "3",
                "--json",
                "--device",
                "cpu",
                "-o",
                str(target),
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["error"] < 1e-3 and result["loaded"]["ComfyUI"] == result["keys"] == 2 * len(deltas)
    assert_equal(delta(target), deltas, 1e-3)
    assert layer_updates(ChromaFamily().load_transformer(tiny_model), target).keys() == deltas.keys()
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["modelspec.architecture"] == "chroma/lora"
        and len(json.loads(metadata["chroma_trainer_edit"])["parents"]) == 2
    )
    assert (
        main(
            [
                "lora",
                "extract",
                str(tiny_chroma),
                str(folder),
                "--energy",
                "0.9",
                "--device",
                "cpu",
                "-o",
                str(tmp_path / "b.safetensors"),
            ]
        )
        == 0
    )
    assert "relative error" in capsys.readouterr().out


def test_extracts_that_make_no_sense(tiny_chroma, tiny_flux, tmp_path, capsys):
    target = str(tmp_path / "b.safetensors")
    assert (
        main(["lora", "extract", str(tiny_chroma), str(tiny_flux), "--rank", "3", "--device", "cpu", "-o", target]) == 2
    )
    assert "they are not of one model" in capsys.readouterr().err
    assert (
        main(["lora", "extract", str(tiny_chroma), str(tiny_chroma), "--rank", "3", "--device", "cpu", "-o", target])
        == 2
    )
    assert "would have no layers" in capsys.readouterr().err
    assert main(["lora", "extract", str(tiny_chroma / "vae"), str(tiny_chroma), "--rank", "3", "-o", target]) == 2
    assert "is no Chroma or Flux.1 transformer" in capsys.readouterr().err
    assert main(["lora", "extract", str(tmp_path / "nowhere"), str(tiny_chroma), "--rank", "3", "-o", target]) == 2
    assert "does not exist" in capsys.readouterr().err


# --- two files ---


def test_two_files_are_compared_by_their_factors(save, capsys):
    one = save(diffusers_tensors(), name="one.safetensors")
    two = save(kohya_tensors(-2.0), name="two.safetensors")
    with open_lora(one) as first, open_lora(two) as second:
        result = compare(first, second)
    assert result.cosine == pytest.approx(-1) and result.overlap == pytest.approx(1) and result.only == (0, 0)
    other = {key: randn(*tensor.shape) for key, tensor in diffusers_tensors().items() if "single" not in key}
    result = compare(of_tensors(diffusers_tensors()), of_tensors(other))
    whole = expected()
    for layer in result.layers:
        update = of_tensors(other).layer(layer.name).delta(torch.zeros(1))
        cosine = (whole[layer.name] * update).sum() / (whole[layer.name].norm() * update.norm())
        assert layer.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert 0 <= result.overlap < 0.3 and result.only == (5, 0)
    assert main(["doctor", str(one), str(two)]) == 0
    assert "they work against each other" in capsys.readouterr().out


def test_the_overlap_of_subspaces():
    basis = torch.linalg.qr(randn(20, 6))[0]
    first = decompose(basis[:, :2], basis[:, :2].t())
    assert overlap(first, decompose(basis[:, :4], basis[:, :4].t())) == pytest.approx(1)
    assert overlap(first, decompose(basis[:, 2:4], basis[:, 2:4].t())) == pytest.approx(0, abs=1e-9)
    assert overlap(first, decompose(basis[:, 1:3], basis[:, 1:3].t())) == pytest.approx(0.5)


def test_our_own_files_of_every_format_pass_the_tools(tiny_model, tmp_path):
    family = ChromaFamily()
    transformer = family.load_transformer(tiny_model)
    layers: dict[str, Any] = inject_(
        transformer, resolve_targets(transformer, family, "all+ffs"), 4, 4, generator=GENERATOR, config=AdapterConfig()
    )
    for layer in layers.values():
        layer.lora_B.data.copy_(randn(*layer.lora_B.shape) * 0.05)
    deltas = {name: layer.delta() for name, layer in layers.items()}
    for form in ("universal", "comfyui", "kohya"):
        export_lora(layers, transformer, tmp_path / f"{form}.safetensors", {"chroma_trainer": "{}"}, form=form)
        assert main(["doctor", str(tmp_path / f"{form}.safetensors")]) == (
            1 if form == "comfyui" else 0
        )  # diffusers loads none of it
        assert (
            main(
                [
                    "lora",
                    "resize",
                    str(tmp_path / f"{form}.safetensors"),
                    "--rank",
                    "4",
                    "-o",
                    str(tmp_path / f"{form}-2.safetensors"),
                ]
            )
            == 0
        )
        assert_equal(delta(tmp_path / f"{form}-2.safetensors"), deltas, 1e-4)
