"""optimum-quanto's formats: equal to the package's to the last bit, how far off, how small."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.quant.quanto import Fp8Quanto, Int2Quanto, Int4Quanto, Int8Quanto, group_size
from torch import nn

from tests.narrowing import of_type, present

QTYPES = {Int8Quanto: "qint8", Fp8Quanto: "qfloat8_e4m3fn", Int4Quanto: "qint4", Int2Quanto: "qint2"}
WIDTHS = (64, 128, 160, 192, 384, 1000)


def linear(out: int, width: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(width, out, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 2, out)[:, None])  # rows of very different size
    return layer


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return optimum.quanto without its C++ extension, which takes a minute to compile, in some installations every time."""
    from optimum import quanto
    from optimum.quanto.library.extensions.extension import Extension

    monkeypatch.setattr(Extension, "lib", SimpleNamespace(unpack=unpack))
    return quanto


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("quantizer", QTYPES)
def test_every_weight_is_the_packages_own(package, quantizer, width):
    layer = linear(48, width)
    theirs = present(package.nn.QLinear.from_module(linear(48, width), weights=getattr(package, QTYPES[quantizer])))
    theirs.freeze()
    ours, weight = quantizer().layer(layer), theirs.weight
    if quantizer in (Int4Quanto, Int2Quanto):
        assert torch.equal(ours.packed, weight._data._data) and torch.equal(ours.scale, weight._scale)
        assert torch.equal(ours.offset, -weight._shift)
    else:
        assert torch.equal(ours.codes.view(torch.int8), weight._data.view(torch.int8))
    spread = layer.weight.detach().abs().amax(dim=1, keepdim=True)
    assert ((ours.weight - weight.dequantize()).abs() <= 1e-6 * spread).all()  # they round the product before the sum


@pytest.mark.parametrize("quantizer", QTYPES)
def test_encoding_and_decoding_need_no_compiler(quantizer, monkeypatch):
    """The package's unpack compiles an extension into its own folder, and waits forever for a build that was killed."""
    from optimum.quanto.library.extensions.extension import Extension

    def refuse(self):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Extension, "lib", property(refuse))
    layer = linear(47, 160)  # 47 rows do not fill the last byte
    assert (quantizer().layer(layer).weight - layer.weight).norm() < 0.5 * layer.weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", [Int8Quanto, Fp8Quanto])
def test_codes_and_scales_of_rows_are_rounded_once(quantizer, dtype):
    """In fp32, from the weight in its own precision. The package alone rounds the scales of a bf16 weight to bf16."""
    layer = linear(48, 384, dtype)
    weight = layer.weight.detach().float()
    largest = {Int8Quanto: 127, Fp8Quanto: 448}[quantizer]
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    codes = weight / scale
    codes = codes.round().to(torch.int8) if quantizer is Int8Quanto else codes.to(torch.float8_e4m3fn)
    stored = of_type(quantizer().layer(layer), QuantizedLinear).stored
    assert torch.equal(stored["scale"], scale)
    assert torch.equal(stored["codes"].view(torch.int8), codes.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", [Int4Quanto, Int2Quanto])
def test_codes_of_groups_fit_the_rounded_scales(quantizer, dtype):
    layer = linear(48, 384, dtype)
    groups = layer.weight.detach().float().reshape(-1, 128)
    low, high = groups.aminmax(dim=1, keepdim=True)
    highest = 2**quantizer.bits - 1
    scale = ((high - low) / highest).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    offset = low.to(dtype)
    codes = ((groups - offset.float()) / scale.float()).round().clamp(0, highest).to(torch.uint8)
    stored = of_type(quantizer().layer(layer), QuantizedLinear).stored
    assert torch.equal(stored["scale"], scale) and torch.equal(stored["offset"], offset)
    assert torch.equal(unpack(stored["packed"], quantizer.bits)[: len(codes)], codes)


@pytest.mark.parametrize("rows", [1, 7, 48])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("quantizer", QTYPES)
def test_the_meta_device_gives_the_same_shapes(quantizer, width, rows):
    weight = linear(rows, width, torch.bfloat16).weight.detach()
    described = [
        {name: (t.shape, t.dtype) for name, t in quantizer().encode(weight.to(device)).items()}
        for device in ("cpu", "meta")
    ]
    assert described[0] == described[1]


@pytest.mark.slow
def test_only_encoding_imports_the_package():
    """A start with a cached base checks the level, and counts and loads its layers."""
    code = (
        "import sys, torch; from torch import nn; from chroma_trainer.trainer_core.registry import load\n"
        "for level in ('int8-quanto', 'int4-quanto', 'int2-quanto', 'fp8-quanto'):\n"
        "    quantizer = load('quantization', level)()\n"
        "    assert not quantizer.missing() and not quantizer.unfit(torch.device('cpu'))\n"
        "    quantizer.layer(nn.Linear(64, 64, device='meta'))\n"
        "print([name for name in ('optimum', 'transformers', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("quantizer", QTYPES)
def test_a_device_that_decodes_wrongly_is_refused(quantizer, monkeypatch):
    class Wrong(quantizer):
        calls = 0

        def decode(self, *args):
            self.calls += 1
            return super().decode(*args) * (-1 if self.calls > 1 else 1)

    assert "wrong results on cpu" in Wrong().unfit(torch.device("cpu"))


def test_a_package_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(UserError, match=r"quantization: optimum-quanto can't be imported: .*; install it, or choose"):
        Int8Quanto().layer(linear(4, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_step_at_most(dtype):
    layer = linear(128, 128, dtype)
    weight = layer.weight.detach().float()
    quantised = of_type(Int8Quanto().layer(layer), QuantizedLinear)
    stored = quantised.stored
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((stored["codes"] * stored["scale"] - weight).abs() <= 0.501 * step).all()
    rounding = 2**-8 * weight.abs() if dtype == torch.bfloat16 else 0  # of what is decoded
    assert ((quantised.weight.float() - weight).abs() <= 0.501 * step + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [Int4Quanto, Int2Quanto])
def test_groups_are_off_by_half_a_step_at_most(quantizer, dtype):
    layer = linear(48, 384, dtype)
    weight = layer.weight.detach().float().reshape(-1, 128)
    quantised = quantizer().layer(layer).weight.float().reshape(-1, 128)
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**quantizer.bits - 1)
    slack = 0.501 if dtype == torch.float32 else 0.56  # scale and offset are rounded to bf16
    assert ((quantised - weight).abs() <= slack * step).all()


@pytest.mark.parametrize(
    ("quantizer", "share"), [(Int8Quanto, 1.01), (Int4Quanto, 0.5 + 4 / 128), (Int2Quanto, 0.25 + 4 / 128)]
)
def test_bytes_a_weight(quantizer, share):
    layer = quantizer().layer(linear(512, 512, torch.bfloat16))
    assert sum(t.numel() * t.element_size() for t in layer.stored.values()) <= share * 512 * 512


def test_groups():
    assert [group_size(width) for width in WIDTHS] == [64, 128, 32, 96, 128, 1000]


@pytest.mark.parametrize("quantizer", QTYPES)
def test_rows_of_zeros_and_of_equal_weights(quantizer):
    layer = linear(4, 256)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2] = 0.25
    weight = quantizer().layer(layer).weight
    assert weight.isfinite().all() and not weight[1].any()
    torch.testing.assert_close(weight[2], torch.full((256,), 0.25))
