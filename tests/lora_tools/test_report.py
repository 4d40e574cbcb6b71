"""The report of a LoRA: the tool, the base model, what is wrong, the rank that is needed, and the repaired file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.adapters.files.keys import layers_of
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.lora_tools.reader import of_tensors, open_lora
from chroma_trainer.trainer_core.lora_tools.report.base_model import base_of
from chroma_trainer.trainer_core.lora_tools.report.examine import MOST_POINTS, examine
from chroma_trainer.trainer_core.lora_tools.report.origin import origin_of
from chroma_trainer.trainer_core.lora_tools.report.repair import repair
from chroma_trainer.trainer_core.lora_tools.report.report_text import report_text
from chroma_trainer.trainer_core.plots.lora_chart import draw_lora_chart
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import (
    LAYERS,
    RANK,
    WIDTH,
    assert_equal,
    delta,
    diffusers_tensors,
    expected,
    factors,
    kohya_tensors,
    native_tensors,
)

KOHYA = {
    "ss_session_id": "1",
    "ss_network_module": "networks.lora_flux",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
}


def report_of(path):
    with open_lora(path) as lora:
        return examine(lora)


def fix(path, target):
    with open_lora(path) as lora:
        return repair(lora, examine(lora), target)


def texts(report, severity=None):
    return [finding.text for finding in report.findings if severity in (None, finding.severity)]


# --- which tool, which model ---

SIGNS = [
    ({"chroma_trainer": "{}"}, "transformer.x.lora_A.weight", "ChromaTrainer"),
    ({"software": '{"name": "ai-toolkit", "version": "1"}'}, "transformer.x.lora_A.weight", "ai-toolkit"),
    ({"ot_branch": "master"}, "lora_transformer_x.lora_down.weight", "OneTrainer"),
    ({}, "lora_transformer_x.lora_down.weight", "OneTrainer"),
    ({}, "lycoris_x.lokr_w1", "SimpleTuner with LyCORIS"),
    ({"ss_network_module": "lycoris.kohya", "ss_session_id": "1"}, "lora_unet_x.lokr_w1", "LyCORIS in kohya's sd-scripts"),
    (KOHYA, "lora_unet_x.lora_down.weight", "kohya's sd-scripts"),
    ({"ss_network_module": "networks.lora"}, "lora_unet_x.lora_down.weight", "kohya's sd-scripts (merged, resized or converted)"),
    ({"lora_adapter_metadata": "{}"}, "transformer.x.lora_A.weight", "diffusers or SimpleTuner"),
    ({}, "base_model.model.x.lora_A.weight", "peft"),
    ({}, "diffusion_model.x.diff_b", "ComfyUI (Extract and Save LoRA)"),
    ({}, "diffusion_model.x.lora_A.weight", "diffusion-pipe or ai-toolkit"),
    ({}, "double_blocks.0.processor.qkv_lora1.down.weight", "XLabs' trainer"),
    ({"software": "[1"}, "strange", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "key", "tool"), SIGNS)
def test_the_tool_is_named(save, metadata, key, tool):
    with open_lora(save({key: torch.zeros(1)}, metadata)) as lora:
        assert origin_of(lora)[0] == tool


def pair(name, rows, columns):
    return {f"{name}.lora_down.weight": torch.ones(2, columns), f"{name}.lora_up.weight": torch.ones(rows, 2)}


OTHERS = [
    (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048), "Stable Diffusion XL"),
    (pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768), "Stable Diffusion 1.5"),
    (pair("diffusion_model.blocks.0.self_attn.q", 64, 64), "Wan"),
    (pair("diffusion_model.layers.0.attention.to_q", 64, 64), "Lumina or Z-Image"),
    (pair("transformer.transformer_blocks.0.img_mlp.net.0.proj", 64, 64), "Qwen-Image"),
    (pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", 64, 64), "Stable Diffusion 3"),
    (pair("lora_unet_double_blocks_0_img_attn_proj", 6144, 6144) | pair("lora_unet_single_blocks_0_linear1", 9 * 6144, 6144), "Flux.2"),
    (pair("base_model.model.model.layers.0.self_attn.q_proj", 64, 64), "a language model"),
    (pair("something.else", 64, 64), "unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "name"), OTHERS)
def test_other_models_are_named_and_not_repaired(save, tmp_path, tensors, name):
    path = save(tensors)
    report = report_of(path)
    assert not report.base.is_ours and report.base.name == name
    assert texts(report, "error")[0].startswith(f"it is no LoRA of Chroma or Flux.1, but of {name}")
    with pytest.raises(UserError, match=r"can't be repaired: it is no LoRA of Chroma"):
        fix(path, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "metadata", "family"),
    [
        ("double_blocks.0.img_attn.proj", {}, "Chroma or Flux.1"),
        ("double_blocks.0.img_attn.proj", {"modelspec.architecture": "chroma/lora"}, "Chroma"),
        ("double_blocks.0.img_attn.proj", {"ss_base_model_version": "flux1"}, "Flux.1"),
        ("single_blocks.0.modulation.lin", {"ss_base_model_version": "chroma"}, "Flux.1"),
        ("distilled_guidance_layer.in_proj", {}, "Chroma"),
    ],
)
def test_the_base_by_its_layers_and_metadata(save, name, metadata, family):
    rows = 3 if "modulation" in name else 1
    with open_lora(save(pair(f"diffusion_model.{name}", rows * 3072, 3072), metadata)) as lora:
        base = base_of(lora)
    assert (base.name, base.is_ours, base.width) == (family, True, 0 if "distilled" in name else 3072)


def test_layers_that_released_models_lack_are_errors(save):
    tensors = pair("diffusion_model.double_blocks.0.img_attn.proj", 3072, 3072) | pair(
        "diffusion_model.double_blocks.19.img_attn.proj", 3072, 3072
    )
    report = report_of(save(tensors))
    assert "1 layer is none of Chroma or Flux.1: double_blocks.19.img_attn.proj" in texts(report, "error")


# --- files of other tools load after the repair ---

WRAPPED = {
    "peft": diffusers_tensors("base_model.model."),
    "peft in diffusers": diffusers_tensors("transformer.base_model.model.", ".default"),
    "adapter name": diffusers_tensors("transformer.", ".my_style"),
    "bare original names": native_tensors(""),
    "original names with diffusers' prefix": native_tensors("transformer."),
    "bundled checkpoint": native_tensors("model.diffusion_model."),
    "kohya's prefix on diffusers' names": {
        key.replace(".", "_", key.count(".") - 2): tensor for key, tensor in diffusers_tensors("lora_unet_").items()
    },
    "old names of diffusers": {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for key, tensor in diffusers_tensors().items()
    },
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_names_that_do_not_load_are_repaired(save, tmp_path, form):
    path = save(WRAPPED[form])
    report = report_of(path)
    assert report.needs_repair and not report.is_sound
    assert any(f"of {report.num_keys} keys are not loaded by" in text for text in texts(report))
    written = fix(path, tmp_path / "b.safetensors")
    assert written.loaded == {"ComfyUI": written.num_keys, "diffusers": written.num_keys}
    assert_equal(delta(tmp_path / "b.safetensors"), expected())
    again = report_of(tmp_path / "b.safetensors")
    assert again.is_sound and not again.needs_repair and again.tool == "ChromaTrainer (doctor)"


def test_a_sound_file_of_each_common_form_has_no_errors(save):
    for tensors in (kohya_tensors(), diffusers_tensors()):
        report = report_of(save(tensors, KOHYA))
        assert not texts(report, "error") and not texts(report, "warning"), texts(report)
        assert report.base.width == WIDTH and all(not keys for keys in report.unloaded.values())


def test_what_peft_baked_into_nothing_is_repaired(save, tmp_path):
    """diffusers' header holds alpha; ComfyUI does not read it."""
    path = save(
        diffusers_tensors(),
        {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 16})},
    )
    assert "it applies 1 instead of 4" in texts(report_of(path), "error")[0]
    fix(path, tmp_path / "b.safetensors")
    assert_equal(delta(tmp_path / "b.safetensors"), expected(4))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()


@pytest.mark.parametrize(
    ("alpha", "metadata", "text", "scale"),
    [
        (0.0, {}, "alpha is 0, so nothing is applied; alpha = rank (1) is used in its place", 1),
        (0.0, KOHYA, "alpha is 0, so nothing is applied; the metadata's scale (0.5) is used in its place", 0.5),
        (float("nan"), KOHYA, "alpha is not a number; the metadata's scale (0.5) is used in its place", 0.5),
        (None, KOHYA, "alpha is missing, and the metadata gives a scale of 0.5: ComfyUI applies 1", 0.5),
    ],
)
def test_alphas_that_are_wrong_are_repaired(save, tmp_path, alpha, metadata, text, scale):
    path = save(kohya_tensors(alpha), metadata)
    assert any(line.startswith(text) for line in texts(report_of(path), "error"))
    fix(path, tmp_path / "b.safetensors")
    assert_equal(delta(tmp_path / "b.safetensors"), expected(scale))


@pytest.mark.parametrize(
    ("alpha", "severity", "text"),
    [
        (4000.0, "warning", "alpha 4000 at rank 4 is far off: a scale of 1000"),
        (None, "note", "alpha is missing: every program applies"),
    ],
)
def test_alphas_that_may_be_wrong_are_only_reported(save, tmp_path, alpha, severity, text):
    path = save(kohya_tensors(alpha))
    assert any(line.startswith(text) for line in texts(report_of(path), severity))
    fix(path, tmp_path / "b.safetensors")
    assert_equal(delta(tmp_path / "b.safetensors"), expected((alpha or RANK) / RANK))


def test_broken_dead_and_incomplete_layers_are_named_and_left_out(save, tmp_path):
    tensors = diffusers_tensors()
    nan, dead, single = (
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.ff.net.2",
        "single_transformer_blocks.1.proj_out",
    )
    tensors[f"transformer.{nan}.lora_B.weight"][0, 0] = torch.inf
    tensors[f"transformer.{dead}.lora_B.weight"].zero_()
    del tensors[f"transformer.{single}.lora_B.weight"]
    path = save(tensors)
    report = report_of(path)
    assert f"1 layer has values that are NaN or infinite; images become black: {nan}" in texts(report, "error")
    assert f"1 layer has tensors that do not fit together: {single}" in texts(report, "error")
    assert f"1 layer is zero: it was not trained, or rounded away: {dead}" in texts(report, "note")
    fix(path, tmp_path / "b.safetensors")
    wanted = {name: tensor for name, tensor in expected().items() if name not in (nan, dead, single)}
    assert_equal(delta(tmp_path / "b.safetensors"), wanted)


def test_a_lora_that_is_zero_is_an_error(save, tmp_path):
    tensors = {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in diffusers_tensors().items()}
    path = save(tensors)
    assert any("layers are zero" in text for text in texts(report_of(path), "error"))
    with pytest.raises(UserError, match="would have no layers"):
        fix(path, tmp_path / "b.safetensors")


def test_layers_that_are_there_twice(save, tmp_path):
    name = "transformer_blocks.0.attn.to_out.0"
    down, up = factors("double_blocks.0.img_attn.proj")
    tensors = diffusers_tensors() | {
        f"diffusion_model.{name}.lora_A.weight": down,
        f"diffusion_model.{name}.lora_B.weight": up,
    }
    tensors |= {
        f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight": tensor
        for side, tensor in zip("AB", factors("double_blocks.0.img_attn.qkv"), strict=True)
    }
    path = save(tensors)
    errors = texts(report_of(path), "error")
    assert any(text.startswith("2 keys repeat a layer under another name") for text in errors)
    assert any(text.startswith("3 layers are there twice, fused and alone; ComfyUI adds both") for text in errors)
    fix(path, tmp_path / "b.safetensors")
    assert_equal(delta(tmp_path / "b.safetensors"), expected())


def test_layers_of_a_wrong_shape_and_foreign_keys(save, tmp_path):
    tensors = diffusers_tensors() | pair("transformer.transformer_blocks.1.attn.to_q", 65, 64)
    tensors |= {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 4),
        "nonsense": torch.ones(1),
    }
    tensors["transformer.x_embedder.lora_B.bias"] = torch.ones(64)
    report = report_of(save(tensors))
    assert "1 layer does not have the shape that the others give (width 64): transformer_blocks.1.attn.to_q" in texts(
        report, "error"
    )
    assert any(text.startswith("1 key changes text encoders") for text in texts(report, "note"))
    assert any(text.startswith("1 key is bias differences") for text in texts(report, "warning"))
    fix(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert_equal(delta(tmp_path / "b.safetensors"), expected())
    assert len(load_file(tmp_path / "b.safetensors")) == len(diffusers_tensors())


def test_the_repaired_file_has_its_parents_record(save, tmp_path):
    path = save(
        native_tensors(""), {"prompt": "{}", "modelspec.trigger_phrase": "sks", "sshs_model_hash": "old", "other": "x"}
    )
    fix(path, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata = file.metadata()
    edit = json.loads(metadata["chroma_trainer_edit"])
    with open_lora(path) as lora:
        assert edit["operation"] == "doctor" and edit["parents"][0]["sha256"] == lora.sha256
    assert (
        metadata["prompt"] == "{}"
        and metadata["modelspec.trigger_phrase"] == "sks"
        and metadata["sshs_model_hash"] != "old"
    )
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4"


# --- the rank that is needed ---


def test_the_spectrum_is_that_of_the_full_matrix(save):
    name = "double_blocks.0.img_attn.proj"
    down, up = factors(name, 16)
    up = up * torch.linspace(1, 0.01, 16) ** 3
    report = report_of(
        save(
            {
                f"transformer.{layers_of(name)[0][0]}.lora_A.weight": down,
                f"transformer.{layers_of(name)[0][0]}.lora_B.weight": up,
            }
        )
    )
    values = torch.linalg.svdvals(up.double() @ down.double())
    shares = values.square().cumsum(0) / values.square().sum()
    assert report.layers[0].norm == pytest.approx(float(values.norm()), rel=1e-5)
    assert report.layers[0].needed_rank == int((shares < 0.95).sum()) + 1 < 8
    assert any("half of the rank or more is unused" in text for text in texts(report, "note"))


def test_sizes_by_block(save):
    sizes = report_of(save(native_tensors())).sizes()
    wanted: dict[str, float] = {}
    for name in LAYERS:
        down, up = factors(name)
        block = f"{name.partition('_')[0]} {name.split('.')[1]}"
        wanted[block] = wanted.get(block, 0) + float((up @ down).norm() ** 2)
    assert list(sizes) == ["double 0", "double 1", "single 0", "single 1"]
    assert sizes == {block: pytest.approx(value**0.5, rel=1e-5) for block, value in wanted.items()}


# --- the command ---


@pytest.mark.parametrize("command", ["doctor", "inspect"])
def test_json_commands_no_terminal(save, capsys, command):
    path = save(native_tensors("diffusion_model."))
    path = path.rename(path.with_name("a\u202eb.safetensors"))
    main([command, str(path), "--json"])
    out = capsys.readouterr().out
    assert "\u202e" not in out and json.loads(out)["file"].startswith("a\u202eb")


def test_the_command_prints_repairs_and_never_replaces(save, tmp_path, capsys):
    path = save(native_tensors(""))
    assert main(["doctor", str(path)]) == 1
    out = capsys.readouterr().out
    assert "12 of 12 keys are not loaded by ComfyUI" in out and "-o FIXED.safetensors writes a repaired file" in out
    assert main(["doctor", str(path), "-o", str(path)]) == 2
    assert "exists already; use another name, or --force" in capsys.readouterr().err
    fixed, chart = tmp_path / "fixed.safetensors", tmp_path / "chart.png"
    assert main(["doctor", str(path), "-o", str(fixed), "--chart", str(chart), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repaired"]["loaded"]["ComfyUI"] == result["repaired"]["keys"] and chart.stat().st_size > 5000
    assert main(["doctor", str(fixed)]) == 0 and "nothing is wrong with it" in capsys.readouterr().out
    assert main(["doctor", str(path), "-o", str(path), "--force"]) == 0
    assert path.read_bytes() != b"" and main(["doctor", str(path)]) == 0


def test_files_that_are_none(save, tmp_path, capsys):
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    assert main(["doctor", str(tmp_path / "b.safetensors")]) == 2
    assert "is not a safetensors file" in capsys.readouterr().err
    assert main(["doctor", str(save({"model.weight": torch.zeros(2, 2)}))]) == 1
    assert "the file is no LoRA: none of its 1 keys belongs to an adapter" in capsys.readouterr().out
    whole = save(native_tensors()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    assert main(["doctor", str(tmp_path / "cut.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "the file is damaged: its size is" in out
    assert main(["doctor", str(tmp_path / "cut.safetensors"), "-o", str(tmp_path / "d.safetensors")]) == 2
    assert "can't be repaired: the file is damaged" in capsys.readouterr().err


def test_the_text_can_be_ascii(save):
    report_text(report_of(save(native_tensors())), ascii_only=True).encode("ascii")


def test_tensors_of_a_connection_have_a_report_too():
    report = examine(of_tensors(native_tensors(), "from a node"))
    assert report.name == "from a node" and report.base.width == WIDTH and len(report.layers) == len(LAYERS)


def test_the_chart_shows_each_block():
    image = draw_lora_chart(
        "title", "subtitle", {"double 0": 1.0, "double 3": 2.0, "single 1": 4.0, "outside": 1.0}, [(2, 4)]
    )
    colors = {color for _, color in image.getcolors(1 << 20) or []}
    assert len(colors) > 10
    assert draw_lora_chart("empty", "", {}, []).size == image.size


def test_the_spectrum_over_all_layers(save):
    """The share of the squared norm that the first ranks hold, of the median layer; of one of a lower rank it is 1."""
    values, layers = (4.0, 3.0, 0.0), ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0")
    tensors = {}
    for layer, rank in zip(layers, (3, 1), strict=True):
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.diag(torch.tensor(values))[:rank] @ torch.eye(3, 64)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.eye(64, rank)
    with open_lora(save(tensors)) as lora:
        report = examine(lora)
    assert report.as_json()["layers"][0]["rank_of_95_percent"] == 2
    points = {point["rank"]: (point["low"], point["median"], point["high"]) for point in report.spectrum()}
    assert points == {1: (0.64, 0.82, 1), 2: (1, 1, 1), 3: (1, 1, 1)}
    long = replace(report, layers=(replace(report.layers[0], shares=tuple(i / 1000 for i in range(1, 1001))),))
    assert len(long.spectrum()) <= MOST_POINTS + 1 and long.spectrum()[-1] == {
        "rank": 1000,
        "low": 1,
        "median": 1,
        "high": 1,
    }
