"""Every kind, start and format: the file on the clean base is the trained model; in our reader, in diffusers and in peft."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.dense_weight import dense_weight
from chroma_trainer.trainer_core.adapters.dora import DoraLinear
from chroma_trainer.trainer_core.adapters.files.export import export_lora
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_, read_lora
from chroma_trainer.trainer_core.adapters.initializers import Directions
from chroma_trainer.trainer_core.adapters.inject import (
    adapter_state,
    inject_,
    load_adapter_state_,
    set_strength_,
    trainable_parameters,
)
from chroma_trainer.trainer_core.adapters.layer import AdapterLayer, IncompatibleUpdate
from chroma_trainer.trainer_core.adapters.lokr import LokrLinear, factors_of, kron_linear
from chroma_trainer.trainer_core.adapters.lora import LoraLinear, LoraPair
from chroma_trainer.trainer_core.adapters.oft import OftUpdate, block_size
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from chroma_trainer.trainer_core.registry import load, names
from safetensors.torch import load_file
from torch import nn

from tests.narrowing import of_type, present

FAMILY = ChromaFamily()
RELATIVE = 1e-5  # of the largest output: fp32 products, summed in another order
SIGMA = torch.tensor([0.3, 0.8])
HEIGHT, WIDTH = 8, 6
KINDS: dict[str, type[AdapterLayer]] = {name: load("adapter", name) for name in names("adapter")}
STARTS = [(kind, init) for kind, layer in KINDS.items() for init in layer.inits if init != "loftq"]
FILES = [(kind, init, form) for kind, init in STARTS for form in KINDS[kind].formats]


def everyday(cases: list[tuple[str, ...]]) -> list[Any]:
    """Mark the cases of other inits than the default one slow: each is trained first."""
    return [case if case[1] == "default" else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


SETTINGS = {"lokr": {"lokr_factor": 4, "lokr_decompose_both": True}}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config_of(kind: str) -> AdapterConfig:
    return AdapterConfig(kind=kind, svd_iterations=2, **SETTINGS.get(kind, {}))


def started(model: nn.Module, layer_names, kind: str, init: str, clean: nn.Module | None = None):
    """Rank 4, alpha 6."""
    layers = inject_(model, layer_names, 4, 6.0, init, seeded(1), config_of(kind), clean=clean)
    if init == "eva":
        for layer in layers.values():
            directions = Directions(8)
            directions.see(torch.randn(30, layer.in_features, generator=seeded(layer.in_features)))
            layer.init_along_(directions.rows(4))
    return layers


@torch.no_grad()
def train_(layers, size: float = 0.05) -> None:
    draw = seeded(7)
    for _, parameter in trainable_parameters(layers):
        parameter.add_(torch.randn(parameter.shape, generator=draw) * size)


@functools.cache
def targets(folder: str) -> list[str]:
    from chroma_trainer.trainer_core.config.model import ModelConfig

    model = ModelConfig(family="chroma", flavour="tiny", repo=folder, dtype="fp32")
    return resolve_targets(FAMILY.load_transformer(model), FAMILY, "all+ffs+embedder")


def text():
    return [torch.randn(7, 32, generator=seeded(4 + i)) for i in range(2)]


def latents():
    return torch.randn(2, 16, HEIGHT, WIDTH, generator=seeded(5))


@torch.no_grad()
def ours(transformer):
    return FAMILY.predict(transformer, latents(), SIGMA, text())


@torch.no_grad()
def theirs(transformer):
    velocity = transformer(
        hidden_states=pack(latents()), encoder_hidden_states=torch.stack(text()), timestep=SIGMA,
        img_ids=image_ids(HEIGHT, WIDTH), txt_ids=torch.zeros(7, 3), return_dict=False,
    )[0]  # fmt: skip
    return unpack(velocity, HEIGHT, WIDTH)


def assert_same(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= RELATIVE * two.abs().max()


@pytest.fixture(scope="module")
def train(tiny_model):
    """train(kind, init): a trained adapter in its model, which tests share: they must leave it as it is."""

    @functools.cache
    def make(kind: str, init: str):
        transformer = FAMILY.load_transformer(tiny_model)
        base = ours(transformer)
        layers = started(transformer, targets(tiny_model.repo), kind, init)
        train_(layers)
        assert (ours(transformer) - base).abs().max() > 100 * RELATIVE * base.abs().max()
        return transformer, layers

    return make


# --- the file ---


@pytest.mark.parametrize(("kind", "init", "form"), everyday(FILES))
def test_the_file_on_the_clean_base_is_the_trained_model(train, tiny_model, tmp_path, kind, init, form):
    transformer, layers = train(kind, init)
    saved = export_lora(layers, transformer, tmp_path / "a.safetensors", {}, form=form)
    assert saved.applied == saved.num_keys == len(load_file(tmp_path / "a.safetensors"))
    fresh = FAMILY.load_transformer(tiny_model)
    applied = apply_lora_(fresh, tmp_path / "a.safetensors")
    assert applied.keys() == layers.keys()
    assert not [p for p in fresh.parameters() if p.requires_grad]
    assert_same(ours(fresh), ours(transformer))


@pytest.mark.parametrize(("kind", "init"), everyday(STARTS))
def test_merged_into_the_weights_it_is_the_trained_model(train, tiny_model, kind, init):
    transformer, layers = train(kind, init)
    fresh = FAMILY.load_transformer(tiny_model)
    for name, layer in layers.items():
        weight = fresh.get_parameter(f"{name}.weight")
        weight.data.copy_(weight.double() + layer.delta())
    assert_same(ours(fresh), ours(transformer))


@pytest.mark.parametrize(
    "strength", [pytest.param(0.5, marks=pytest.mark.slow), -0.75, pytest.param(2.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_file_at_any_strength_is_the_adapter_at_that_strength(train, tiny_model, tmp_path, kind, strength):
    """W + strength (W' - W), as ComfyUI's loaders have it, for DoRA too. They multiply an OFT by it twice."""
    transformer, layers = train(kind, "default")
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    set_strength_(transformer, strength)
    expected = ours(transformer)
    set_strength_(transformer, 1.0)
    fresh = FAMILY.load_transformer(tiny_model)
    merged = FAMILY.load_transformer(tiny_model)
    apply_lora_(fresh, tmp_path / "a.safetensors", strength)
    assert_same(ours(fresh), expected)
    for name, layer in layers.items():
        weight = merged.get_parameter(f"{name}.weight")
        weight.data.copy_(weight.double() + (strength**2 if kind == "oft" else strength) * layer.delta())
    assert_same(ours(merged), expected)


@pytest.mark.parametrize(
    ("kind", "init"), everyday([(kind, init) for kind, init in STARTS if kind not in ("lokr", "loha", "oft")])
)
def test_exact_in_diffusers(train, tiny_chroma, tmp_path, kind, init):
    """What ChromaPipeline.load_lora_weights does; DoRA by lora_magnitude_vector."""
    from diffusers import ChromaTransformer2DModel

    transformer, layers = train(kind, init)
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    base = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").eval()
    base.load_lora_adapter(load_file(tmp_path / "a.safetensors"), prefix="transformer")
    assert_same(theirs(base), ours(transformer))


@pytest.mark.parametrize(("kind", "init"), [("rslora", "pissa"), ("dora", "default")])
def test_exact_in_the_diffusers_pipeline(train, tiny_chroma, tmp_path, kind, init):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer, layers = train(kind, init)
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    base = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").eval()
    others: dict[str, Any] = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipeline = ChromaPipeline(transformer=base, **others)
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    assert_same(theirs(pipeline.transformer), ours(transformer))


@pytest.mark.parametrize(
    ("kind", "init", "rank"), [("rslora", "default", 4), ("lora", "olora", 8), ("dora", "default", 4)]
)
def test_exact_in_peft(train, tiny_chroma, tmp_path, kind, init, rank):
    """With alpha = r, for the scale is in B."""
    from diffusers import ChromaTransformer2DModel
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    transformer, layers = train(kind, init)
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    state = {
        f"base_model.model.{key.removeprefix('transformer.')}": tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
        if not key.endswith(".dora_scale")
    }
    base = ChromaTransformer2DModel.from_pretrained(tiny_chroma / "transformer").eval()
    wanted = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), use_dora=kind == "dora")
    model = get_peft_model(base, wanted)
    result = set_peft_model_state_dict(model, state)
    assert result.unexpected_keys == []
    assert_same(theirs(model), ours(transformer))


@pytest.mark.parametrize(("kind", "form"), [("lora", "comfyui"), ("dora", "kohya"), ("loha", "comfyui")])
def test_fused_files_hold_layers_that_did_not_learn_as_nothing(tiny_model, tmp_path, kind, form):
    transformer = FAMILY.load_transformer(tiny_model)
    some = [
        "transformer_blocks.1.attn.to_k",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.attn.to_q",
    ]
    train_(layers := started(transformer, some, kind, "default"))
    export_lora(layers, transformer, tmp_path / "a.safetensors", {}, form=form)
    fresh = FAMILY.load_transformer(tiny_model)
    applied = apply_lora_(fresh, tmp_path / "a.safetensors")
    assert len(applied) == 3 + 4  # to_q, to_k, to_v; and to_q, to_k, to_v, proj_mlp
    assert_same(ours(fresh), ours(transformer))


@pytest.mark.parametrize(
    ("form", "key", "rank"),
    [
        ("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", 12),
        ("comfyui", "diffusion_model.single_blocks.1.linear1.lora_A.weight", 16),
        ("kohya", "lora_unet_single_blocks_1_linear1.lora_down.weight", 16),
        ("kohya", "lora_unet_single_blocks_1_linear2.lora_down.weight", 4),
    ],
)
def test_ranks_of_fused_files(train, tmp_path, form, key, rank):
    transformer, layers = train("lora", "default")
    export_lora(layers, transformer, tmp_path / "a.safetensors", {}, form=form)
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors[key]) == rank
    alpha = key.rsplit(".", 2)[0] + ".alpha"
    assert (tensors[alpha].item() == rank) if form == "kohya" else alpha not in tensors


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_dora_for_comfyui_holds_only_what_comfyui_reads(train, tmp_path, form):
    """It names every other key in its log: "lora key not loaded"."""
    transformer, layers = train("dora", "default")
    export_lora(layers, transformer, tmp_path / "a.safetensors", {}, form=form)
    keys = load_file(tmp_path / "a.safetensors")
    assert any(key.endswith(".dora_scale") for key in keys) and not any("magnitude" in key for key in keys)
    export_lora(layers, transformer, tmp_path / "b.safetensors", {}, form="universal")
    assert any("magnitude" in key for key in load_file(tmp_path / "b.safetensors"))


def test_a_kronecker_product_has_no_fused_form(train, tmp_path):
    transformer, layers = train("lokr", "default")
    with pytest.raises(IncompatibleUpdate, match="Kronecker"):
        export_lora(layers, transformer, tmp_path / "a.safetensors", {}, form="comfyui")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [None, 0.0, 0.1])
def test_a_rotation_is_what_comfyui_makes_of_its_blocks(limit):
    """LyCORIS' formula, with its constraint: R = (I + Q)(I - Q)^-1, and out = sum over n of R[n, m] W[n]."""
    blocks, weight = torch.randn(3, 4, 4, generator=seeded(1)), torch.randn(12, 5, generator=seeded(2))
    parts = {"blocks": blocks} if limit is None else {"blocks": blocks, "alpha": torch.tensor(limit)}
    q = (blocks - blocks.transpose(1, 2)).double()
    q = q * limit / q.norm() if limit else q
    eye = torch.eye(4, dtype=torch.float64)
    rotation = (eye + q) @ (eye - q).inverse()
    wanted = torch.einsum("knm,kni->kmi", rotation, weight.double().view(3, 4, 5)).reshape(12, 5)
    update = present(OftUpdate.from_parts(parts))
    torch.testing.assert_close(weight + update.delta(weight), wanted)
    layer = update.layer(nn.Linear(5, 12).requires_grad_(False))
    x = torch.randn(2, 5, generator=seeded(3))
    layer.base.weight.data.copy_(weight)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted.float(), layer.base.bias), rtol=1e-4, atol=1e-4)


def test_a_rotation_changes_no_lengths():
    _, layer = one_layer("oft")
    train_({"0": layer}, 0.3)
    turned = layer.base.weight.double() + layer.delta()
    torch.testing.assert_close(turned.norm(dim=0), layer.base.weight.double().norm(dim=0))


@pytest.mark.parametrize(
    ("height", "rank", "size"), [(3072, 16, 16), (3072, 20, 16), (36, 5, 4), (64, 1, 2), (15, 2, 3)]
)
def test_sizes_of_blocks_divide_the_height(height, rank, size):
    assert block_size(height, rank) == size


def test_a_rotation_of_other_blocks_is_refused():
    _, layer = one_layer("oft")
    with pytest.raises(IncompatibleUpdate, match="blocks have 2 rows and the run's 4; set rank to 2"):
        layer.load_update_(OftUpdate(torch.zeros(18, 2, 2)), torch.empty)
    with pytest.raises(IncompatibleUpdate, match="not an OFT"):
        layer.load_update_(one_layer("lora")[1].update(), torch.empty)


def test_simpletuners_and_onetrainers_names_are_read(train, tiny_model, tmp_path):
    from safetensors.torch import save_file

    transformer, layers = train("lokr", "default")
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    for prefix in ("lycoris_", "lora_transformer_"):
        renamed = {}
        for key, tensor in load_file(tmp_path / "a.safetensors").items():
            module, _, end = key.removeprefix("transformer.").rpartition(".")
            renamed[f"{prefix}{module.replace('.', '_')}.{end}"] = tensor
        save_file(renamed, tmp_path / "b.safetensors")
        fresh = FAMILY.load_transformer(tiny_model)
        assert len(apply_lora_(fresh, tmp_path / "b.safetensors")) == len(layers)
        assert_same(ours(fresh), ours(transformer))


# --- the layers ---


def one_layer(kind: str, init: str = "default", dtype=torch.float32, bias: bool = True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36, bias=bias, dtype=dtype)).requires_grad_(False)
    return model, started(model, ["0"], kind, init)["0"]


@pytest.mark.parametrize(("kind", "init"), STARTS)
def test_a_new_adapter_changes_nothing_and_starts_the_same_each_time(kind, init):
    model, layer = one_layer(kind, init)
    _, again = one_layer(kind, init)
    x = torch.randn(5, 24, generator=seeded(2))
    torch.testing.assert_close(
        model(x), layer.base(x), rtol=0, atol=2e-6 if init == "orthogonal" or kind == "dora" else 0
    )
    for (name, one), (_, two) in zip(layer.trainable(), again.trainable(), strict=True):
        assert torch.equal(one, two), name
    assert kind == "oft" or any(p.any() for _, p in layer.trainable())  # no rotation is all zeros


@pytest.mark.parametrize(("kind", "init"), STARTS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_weight_plus_delta_in_fp64(kind, init, bias):
    model, layer = one_layer(kind, init, bias=bias)
    train_({"0": layer}, 0.3)
    delta = layer.delta()
    assert delta.dtype == torch.float64 and delta.abs().max() > 0.1
    layer.double()
    offset = 0 if layer.bias is None else layer.bias
    found = model(torch.eye(24, dtype=torch.float64)) - offset
    torch.testing.assert_close(found.t(), layer.weight + delta, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_strength_0_is_the_base_to_the_bit(kind):
    model, layer = one_layer(kind)
    train_({"0": layer})
    layer.strength = 0.0
    x = torch.randn(5, 24)
    assert torch.equal(model(x), layer.base(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_gradients_are_right(kind):
    _, layer = one_layer(kind)
    train_({"0": layer}, 0.5)
    layer.double()
    parameters = dict(layer.trainable())
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), atol=1e-6)


def test_doras_norm_takes_no_part_in_the_gradient():
    """Section 4.3 of the paper: as if |W + D| were a constant."""
    _, layer = one_layer("dora")
    train_({"0": layer}, 0.5)
    assert isinstance(layer, DoraLinear)
    x = torch.randn(3, 24)
    layer(x).square().sum().backward()
    found = [p.grad.clone() for _, p in layer.trainable() if p.grad is not None]
    layer.zero_grad()
    constant = layer.norms()
    weight = (layer.weight + layer.scale * layer.lora_B @ layer.lora_A) * (layer.magnitude / constant)[:, None]
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    for one, (_, parameter) in zip(found, layer.trainable(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-4)


def test_doras_norms_are_those_of_the_whole_weight():
    for level in names("quantization"):
        quantizer = load("quantization", level)()
        if quantizer.missing():
            continue
        torch.manual_seed(0)
        model = nn.ModuleDict({"0": nn.Linear(128, 64)})
        quantizer.quantize_(model, keep=())
        layer = started(model, ["0"], "dora", "default")["0"]
        train_({"0": layer}, 0.1)
        assert isinstance(layer, DoraLinear)
        whole = dense_weight(layer.base) + layer.scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(layer.norms(), whole.norm(dim=1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_masters_stay_fp32_beside_a_narrow_base(kind, dtype):
    model, layer = one_layer(kind, dtype=dtype)
    train_({"0": layer})
    x = torch.randn(4, 24, dtype=dtype)
    y = model(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in layer.trainable() if p.grad is not None)
    assert all(p.grad is not None for _, p in layer.trainable())


def test_small_changes_count_beside_large_factors_in_bf16():
    """pissa: A and A0 round to the same bf16; their difference, which is what is multiplied, does not."""
    _, layer = one_layer("lora", "pissa", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.get_parameter("lora_B").add_(1e-4)
    x = torch.randn(64, 24, generator=seeded(3), dtype=torch.bfloat16)
    layer.strength = 1e4  # the base's own rounding is not the matter here
    changed = (layer(x) - layer.base(x)).double()
    wanted = x.double() @ layer.delta().t() * 1e4
    assert (changed - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(("kind", "init"), STARTS)
def test_state_brings_back_every_bit(kind, init):
    model, layer = one_layer(kind, init)
    train_({"0": layer})
    x = torch.randn(5, 24)
    wanted, state = model(x), adapter_state({"0": layer})
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(24, 36)).requires_grad_(False)
    layers = inject_(
        other, ["0"], 4, 6.0, init, seeded(99), config_of(kind)
    )  # other draws: all must come from the state
    load_adapter_state_(layers, state)
    assert torch.equal(other(x), wanted)


# --- rules of single kinds and starts ---


def test_rslora_is_scaled_by_the_root_of_the_rank():
    _, layer = one_layer("rslora")
    assert layer.scale == 3.0


@pytest.mark.parametrize(
    ("dimension", "factor", "wanted"),
    [(3072, -1, (48, 64)), (3072, 16, (16, 192)), (12288, -1, (96, 128)), (3072, 100, (48, 64)), (3072, 7, (6, 512)), (7, -1, (1, 7)), (64, 32, (2, 32))],
)  # fmt: skip
def test_factors(dimension, factor, wanted):
    assert factors_of(dimension, factor) == wanted


@pytest.mark.parametrize(
    ("rank", "factor", "both", "thin"),
    [
        (4, 4, False, {"w2"}),
        (4, 12, True, {"w1", "w2"}),
        (2, -1, True, {"w2", "w1"}),
        (2, -1, False, {"w2"}),
        (100, -1, True, set()),
    ],
)
def test_lokr_is_whole_where_the_rank_is_large(rank, factor, both, thin):
    layer = LokrLinear(nn.Linear(24 * 6, 36 * 4), rank, 6.0, factor, both)
    assert {name[:2] for name, _ in layer.trainable() if name.endswith("_a")} == thin
    assert layer.scale == (6.0 / rank if thin else 1.0)


def test_kron_linear_is_the_product():
    w1, w2, x = torch.randn(3, 4), torch.randn(5, 6), torch.randn(2, 7, 24)
    torch.testing.assert_close(kron_linear(x, w1, w2), x @ torch.kron(w1, w2).t())


def test_a_fused_lokr_is_cut_between_its_blocks_only():
    from chroma_trainer.trainer_core.adapters.lokr import LokrUpdate

    update = LokrUpdate(w1=torch.randn(6, 2), w2=torch.randn(4, 3))
    weight = torch.zeros(24, 6)
    torch.testing.assert_close(update.rows(slice(8, 16)).delta(weight), update.delta(weight)[8:16])
    with pytest.raises(IncompatibleUpdate, match="blocks of 4 rows can't be split at rows 8 to 18"):
        update.rows(slice(8, 18))


@pytest.mark.parametrize("iterations", [0, 4])
def test_pissa_takes_the_largest_singular_values(iterations):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48)).requires_grad_(False)
    config = AdapterConfig(svd_iterations=iterations)
    layer = of_type(inject_(model, ["0"], 4, 6.0, "pissa", seeded(1), config)["0"], LoraLinear)
    u, s, vt = torch.linalg.svd(layer.weight)
    best = u[:, :4] * s[:4] @ vt[:4]
    start = layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(start, best, rtol=0, atol=1e-5 if iterations == 0 else 0.02)
    assert not layer.delta().any()  # nothing has been learnt yet


def one_lora(init: str) -> LoraLinear:
    return of_type(one_layer("lora", init)[1], LoraLinear)


def test_olora_is_orthonormal():
    layer = one_lora("olora")
    torch.testing.assert_close(layer.lora_B.t() @ layer.lora_B, torch.eye(4), rtol=0, atol=1e-5)
    model = nn.Sequential(nn.Linear(24, 36)).requires_grad_(False)
    whole = of_type(inject_(model, ["0"], 24, 24.0, "olora", seeded(1))["0"], LoraLinear)
    torch.testing.assert_close(whole.lora_B @ whole.lora_A, whole.weight, rtol=0, atol=1e-5)


def test_orthogonal_factors_are_not_zero_but_their_product_is():
    layer = one_lora("orthogonal")
    assert layer.lora_A.norm() > 0.1 and layer.lora_B.norm() > 0.1
    assert (layer.lora_B @ layer.lora_A).abs().max() < 1e-6


def test_directions_are_those_of_all_inputs_seen():
    scales = torch.tensor([9.0, 6.0, 4.0, *[0.3] * 13])
    basis = torch.linalg.qr(torch.randn(16, 16, generator=seeded(1))).Q
    x = torch.randn(400, 16, generator=seeded(2)) * scales @ basis
    seen = Directions(8)
    for part in x.split(50):
        seen.see(part)
    wanted = torch.linalg.svd(x).Vh[:3]
    found = seen.rows(3)
    assert (found @ wanted.t()).diagonal().abs().min() > 0.999
    torch.testing.assert_close(found @ found.t(), torch.eye(3), rtol=0, atol=1e-5)


def test_inputs_that_span_less_give_fewer_directions():
    seen = Directions(8)
    seen.see(torch.ones(5, 16))
    assert len(seen.rows(4)) == 1


@pytest.mark.parametrize("level", [level for level in names("quantization") if level != "none"])
def test_loftq_mends_the_base_and_its_file_is_for_the_clean_one(level):
    quantizer = load("quantization", level)()
    if quantizer.missing():
        pytest.skip(quantizer.missing())
    torch.manual_seed(0)
    clean = nn.ModuleDict({"0": nn.Linear(128, 64)}).requires_grad_(False)
    model = nn.ModuleDict({"0": nn.Linear(128, 64)}).requires_grad_(False)
    model.load_state_dict(clean.state_dict())
    quantizer.quantize_(model, keep=())
    layer = of_type(started(model, ["0"], "lora", "loftq", clean=clean)["0"], LoraLinear)
    weight, quantized = clean.get_parameter("0.weight"), dense_weight(layer.base).float()
    mended = quantized + layer.scale * layer.lora_B @ layer.lora_A
    assert (mended - weight).norm() < 0.98 * (quantized - weight).norm()
    assert not layer.delta().any()  # on the clean base there is nothing to mend
    a0, b0 = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    train_({"0": layer})
    wanted = layer.scale * (layer.lora_B @ layer.lora_A - b0 @ a0)
    torch.testing.assert_close(layer.delta().float(), wanted, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 128)
    acting = quantized + layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, acting, layer.bias), rtol=0.02, atol=0.02)
    layer.strength = 0.25  # of what the file holds: the base is corrected at any strength
    start = quantized + layer.scale * b0 @ a0
    acting = start + 0.25 * (acting - start)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, acting, layer.bias), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_starts_from_the_weight_are_right_on_quantised_bases(kind, init):
    quantizer = load("quantization", "int8-quanto")()
    torch.manual_seed(0)
    model = nn.ModuleDict({"0": nn.Linear(128, 64)}).requires_grad_(False)
    quantizer.quantize_(model, keep=())
    layer = started(model, ["0"], kind, init)["0"]
    x = torch.randn(5, 128, generator=seeded(2))
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-5)
    train_({"0": layer})
    bias = present(layer.bias).double()
    wanted = nn.functional.linear(x.double(), dense_weight(layer.base).double() + layer.delta(), bias)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_reading_says_what_it_is(train, tmp_path):
    transformer, layers = train("dora", "default")
    export_lora(layers, transformer, tmp_path / "a.safetensors", {})
    pair = of_type(read_lora(tmp_path / "a.safetensors")["x_embedder"], LoraPair)
    weight = layers["x_embedder"].weight.double()
    by_comfyui = type(pair)(pair.down, pair.up, ratio=pair.ratio)
    by_peft = type(pair)(pair.down, pair.up, magnitude=pair.magnitude)
    torch.testing.assert_close(by_comfyui.delta(weight), by_peft.delta(weight), rtol=1e-5, atol=1e-6)
