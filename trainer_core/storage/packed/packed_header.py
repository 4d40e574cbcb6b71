"""Find the weights of a safetensors file that are stored in fewer bits, without torch.

ComfyUI's newer files describe each layer X as JSON, in a tensor `X.comfy_quant` or in the header's metadata. Files of
bitsandbytes (Forge's nf4) have one in `X.weight.quant_state.bitsandbytes__nf4`.

Sources: comfy/ops.py and comfy_kitchen of github.com/Comfy-Org; bitsandbytes/functional.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..gguf.header import is_gguf
from ..model_header import model_header_of

MAX_DESCRIPTION = 4096  # bytes of a layer's JSON
COMFY, METADATA = "comfy_quant", "_quantization_metadata"
BNB = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
# Last parts of keys that only describe weights.
DESCRIPTIONS = (
    COMFY, "weight_scale", "weight_scale_2", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
    *(name.rpartition(".")[2] for name in BNB),
)  # fmt: skip
PLAIN = ("float8_e4m3fn", "float8_e5m2")  # fp8 with one scale, or one for each row: read by models/loading/weights.py
TILE = 128, 4  # rows and columns of scales that mxfp8 and nvfp4 store together
ROTATIONS = tuple(4**power for power in range(1, 7))

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> dtype and shape


@dataclass(frozen=True)
class Packed:
    """How a weight is stored.

    Args:
        type: Name of its decoder in decode_packed.py.
        shape: Shape of the weight, (out, in).
        scales: Name of a scale in decode_packed.py -> key of its tensor.
        block: Values that share a scale, for bitsandbytes.
        nested: Scales that share a scale, where they are quantized too.
        offset: Of such scales.
    """

    type: str
    shape: tuple[int, int]
    scales: Mapping[str, str]
    block: int = 0
    nested: int = 0
    offset: float = 0.0


class Unreadable(ValueError):
    """A weight is stored in a form that can't be read. The text completes "is quantized as ..."."""


def is_packed(source: Path | str) -> bool:
    """Return whether a file stores weights in fewer bits, and says so in its header; GGUF files too.

    Of a folder the files of its transformer are looked at, and "" is no file.
    """
    path = Path(source) if source else None
    if path is None or not path.exists():
        return False
    if path.is_dir():
        files = [*path.glob("*.safetensors"), *path.glob("transformer/*.safetensors")]
        return any(is_packed(file) for file in files)
    if is_gguf(path):
        return True
    try:
        header, _ = model_header_of(path)
    except (OSError, ValueError):  # reported where the file is read
        return False
    return METADATA in _metadata(header) or any(key.endswith((COMFY, *BNB)) for key in header)


def layers_in_metadata(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the descriptions of layers in a header's metadata, by the layers' full names."""
    try:
        layers = json.loads(_metadata(header).get(METADATA, "{}")).get("layers", {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return layers if isinstance(layers, dict) else {}


def packed_weights(
    tensors: Tensors, read: Callable[[str], bytes], layers: Mapping[str, Any] | None = None
) -> dict[str, Packed]:
    """Return how each weight is stored that is not plain, by its key.

    Args:
        tensors: All tensors.
        read: Returns the first MAX_DESCRIPTION bytes of a tensor.
        layers: See layers_in_metadata.
    Raises:
        Unreadable: A weight is in an unknown form, or its scales don't fit.
    """
    found: dict[str, Packed] = {}
    for module, text in _descriptions(tensors, read, layers or {}):
        key = f"{module}.weight"
        if key in tensors and (packed := _packed_by_comfy(tensors, module, _parsed(text, module))):
            found[key] = packed
    for end in BNB:
        for key in tensors:
            if key.endswith(f".{end}"):
                weight = key[: -len(end) - 1]
                found[weight] = _packed_by_bnb(tensors, weight, _parsed(read(key), weight))
    return found


def _metadata(header: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _descriptions(
    tensors: Tensors, read: Callable[[str], bytes], layers: Mapping[str, Any]
) -> Iterable[tuple[str, bytes | Mapping[str, Any]]]:
    yield from layers.items()
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        if leaf == COMFY:
            yield module, read(key)


def _parsed(text: bytes | Mapping[str, Any], name: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, bytes) else text
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unreadable(f"a format whose description is damaged, in {name}")
    return value


def _packed_by_comfy(tensors: Tensors, module: str, description: Mapping[str, Any]) -> Packed | None:
    """Return how ComfyUI's description says that a layer is stored; None for plain fp8."""
    form = str(description.get("format", ""))[:40]
    if form in PLAIN:
        return None
    check = _Check(tensors, module, form)
    dtype, (rows, columns) = check.weight()
    if form == "int8_tensorwise":
        check.expect(dtype, "I8")
        rotation = _rotation(description) if _option(description, "convrot", False) else 0
        check.rotates(columns, rotation)
        check.counts("weight_scale", 1, rows)
        type = f"int8-rot{rotation}" if rotation else "int8"
        return Packed(type, (rows, columns), check.keys(scale="weight_scale"))
    if form == "convrot_w4a4":
        check.expect(dtype, "I8", "U8")
        rotation = _rotation(description)
        check.rotates(2 * columns, rotation)
        check.counts("weight_scale", 1, rows)
        return Packed(f"int4-rot{rotation}", (rows, 2 * columns), check.keys(scale="weight_scale"))
    if form == "mxfp8":
        check.expect(dtype, "F8_E4M3")
        check.counts("weight_scale", check.tiled(rows, columns, 32))
        return Packed("mxfp8", (rows, columns), check.keys(scale="weight_scale"))
    if form == "nvfp4" and f"{module}.pre_quant_scale" not in tensors:
        check.expect(dtype, "U8")
        check.counts("weight_scale", check.tiled(rows, 2 * columns, 16))
        check.counts("weight_scale_2", 1)
        return Packed("nvfp4", (rows, 2 * columns), check.keys(scale="weight_scale", whole="weight_scale_2"))
    what = "nvfp4 with scales of inputs (pre_quant_scale)" if form == "nvfp4" else f"{form!r}, an unknown format,"
    raise Unreadable(f"{what} in {module}")


class _Check:
    """Checks the tensors of a layer."""

    def __init__(self, tensors: Tensors, module: str, form: str):
        self.tensors, self.module, self.form = tensors, module, form

    def fail(self, text: str) -> Unreadable:
        return Unreadable(f"{self.form}, but {self.module}{text}")

    def weight(self) -> tuple[str, tuple[int, int]]:
        dtype, shape = self.tensors[f"{self.module}.weight"]
        if len(shape) != 2:
            raise self.fail(f".weight has {len(shape)} dimensions instead of 2")
        return dtype, (shape[0], shape[1])

    def expect(self, dtype: str, *dtypes: str) -> None:
        if dtype not in dtypes:
            raise self.fail(f".weight is stored as {dtype} instead of {dtypes[0]}")

    def counts(self, name: str, *counts: int) -> None:
        key = f"{self.module}.{name}"
        if key not in self.tensors:
            raise self.fail(f" has no {name}")
        count = math.prod(self.tensors[key][1])
        if count not in counts:
            raise self.fail(f".{name} has {count} values instead of {' or '.join(map(str, dict.fromkeys(counts)))}")

    def rotates(self, columns: int, size: int) -> None:
        if size and columns % size:
            raise self.fail(f".weight has {columns} columns, which groups of {size} do not divide")

    def tiled(self, rows: int, columns: int, block: int) -> int:
        if columns % block:
            raise self.fail(f".weight has {columns} columns, which blocks of {block} do not divide")
        return -(-rows // TILE[0]) * TILE[0] * (-(-(columns // block) // TILE[1]) * TILE[1])

    def keys(self, **names: str) -> dict[str, str]:
        return {name: f"{self.module}.{key}" for name, key in names.items()}


def _option(description: Mapping[str, Any], name: str, default: Any) -> Any:
    params = description.get("params")
    return description.get(name, params.get(name, default) if isinstance(params, dict) else default)


def _rotation(description: Mapping[str, Any]) -> int:
    size = _option(description, "convrot_groupsize", 256)
    if size not in ROTATIONS:
        raise Unreadable(f"a format with rotations of {str(size)[:20]} values, which is no power of 4")
    return size


def _packed_by_bnb(tensors: Tensors, weight: str, state: Mapping[str, Any]) -> Packed:
    """Return how bitsandbytes stores a weight.

    Raises:
        Unreadable: Its tensors don't fit.
    """
    form, shape, block = str(state.get("quant_type"))[:10], state.get("shape"), state.get("blocksize")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    if form not in ("nf4", "fp4") or not is_shape or not isinstance(block, int) or block < 1:
        raise Unreadable(f"a format of bitsandbytes whose description is damaged, in {weight}")
    assert isinstance(shape, list)
    rows, columns = shape
    keys = {"scale": f"{weight}.absmax", "table": f"{weight}.quant_map"}
    expected = {weight: -(-rows * columns // 2), keys["scale"]: -(-rows * columns // block), keys["table"]: 16}
    nested = state.get("nested_blocksize")
    if nested is not None:
        if not isinstance(nested, int) or nested < 1:
            raise Unreadable(f"a format of bitsandbytes whose description is damaged, in {weight}")
        keys |= {"outer": f"{weight}.nested_absmax", "outer_table": f"{weight}.nested_quant_map"}
        expected |= {keys["outer"]: -(-expected[keys["scale"]] // nested), keys["outer_table"]: 256}
    for key, count in expected.items():
        actual = math.prod(tensors[key][1]) if key in tensors else 0
        if actual != count:
            raise Unreadable(f"{form} of bitsandbytes, but {key} has {actual} values instead of {count}")
    if columns % block:
        raise Unreadable(f"{form} of bitsandbytes, but {weight} has {columns} columns in blocks of {block}")
    offset = state.get("nested_offset", 0.0)
    offset = float(offset) if isinstance(offset, (int, float)) else 0.0
    return Packed("4bit-table", (rows, columns), keys, block, nested or 0, offset)
