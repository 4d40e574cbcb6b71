"""Products of rounded numbers: against whole numbers, close to exact ones, in training and in files."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.model import LEVELS, QuantizationConfig
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant import low_precision_matmul as products
from chroma_trainer.trainer_core.quant.low_precision_matmul import (
    Fp8Product,
    Int8Product,
    RoundedProduct,
    choose_products_,
    products_problems,
)
from chroma_trainer.trainer_core.quant.native import Fp8Native
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.quant.quanto import Int8Quanto
from chroma_trainer.trainer_core.quant.rowwise import RowScaled
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

from tests.narrowing import of_type, present

CPU = torch.device("cpu")
FAMILY = ChromaFamily()
KINDS = {"int8": (Int8Quanto, torch.int8), "fp8": (Fp8Native, torch.float8_e4m3fn)}
# Relative error of a product of normal numbers: rounding to steps of 1/127 of a row's largest (its 3.5 sigma), or to 3 bits.
ERROR = {"int8": 0.015, "fp8": 0.05}


def layer(kind: str, out: int = 48, width: int = 64, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    torch.manual_seed(0)
    made = of_type(KINDS[kind][0]().layer(nn.Linear(width, out, dtype=dtype)), QuantizedLinear)
    assert choose_products_(nn.Sequential(made), kind) == ""
    return made


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, highest: int = 127) -> torch.Tensor:
    """Int8 as it is written: 64-bit whole numbers, one row after the other. weight: codes (n, m); scale: of its columns, (m,)."""
    rows = []
    for row in x.float():
        step = row.abs().max() / highest
        codes = (
            torch.tensor([round(v) for v in (row / step).tolist()])
            if step > 0
            else torch.zeros(len(row), dtype=torch.long)
        )
        rows.append((codes.long() @ weight.long()).float() * step * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 40), (17, 64, 24), (20, 1032, 16), (5, 2056, 8)])
def test_int8_is_what_whole_numbers_give(shape):
    rows, width, out = shape
    made = layer("int8", out, width)
    x = torch.randn(rows, width, requires_grad=True)
    y = made(x)
    codes, scale = made.stored["codes"], made.stored["scale"]
    torch.testing.assert_close(y - made.bias, reference(x.detach(), codes.t(), scale.flatten()), rtol=1e-6, atol=1e-7)
    grad = torch.randn(rows, out)
    ours = torch.autograd.grad(y, x, grad)[0]
    wanted = reference(grad * scale.flatten(), codes, torch.ones(width))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [1024, 1025, 3000])
def test_sums_in_parts_are_torchs_integer_sums(width):
    """The worst case too: every product as large as it can be."""
    for a, b in (
        (torch.full((3, width), 127, dtype=torch.int8), torch.full((width, 8), -128, dtype=torch.int8)),
        (torch.randint(-127, 128, (3, width)).to(torch.int8), torch.randint(-128, 128, (width, 8)).to(torch.int8)),
    ):
        assert torch.equal(Int8Product().multiply(a, b).to(torch.int32), torch._int_mm(a, b))


def test_fp8_is_torchs_scaled_product():
    a, b = torch.randn(9, 64).to(torch.float8_e4m3fn), torch.randn(64, 32).to(torch.float8_e4m3fn)
    one = torch.ones(())
    try:
        wanted = torch._scaled_mm(a, b.t().contiguous().t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch multiplies no float8 on a CPU: {error}")
    torch.testing.assert_close(Fp8Product().multiply(a, b), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_exact_product_and_gradient(kind, dtype):
    made = layer(kind, dtype=dtype)
    plain = copy.deepcopy(made)
    plain.product = None
    x = torch.randn(2, 30, 64).to(dtype).requires_grad_()
    grad = torch.randn(2, 30, 48).to(dtype)
    ours, exact = made(x), plain(x)
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert 0 < relative(ours, exact) < ERROR[kind]
    (ours,), (exact,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(exact, x, grad)
    assert ours.dtype == dtype and 0 < relative(ours, exact) < ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_products_slope(kind):
    """Along directions far longer than a step of rounding, y(x + d) - y(x - d) is what the gradient says of 2 d."""
    made = layer(kind)
    x, towards = torch.randn(40, 64, requires_grad=True), torch.randn(40, 48)
    (gradient,) = torch.autograd.grad((made(x) * towards).sum(), x)
    direction = gradient / gradient.square().mean().sqrt()
    rise = ((made(x + direction) - made(x - direction)) * towards).sum().item()
    assert rise == pytest.approx(2 * (gradient * direction).sum().item(), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_the_row_among_others(kind):
    """Trimmed texts and other pictures of the batch change nothing: outliers stay in their row."""
    made = layer(kind)
    x = torch.randn(3, 64)
    x[1] *= 1e4
    together = made(x)
    torch.testing.assert_close(together[[0]], made(x[[0]]))
    torch.testing.assert_close(together[[1]], made(x[[1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_rows_that_are_not_finite(kind):
    made = layer(kind)
    x = torch.randn(4, 64)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    y = made(x)
    assert torch.equal(y[0], made.bias) and y[3].isfinite().all()
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert made(torch.empty(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_codes_and_scales_waits_for_the_backward_pass(kind):
    made = layer(kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(torch.randn(7, 64, requires_grad=True))
    assert {t.data_ptr() for t in saved} == {made.stored[name].data_ptr() for name in ("codes", "scale")}


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_weight_acts_as_it_is(kind):
    made = layer(kind)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(made(x), nn.functional.linear(x, made.weight) + made.bias)
    assert not torch.equal(made(x), nn.functional.linear(x, made.weight) + made.bias)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_as_one_graph(kind):
    made = nn.Sequential(layer(kind, 64), layer(kind))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (40, 20, 33):
        x = torch.randn(rows, 64, requires_grad=True)
        ours, plain = compiled(x), made(x)
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_without_numbers(kind):
    """The memory plan counts on the meta device, with the accelerator's products."""
    made = layer(kind).to("meta")
    x = torch.empty(3, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = made(x)
    y.sum().backward()
    gradient = present(x.grad)
    assert y.shape == (3, 48) and y.dtype == gradient.dtype == torch.bfloat16 and gradient.shape == x.shape


def test_widths_that_no_kernel_takes_stay_exact_and_are_told():
    model = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 20), nn.Linear(20, 32))
    Int8Quanto().quantize_(model, keep=())
    told = choose_products_(model, "int8")
    assert "2 of 3 quantized layers" in told and "multiples of 8: 1, 2" in told
    assert [m.product is None for m in model] == [False, True, True]
    assert choose_products_(model, "exact") == ""


def test_modulation_of_whole_pictures_stays_exact():
    from chroma_trainer.trainer_core.models.flux.transformer import FluxTransformer

    with torch.device("meta"):
        flux = FluxTransformer(num_layers=1, num_single_layers=1)
    Int8Quanto().quantize_(flux, keep=load("family", "flux")().full_precision)
    choose_products_(flux, "int8")
    exact = {n for n, m in flux.named_modules() if isinstance(m, QuantizedLinear) and m.product is None}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in exact} == {"norm", "norm1", "norm1_context"}


@pytest.mark.parametrize("level", names("quantization"))
def test_a_level_that_is_let_through_stores_such_numbers(level):
    for kind in names("products"):
        config = QuantizationConfig(level, products=kind)
        if load("quantization", level)().missing():
            pytest.skip("its package is missing")
        if config.problems():
            assert not level.startswith(kind)
            continue
        quantizer = load("quantization", level)()
        stored = quantizer.encode(torch.randn(16, 32))
        assert isinstance(quantizer, RowScaled) and stored["codes"].dtype == KINDS[kind][1]
        assert stored["scale"].shape == (16, 1) and stored["scale"].dtype == torch.float32


@pytest.mark.parametrize("level", ["none", "int4-quanto", "nf4-bnb", "fp8-native"])
def test_a_level_without_such_numbers_is_refused_with_those_that_have_them(level):
    (problem,) = QuantizationConfig(level, products="int8").problems()
    assert problem.field == "products" and level in problem.message and "int8-quanto" in problem.message
    assert products_problems(QuantizationConfig(level, products="int8"), CPU) == [problem]
    assert not QuantizationConfig(level).problems() and level in LEVELS


def test_a_device_without_the_kernel_is_refused_by_name(monkeypatch):
    assert not [k for k in KINDS if products_problems(QuantizationConfig(f"{k}-quanto", products=k), CPU)]
    monkeypatch.setattr(Int8Product, "multiply", lambda self, a, b: (a.float() @ b.float()).flip(0))
    (problem,) = products_problems(QuantizationConfig("int8-quanto", products="int8"), CPU)
    assert problem.field == "products" and "wrong results on cpu" in problem.message and "use exact" in problem.message

    def no_kernel(self, a, b):
        raise NotImplementedError("'_int_mm' is not there for this device\nstack trace")

    monkeypatch.setattr(Int8Product, "multiply", no_kernel)
    (problem,) = products_problems(QuantizationConfig("int8-quanto", products="int8"), CPU)
    assert "int8 can't run on cpu: '_int_mm' is not there" in problem.message and "stack" not in problem.message


def test_an_older_gpu_is_told_which_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    monkeypatch.setattr(torch.version, "hip", None)
    (problem,) = products_problems(QuantizationConfig("fp8-native", products="fp8"), torch.device("cuda"))
    assert "8.9" in problem.message and "RTX 3090 has 8.6" in problem.message and "use exact" in problem.message


class Cublas(Int8Product):
    """The accelerator's branch with cuBLAS' conditions, on a CPU."""

    def multiply(self, a, b):
        calls = []

        def int_mm(left, right):
            assert left.is_contiguous() and right.stride(0) == 1 and len(left) > 16
            assert left.shape[1] % 8 == right.shape[1] % 8 == 0
            calls.append(left.shape)
            return (left.long() @ right.long()).int()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_int_mm", int_mm)
            patch.setattr(products, "CPU", "none")
            found = super().multiply(a, b)
        assert calls
        return found


@pytest.mark.parametrize("rows", [1, 16, 17, 50])
def test_short_prompts_are_padded_to_what_cublas_takes(rows):
    made = layer("int8")
    x = torch.randn(rows, 64, requires_grad=True)
    ours, (gradient,) = made(x), torch.autograd.grad(made(x).square().sum(), x)
    made.product = Cublas()
    assert torch.equal(made(x), ours)
    assert torch.equal(torch.autograd.grad(made(x).square().sum(), x)[0], gradient)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 8, 6, generator=generator)
    return x, torch.tensor([0.3, 0.8]), [torch.randn(length, 32, generator=generator) for length in (4, 7)]


def gradients(tiny_model, inputs, level: str, kind: str, checkpointing: bool = False) -> list[torch.Tensor]:
    transformer = load("quantization", level)().quantize_(FAMILY.load_transformer(tiny_model), FAMILY.full_precision)
    choose_products_(transformer, kind)
    generator = torch.Generator().manual_seed(1)
    layers = inject_(transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 4, generator=generator)
    for each in layers.values():
        up = each.get_parameter("lora_B")
        up.data.copy_(torch.randn(up.shape, generator=generator) * 0.05)
    if checkpointing:
        checkpoint_blocks_(FAMILY.blocks(transformer))
    loss = FAMILY.predict(transformer, *inputs).square().mean()
    return list(torch.autograd.grad(loss, [p for _, p in trainable_parameters(layers)]))


@pytest.mark.parametrize(("level", "kind", "error"), [("int8-quanto", "int8", 0.03), ("fp8-native", "fp8", 0.1)])
def test_the_loras_gradient_is_close_and_checkpointing_leaves_it(tiny_model, inputs, level, kind, error):
    exact, ours = gradients(tiny_model, inputs, level, "exact"), gradients(tiny_model, inputs, level, kind)
    assert 0 < relative(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in exact])) < error
    again = gradients(tiny_model, inputs, level, kind, checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("kind", names("adapter"))
def test_an_adapters_own_branch_stays_exact(kind):
    """What it adds to the base's output. DoRA scales that output and OFT rotates it, with the products' rounding."""
    made = layer("int8")
    adapter = load("adapter", kind).new(made, 4, 4.0, AdapterConfig(kind=kind))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter.trainable():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    x = torch.randn(6, 64, requires_grad=True)
    ours, file = adapter(x) - made(x), adapter.update().delta(made.weight)
    made.product = None
    exact = adapter(x) - made(x)
    assert relative(ours, exact) < (0.02 if kind in ("dora", "oft") else 1e-5)
    assert torch.equal(adapter.update().delta(made.weight), file)


def test_every_product_of_the_registry_holds_the_contract():
    for name in names("products"):
        product = load("products", name)()
        assert isinstance(product, RoundedProduct) and product.unfit(CPU) == ""
        codes, scale = product.round_rows(torch.randn(4, 32))
        assert codes.dtype == KINDS[name][1] and scale.shape == (4, 1) and scale.dtype == torch.float32


def test_exact_leaves_a_request_as_it_was_before_there_was_a_choice(tiny_model):
    from chroma_trainer.trainer_core.config.dataset import DatasetConfig
    from chroma_trainer.trainer_core.config.request import TrainRequest
    from chroma_trainer.trainer_core.config.training import TrainingConfig

    def stored(config: QuantizationConfig) -> dict:
        model = replace(tiny_model, quantization=config)
        return TrainRequest(model, DatasetConfig(parts=(), roots=()), TrainingConfig(name="x")).as_json()["model"][
            "quantization"
        ]

    assert "products" not in stored(QuantizationConfig("int8-quanto"))
    assert stored(QuantizationConfig("int8-quanto", products="int8"))["products"] == "int8"
