"""The adapter of a run: what can't work is refused before weights load; going on from a file; blocks, dropout, averages."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from chroma_trainer.nodes.adapter_settings import SPEC
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.load import read_lora
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.lora import LoraLinear, LoraPair
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.setup.attach_adapter import inject_adapter_
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from safetensors import safe_open
from safetensors.torch import load_file

from tests.narrowing import each_of_type

FAMILY = ChromaFamily()


def request_of(workshop, training=None, level="none", **adapter):
    request = workshop.request(**{"targets": "all", **(training or {})})
    model = replace(request.model, quantization=QuantizationConfig(level=level))
    return replace(request, model=model, adapter=AdapterConfig(**adapter))


def file_of(tiny_model, path, kind="lora", rank=4, targets="all", form="universal"):
    """A file as if trained; its layers."""
    transformer = FAMILY.load_transformer(tiny_model)
    draw = torch.Generator().manual_seed(rank)
    names = resolve_targets(transformer, FAMILY, targets)
    layers = inject_(transformer, names, rank, 4.0, generator=draw, config=AdapterConfig(kind=kind))
    with torch.no_grad():
        for _, parameter in trainable_parameters(layers):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    export_lora(layers, transformer, path, {}, form=form)
    return layers


def begun(request, host):
    """The model as its training begins, and its layers."""
    transformer = FAMILY.load_transformer(request.model)
    return transformer, inject_adapter_(transformer, FAMILY, request, torch.device("cpu"), host).layers


# --- refused before anything is loaded ---


@pytest.mark.parametrize(
    ("training", "level", "adapter", "message"),
    [
        ({"init": "pissa"}, "none", {"kind": "lokr"}, "init: 'pissa' can't initialize a lokr; use default, gaussian"),
        ({"init": "gaussian"}, "none", {"kind": "loha"}, "init: 'gaussian' can't initialize a loha; use default"),
        ({"init": "loftq"}, "int8-quanto", {"kind": "dora"}, "init: 'loftq' can't initialize a dora"),
        ({"init": "loftq"}, "none", {}, "init: 'loftq' corrects quantization errors, but the model is not quantized; connect QuantizeModel"),
        ({}, "none", {"kind": "lokr", "format": "kohya"}, "format: 'kohya' can't store a lokr"),
        ({"init": "pissa"}, "none", {"precision": "bf16"}, "precision: bf16 is too coarse for the update of init 'pissa'"),
        ({}, "none", {"kind": "dora", "precision": "fp16"}, "precision: fp16 is too coarse for the magnitudes of a dora; use fp32"),
        ({}, "none", {"block_lr": "blocks.0=0"}, "block_lr: 'blocks.0=0' matches none of the"),
        ({}, "none", {"block_lr": "*=0"}, "block_lr: sets the learning rate of every layer to 0"),
        ({"targets": "x_embeder"}, "none", {}, "targets: 'x_embeder' matches no layer"),
    ],
)  # fmt: skip
def test_what_can_not_work(workshop, monkeypatch, training, level, adapter, message):
    monkeypatch.setattr(ChromaFamily, "load_transformer", lambda *args, **keywords: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as caught:
        run(request_of(workshop, training, level, **adapter), workshop.host())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_a_finished_run_is_written_anew_in_another_precision(workshop, precision):
    host = workshop.host()
    exact = run(request_of(workshop, {"steps": 2}), host)
    whole = load_file(exact.lora.path)
    rounded = run(request_of(workshop, {"steps": 2}, precision=precision), host)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert rounded.lora.folder == exact.lora.folder and rounded.losses == exact.losses
    assert all(torch.equal(tensor, whole[key].to(dtype)) for key, tensor in load_file(rounded.lora.path).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transformer_blocks.0", "is not a valid rule; write for example"),
        ("a=x", "is not a valid rule"),
        ("a=-1", "is not a valid rule"),
        ("a=1e400", "is not a valid rule"),
        ("a=101", "use 0 to 100"),
        ("transformer_blocks.3-1=0", "has the range 3 to 1"),
    ],
)
def test_rules_that_are_none(text, message):
    (problem,) = AdapterConfig(block_lr=text).problems()
    assert problem.field == "block_lr" and message in problem.message


def test_a_lokr_factor_of_0():
    (problem,) = AdapterConfig(lokr_factor=0).problems()
    assert problem.field == "lokr_factor"


# --- going on from a file ---


@pytest.mark.parametrize("form", ["universal", "comfyui", "kohya"])
@pytest.mark.parametrize(
    ("kind", "rank"), [("lora", 4), ("lora", 7), ("rslora", 5), ("dora", 4), ("loha", 4), ("lokr", 4)]
)
def test_a_run_begins_with_what_the_file_holds(workshop, tiny_model, tmp_path, kind, rank, form):
    if (kind, form) in (("lokr", "comfyui"), ("lokr", "kohya")):
        return  # there is no such file
    wanted = file_of(tiny_model, tmp_path / "a.safetensors", "lora" if kind == "rslora" else kind, form=form)
    request = request_of(workshop, {"rank": rank}, kind=kind, init_lora=str(tmp_path / "a.safetensors"))
    if kind == "loha":
        request = replace(request, training=replace(request.training, alpha=4.0))
    host = workshop.host()
    _, layers = begun(request, host)
    assert layers.keys() == wanted.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta(), wanted[name].delta(), rtol=1e-4, atol=1e-6)
    assert host.told() == [f"training continues from a.safetensors: {len(layers)} layers"]
    if kind == "lora" and rank == 7:  # what is beyond the file's rank can learn
        for layer in each_of_type(layers, LoraLinear).values():
            assert layer.lora_A[4:].any() and not layer.lora_B[:, 4:].any()


def test_a_dora_takes_up_a_lora(workshop, tiny_model, tmp_path):
    wanted = file_of(tiny_model, tmp_path / "a.safetensors")
    _, layers = begun(request_of(workshop, kind="dora", init_lora=str(tmp_path / "a.safetensors")), workshop.host())
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta(), wanted[name].delta(), rtol=1e-4, atol=1e-5)


def test_layers_that_the_file_lacks_start_anew(workshop, tiny_model, tmp_path):
    some = file_of(tiny_model, tmp_path / "a.safetensors", targets="context")
    host = workshop.host()
    _, layers = begun(request_of(workshop, init_lora=str(tmp_path / "a.safetensors")), host)
    anew = [layer for name, layer in each_of_type(layers, LoraLinear).items() if name not in some]
    assert anew and all(layer.lora_A.any() and not layer.lora_B.any() for layer in anew)
    assert host.told() == [
        f"training continues from a.safetensors: {len(some)} layers; "
        f"{len(anew)} layers that are not in the file are newly initialized"
    ]


@pytest.mark.parametrize(
    ("made", "training", "adapter", "message"),
    [
        ({"rank": 6}, {}, {}, "can't continue from 22 of the file's 22 layers, such as .*the file's rank is 6 and the run's is 4; set rank to 6"),
        ({"kind": "dora"}, {}, {}, "the file is a DoRA; set kind to dora"),
        ({"kind": "lokr"}, {}, {}, "the file contains lokr weights; set kind to lokr"),
        ({}, {}, {"kind": "lokr"}, "the file is not a LoKr"),
        ({"kind": "lokr"}, {}, {"kind": "lokr", "lokr_factor": 2}, "set rank, alpha, lokr_factor and lokr_decompose_both"),
        ({"kind": "loha"}, {"alpha": 8.0}, {"kind": "loha"}, "set rank to 4 and alpha to 4"),
        ({}, {"targets": "mmdit"}, {}, "8 of the file's 22 layers are not trained, such as .*choose targets"),
        ({}, {}, {"block_lr": "transformer_blocks.0=0"}, "8 of the file's 22 layers are not trained"),
        ({}, {"init": "pissa"}, {}, "continues from a file, so init 'pissa' has nothing to initialize"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_gone_on_from(
    workshop, tiny_model, tmp_path, monkeypatch, made, training, adapter, message
):
    file_of(tiny_model, tmp_path / "a.safetensors", **made)
    monkeypatch.setattr(ChromaFamily, "load_transformer", lambda *args, **keywords: pytest.fail("a model was loaded"))
    request = request_of(workshop, training, init_lora=str(tmp_path / "a.safetensors"), **adapter)
    with pytest.raises(UserError, match=f"^init_lora: .*{message}"):
        run(request, workshop.host())


def test_a_file_of_another_model_and_no_file(workshop, tiny_model, tmp_path):
    from safetensors.torch import save_file

    names = ("transformer.x_embedder", "transformer.other.layer")
    tensors = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for name in names for side in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    request = request_of(workshop, init_lora=str(tmp_path / "a.safetensors"))
    with pytest.raises(
        UserError,
        match=r"init_lora: a.safetensors is not for this model: 2 of 2 layers do not fit, such as other.layer, x_emb",
    ):
        run(request, workshop.host())
    with pytest.raises(UserError, match=r"gone\.safetensors: is not a readable LoRA file"):
        run(request_of(workshop, init_lora=str(tmp_path / "gone.safetensors")), workshop.host())


def test_the_files_bytes_name_the_run_and_not_its_place(workshop, tiny_model, tmp_path):
    file_of(tiny_model, tmp_path / "a.safetensors")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "elsewhere" / "b.safetensors")
    file_of(tiny_model, tmp_path / "c.safetensors", rank=3)

    def folder(path):
        return plan_run(request_of(workshop, init_lora=str(path)), workshop.host()).folder.name

    one = folder(tmp_path / "a.safetensors")
    assert one == folder(tmp_path / "elsewhere" / "b.safetensors") != folder(tmp_path / "c.safetensors")
    assert str(tmp_path) not in str(
        request_of(workshop, init_lora=str(tmp_path / "a.safetensors")).as_json()["adapter"]
    )


def test_the_node_finds_files_in_the_loras_folders_only(tmp_path, workshop):
    (tmp_path / "loras").mkdir()
    for name in ("loras/a.safetensors", "secret.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    host = workshop.host()
    object.__setattr__(host, "paths", Paths(tmp_path, tmp_path, {"loras": (tmp_path / "loras",)}))
    (config,) = SPEC.run(SPEC.inputs(init_lora="a.safetensors"), host)
    assert config.init_lora == str(tmp_path / "loras" / "a.safetensors")
    for name in ("../secret.safetensors", "b.safetensors"):
        with pytest.raises(UserError, match=r"^init_lora: .* is not in the loras folders"):
            SPEC.run(SPEC.inputs(init_lora=name), host)


# --- runs ---


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "adapter", "wanted"),
    [
        ({"alpha": 8.0}, {}, ("4", "4", "networks.lora", None)),
        ({"alpha": 8.0}, {"kind": "rslora"}, ("4", "4", "networks.lora", None)),
        ({"init": "pissa"}, {}, ("8", "8", "networks.lora", None)),
        ({"alpha": 8.0}, {"kind": "dora"}, ("4", "4", "lycoris.kohya", '{"algo": "lora", "dora_wd": "True"}')),
        ({"alpha": 8.0}, {"kind": "lokr"}, ("4", "8", "lycoris.kohya", '{"algo": "lokr"}')),
        ({"alpha": 8.0}, {"kind": "loha"}, ("4", "8", "lycoris.kohya", '{"algo": "loha"}')),
    ],
)  # fmt: skip
def test_the_header_says_what_the_file_is(workshop, training, adapter, wanted):
    host = workshop.host()
    run(request_of(workshop, {"steps": 1, **training}, **adapter), host)
    found = metadata_of(host.lora)
    names = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
    assert tuple(found.get(name) for name in names) == wanted


@pytest.mark.slow
def test_a_finished_run_writes_its_file_in_another_format(workshop):
    host = workshop.host()
    run(request_of(workshop, {"steps": 2}), host)
    first = each_of_type(read_lora(host.lora), LoraPair)
    again = workshop.host(host.paths.output)
    result = run(request_of(workshop, {"steps": 2}, format="comfyui"), again)
    assert result.report["resumed_from"] == 2 and len(list((host.paths.output / "chroma_trainer").iterdir())) == 1
    assert all(key.startswith("diffusion_model.") for key in load_file(host.lora))
    second = read_lora(host.lora)
    one = first["single_transformer_blocks.0.attn.to_k"]
    assert torch.equal(second["single_blocks.0.linear1"].rows(slice(64, 128)).delta(one.up), one.delta(one.up))


@pytest.mark.slow
def test_blocks_learn_at_their_own_rates(workshop):
    """One step shows them: halves, wholes, and layers that are not in the file."""
    text = "*=0.5; transformer_blocks.0-0=0; single_transformer_blocks.1.attn.to_q=1"
    moved = {}
    for rule in ("", text):
        host = workshop.host()
        run(request_of(workshop, {"steps": 1, "weight_decay": 0.0, "learning_rate": 1e-3}, block_lr=rule), host)
        moved[rule] = {name: pair.up for name, pair in each_of_type(read_lora(host.lora), LoraPair).items()}
    plain, ruled = moved[""], moved[text]
    assert {name for name in plain if name not in ruled} == {
        name for name in plain if name.startswith("transformer_blocks.0.")
    }
    for name, up in ruled.items():
        factor = 1.0 if name == "single_transformer_blocks.1.attn.to_q" else 0.5
        # AdamW's first step is the rate, with the gradient's sign. A, and so the signs, differ: fewer layers draw from the seed.
        assert up.abs().median().item() == pytest.approx(factor * 1e-3, rel=0.01), name
        assert plain[name].abs().median().item() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.slow
def test_the_average_is_saved_and_not_the_last_weights(workshop):
    host, plain = workshop.host(), workshop.host()
    run(request_of(workshop, ema_decay=0.9), host)
    run(request_of(workshop), plain)
    checkpoint = host.run_folder / "checkpoints" / "step-000006"
    averages, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "adapter.safetensors")
    name = "single_transformer_blocks.0.attn.to_k"
    saved = load_file(host.lora)[f"transformer.{name}.lora_B.weight"]
    assert torch.equal(saved, averages[f"{name}.lora_B"]) and not torch.equal(saved, last[f"{name}.lora_B"])
    assert torch.equal(last[f"{name}.lora_B"], load_file(plain.lora)[f"transformer.{name}.lora_B.weight"])
    assert averages["num_updates"].item() == 6


@pytest.mark.slow
def test_eva_looks_along_the_data_before_it_trains(workshop):
    starts = []
    for _ in range(2):
        host = workshop.host()
        run(request_of(workshop, {"steps": 1, "init": "eva", "learning_rate": 1e-9}, eva_batches=2), host)
        starts.append({name: pair.down for name, pair in each_of_type(read_lora(host.lora), LoraPair).items()})
    for name, down in starts[0].items():
        assert torch.equal(down, starts[1][name])
        torch.testing.assert_close(down @ down.t(), torch.eye(4), rtol=0, atol=1e-4)
    q, k = (starts[0][f"transformer_blocks.1.attn.to_{part}"] for part in "qk")
    assert torch.equal(q, k)  # the same inputs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_recomputed_and_off_outside_of_training(workshop, checkpointing):
    values = {"steps": 2, "gradient_checkpointing": checkpointing}
    hosts = workshop.host(), workshop.host(), workshop.host()
    run(request_of(workshop, values, dropout=0.5), hosts[0])
    run(request_of(workshop, {**values, "gradient_checkpointing": not checkpointing}, dropout=0.5), hosts[1])
    run(request_of(workshop, values), hosts[2])
    one, two, none = (load_file(host.lora) for host in hosts)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(one[name], none[name]) for name in one)
