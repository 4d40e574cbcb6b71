"""Load weights from safetensors files of any common layout into a model on the meta device.

The model defines the parameters it needs, and a layout maps each one to the keys that may hold it. Missing and
unexpected keys are therefore known exactly. Tensors are memory-mapped, and copied only if their dtype must change. If
layers are converted while loading (quantized), tensors are read and freed one by one, so the full weights are never in
memory at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import UserError
from ...storage.gguf.blocks import DECODERS, PackedWeight, decode, unpack_
from ...storage.gguf.header import BLOCKS, is_gguf
from ...storage.model_header import ModelHeader, model_header_of
from ...storage.packed import decode_packed as scaled
from ...storage.packed import packed_header
from ...storage.packed.packed_header import MAX_DESCRIPTION, Packed, Unreadable, layers_in_metadata, packed_weights
from ..family import Convert
from .header_check import ANCHORS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Names of the scale of `X.weight` in ComfyUI's files: fp8_scaled files, and the newer files with `X.comfy_quant`.
SCALES = ("scale_weight", "weight_scale")
# Tensors that describe other tensors. Input scales only matter for fp8 matrix products.
DESCRIPTIONS = ("scaled_fp8", *SCALES, "scale_input", "input_scale", *packed_header.DESCRIPTIONS)
# safetensors dtype names that can be read without memory-mapping.
STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I8": torch.int8, "U8": torch.uint8, "F8_E8M0": torch.uint8,  # exponents; old versions of torch have no such dtype
}  # fmt: skip
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, described by the file's header.

    Attributes:
        file: The file.
        key: The tensor's key.
        shape: Its shape.
        dtype: Its safetensors dtype name, such as "BF16", or the type of its blocks in a GGUF file, such as "Q4_K".
        start: Offset of its first byte in the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class Kind:
    """Identifies a part of a model in a file.

    Args:
        name: Name for messages.
        anchors: Suffixes of keys, one of which this part always has. What precedes it is the part's prefix: it is
            removed from every key, and keys without it belong to other parts.
    """

    name: str
    anchors: tuple[str, ...]


T5 = Kind("T5 text encoder", ANCHORS["text_encoder"])
VAE = Kind("VAE", ANCHORS["vae"])


def read_header(file: Path) -> ModelHeader:
    """Read the header of a safetensors or GGUF file, and the offset of the first tensor.

    Raises:
        UserError: The file is missing, truncated or in another format.
    """
    try:
        return model_header_of(file)
    except OSError as error:
        raise UserError.at(file.name, f"can't be read: {error.strerror or error} ({file})") from error
    except ValueError as error:
        if is_gguf(file):
            raise UserError.at(file.name, f"{error} ({file})") from error
        raise UserError.at(file.name, f"is not a complete safetensors file: {error} ({file})") from error


class Weights:
    """The tensors of one part of a model, in one or more safetensors files.

    Args:
        files: The part's shards, or one single file, which may also hold other parts. Empty: only a config is known.
        kind: The part.
        mapped: Return memory-mapped tensors where their dtype does not change. False: read each tensor into its own
            memory, for tensors that are freed soon. Mapped pages stay in the process until the last tensor of the file
            is freed.
    Raises:
        UserError: A file is damaged, or no file holds this part.
    """

    def __init__(self, files: Sequence[Path], kind: Kind, mapped: bool = True):
        entries: list[Entry] = []
        self._layers: dict[str, Any] = {}  # descriptions of quantized layers in the files' metadata
        for file in files:
            header, start = read_header(file)
            self._layers |= layers_in_metadata(header)
            for key, entry in header.items():
                if key != "__metadata__":
                    offset = start + entry["data_offsets"][0]
                    entries.append(Entry(file, key, tuple(entry["shape"]), entry["dtype"], offset))
        self.kind, self.files, self.mapped = kind, tuple(files), mapped
        self.prefix = _find_prefix([entry.key for entry in entries], kind, files) if files else ""
        self.entries = {entry.key[len(self.prefix) :]: entry for entry in entries if entry.key.startswith(self.prefix)}
        self._open: dict[Path, Any] = {}

    @property
    def keys(self) -> list[str]:
        """Keys of the weights, without the prefix and without tensors that only describe others."""
        return [key for key in self.entries if key.rpartition(".")[2] not in DESCRIPTIONS]

    @cached_property
    def packed_entries(self) -> Mapping[str, Packed]:
        """How each weight is stored that ComfyUI or bitsandbytes quantized, by its key.

        Raises:
            UserError: One is stored in a form that can't be read.
        """
        tensors = {key: (entry.dtype, entry.shape) for key, entry in self.entries.items()}
        layers = {
            name[len(self.prefix) :]: value for name, value in self._layers.items() if name.startswith(self.prefix)
        }
        try:
            return packed_weights(tensors, lambda key: _read_start(self.entries[key]), layers)
        except Unreadable as error:
            raise UserError.at(self.files[0].name, f"is quantized as {error} ({self.files[0]})") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor, once it is decoded."""
        packed = self.packed_entries.get(key)
        return packed.shape if packed else self.entries[key].shape

    def count(self, prefix: str) -> int:
        """Return the number of blocks `prefix.0`, `prefix.1`, ..."""
        start = len(prefix) + 1
        return len({key[start:].split(".")[0] for key in self.entries if key.startswith(prefix + ".")})

    def read(self, key: str, rows: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        """Read rows of a tensor.

        Args:
            key: The tensor's key.
            rows: Its rows.
            dtype: Dtype of the result, if the tensor is floating-point; None for its stored dtype or, for fp8 with a
                scale, fp32. A tensor in another dtype is read into its own memory, which is freed after the conversion.
        """
        if key in self.packed_entries:
            packed = self.packed(key, rows)
            assert packed is not None
            return packed.decode(_sliced(self.shape(key), rows), dtype or torch.float32)
        tensor = self._decoded(key, rows, self.mapped and dtype in (None, STORED.get(self.entries[key].dtype)))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _decoded(self, key: str, rows: slice, mapped: bool) -> Tensor:
        scale = self._scale(key)
        tensor = self._raw(key, rows, mapped and scale is None)
        if scale is None:
            return tensor
        if tensor.dtype not in FP8:
            raise UserError.at(
                self.entries[key].file.name,
                f"{key} is stored as {self.entries[key].dtype} with a scale, which is not supported; "
                "use a bf16 or fp8 file",
            )
        if scale.numel() > 1:  # one scale per row
            scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))[rows]
        return tensor.float() * scale.float()

    def packed(self, key: str, rows: slice = slice(None)) -> PackedWeight | None:
        """Return rows of a weight as a GGUF or quantized file stores them; None if it is stored as it is."""
        entry = self.entries[key]
        if found := self.packed_entries.get(key):
            return _of_rows(found.type, scaled.stored_of(found, self._raw(key), self._raw), rows)
        return PackedWeight(entry.dtype, _read_packed(entry, rows)) if entry.dtype in DECODERS else None

    def _scale(self, key: str) -> Tensor | None:
        module, _, leaf = key.rpartition(".")
        if leaf != "weight":
            return None
        scales = [name for name in SCALES if f"{module}.{name}" in self.entries]
        return self._raw(f"{module}.{scales[0]}") if scales else None

    def _raw(self, key: str, rows: slice = slice(None), mapped: bool = False) -> Tensor:
        entry = self.entries[key]
        if entry.dtype in DECODERS:
            return decode(entry.dtype, _read_packed(entry, rows), torch.float32)
        if (not mapped or is_gguf(entry.file)) and entry.dtype in STORED:
            return _read(entry, rows)
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt", device="cpu").__enter__()
        tensor = self._open[entry.file].get_tensor(entry.key)
        return tensor[rows] if rows != slice(None) else tensor


def _of_rows(type: str, stored: Mapping[str, Tensor], rows: slice) -> PackedWeight:
    if rows != slice(None):  # copies, so that rows of a fused weight do not hold all of it
        stored = {name: part if name in scaled.WHOLE else part[rows].clone() for name, part in stored.items()}
    parts = dict(stored)
    return PackedWeight(type, parts.pop("codes"), parts)


def _sliced(shape: tuple[int, ...], rows: slice) -> tuple[int, int]:
    return len(range(*rows.indices(shape[0]))), shape[1]


def _read_start(entry: Entry) -> bytes:
    """Return the first bytes of a tensor that describes a layer."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        return stream.read(min(MAX_DESCRIPTION, _product(entry.shape) * STORED[entry.dtype].itemsize))


def _read(entry: Entry, rows: slice) -> Tensor:
    """Read rows of a tensor into its own memory."""
    return _read_rows(entry, entry.shape, STORED[entry.dtype], rows)


def _read_packed(entry: Entry, rows: slice) -> Tensor:
    """Read rows of a tensor of blocks, uint8, (rows, bytes of a row)."""
    return _read_rows(entry, _packed_shape(entry), torch.uint8, rows)


def _packed_shape(entry: Entry) -> tuple[int, int]:
    values, size = BLOCKS[entry.dtype]
    return _product(entry.shape[:-1]), entry.shape[-1] // values * size


def _read_rows(entry: Entry, shape: tuple[int, ...], tensor_dtype: torch.dtype, rows: slice) -> Tensor:
    start = entry.start
    if rows != slice(None):
        first, last, _ = rows.indices(shape[0])
        start += first * _product(shape[1:]) * tensor_dtype.itemsize
        shape = (last - first, *shape[1:])
    raw = torch.empty(_product(shape) * tensor_dtype.itemsize, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(start)
        view, num_read = memoryview(raw.numpy().data), 0
        while num_read < len(view):  # one call reads at most 2 GiB
            count = stream.readinto(view[num_read:])
            if not count:
                raise UserError.at(
                    entry.file.name, f"ends within {entry.key}; the file changed while it was read ({entry.file})"
                )
            num_read += count
    return raw.view(tensor_dtype).reshape(shape)


def _find_prefix(keys: Sequence[str], kind: Kind, files: Sequence[Path]) -> str:
    for anchor in kind.anchors:
        for key in keys:
            if key == anchor or key.endswith("." + anchor):
                return key[: len(key) - len(anchor)]
    examples = ", ".join(sorted(keys)[:NUM_EXAMPLES]) or "nothing"
    raise UserError.at(
        files[0].name, f"is not a {kind.name}: none of its keys is {' or '.join(kind.anchors)} (it has {examples}, ...)"
    )


# Maps a parameter name to the keys that may hold it, and its rows there. Extra axes of length 1 are dropped.
Layout = Callable[[str], tuple[Sequence[str], slice]]


def same_names(parameter: str) -> tuple[Sequence[str], slice]:
    """Layout of diffusers' and transformers' own files."""
    return (parameter,), slice(None)


def convert_(model: nn.Module, convert: Convert | None) -> None:
    """Convert each Linear like load_weights_ does, without weights (for the memory estimate)."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in linears if convert else ():
        assert convert
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], convert(name, linear))


def load_weights_(
    model: nn.Module,
    weights: Weights,
    dtype: Callable[[str], torch.dtype],
    layout: Layout = same_names,
    ignored: Callable[[str], bool] = lambda key: False,
    convert: Convert | None = None,
) -> None:
    """Load weights into a model on the meta device, module by module. Then freeze it and set eval mode.

    Args:
        model: The model.
        weights: The files.
        dtype: Maps a parameter name to its dtype.
        layout: Maps a parameter name to its keys.
        ignored: Returns whether the model does not need a key.
        convert: Called with each Linear as soon as it is loaded. The returned layer replaces it, and the full one is
            freed before the next is read. A layer that a file packs comes with its blocks alone, because a
            converter may keep them: unpack_ decodes its weight, which is on the meta device until then.
    Raises:
        UserError: Keys are missing, unexpected or have another shape. One message lists all of them.
    """
    sources = _match_keys(model, weights, layout, ignored)
    uses = Counter(sources.values())
    shared: dict[tuple[str, int | None, int | None], Tensor] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unloaded = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in sources]
    assert not unloaded, f"no file holds these buffers: {unloaded}"
    for module_name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(module_name)
        groups: Any = (module._parameters, module._buffers)
        for tensors in groups:
            for leaf in tensors:
                name = f"{module_name}.{leaf}" if module_name else leaf
                if name not in sources:
                    continue
                source = sources[name]
                is_converted = convert is not None and leaf == "weight" and type(module) is nn.Linear
                packed = weights.packed(source[0], slice(*source[1:])) if is_converted else None
                if packed:
                    mark_packed(module, packed)
                    tensor = torch.empty(shapes[name], dtype=dtype(name), device="meta")
                elif (tensor := shared.get(source)) is None:
                    tensor = weights.read(source[0], slice(*source[1:]), dtype(name)).reshape(shapes[name])
                    if uses[source] > 1:
                        shared[source] = tensor
                tensors[leaf] = nn.Parameter(tensor, requires_grad=False) if tensors is groups[0] else tensor
        if convert is not None and type(module) is nn.Linear:
            parent = model.get_submodule(module_name.rpartition(".")[0])
            layer = convert(module_name, module)
            setattr(parent, module_name.rpartition(".")[2], unpack_(module) if layer is module else layer)
    model.requires_grad_(False).eval()


def mark_packed(linear: nn.Module, packed: PackedWeight) -> None:
    """Note how the file stores a layer's weight, so that a converter can keep it so (quant/quantizer.py)."""
    linear.packed = packed  # type: ignore[assignment]


def mark_packed_(model: nn.Module, weights: Weights, layout: Layout = same_names) -> None:
    """Note on each Linear of a model on the meta device how the file stores its weight (for the memory estimate)."""
    for name, linear in [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]:
        keys, rows = layout(f"{name}.weight")
        entry = next((weights.entries[key] for key in keys if key in weights.entries), None)
        if entry and (found := weights.packed_entries.get(entry.key[len(weights.prefix) :])):
            mark_packed(linear, _of_rows(found.type, scaled.empty_stored(found), rows))
        elif entry and entry.dtype in DECODERS:
            codes = torch.empty(_packed_shape(entry), dtype=torch.uint8, device="meta")
            mark_packed(linear, PackedWeight(entry.dtype, codes[rows]))


def _match_keys(
    model: nn.Module, weights: Weights, layout: Layout, ignored: Callable[[str], bool]
) -> dict[str, tuple[str, int | None, int | None]]:
    """Return each parameter's key and rows in the files. Reads only headers.

    Raises:
        UserError: Keys are missing, unexpected or have another shape.
    """
    sources: dict[str, tuple[str, int | None, int | None]] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for name, tensor in model.state_dict().items():
        keys, rows = layout(name)
        key = next((key for key in keys if key in weights.entries), None)
        if key is None:
            missing.append(keys[0])
            continue
        shape = weights.shape(key)
        if rows != slice(None) and shape:
            shape = (len(range(*rows.indices(shape[0]))), *shape[1:])
        if _without_ones(shape) != _without_ones(tensor.shape):  # 1x1 convolutions are Linear layers here
            misshapen.append(f"{key} is {list(shape)} instead of {list(tensor.shape)}")
        sources[name] = key, rows.start, rows.stop
    used = {key for key, _, _ in sources.values()}
    unexpected = [key for key in weights.keys if key not in used and not ignored(key)]
    _check_keys(weights, missing, unexpected, misshapen)
    return sources


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def _check_keys(weights: Weights, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    problems = [
        f"{len(names)} {word} ({', '.join(sorted(names)[:NUM_EXAMPLES])}{', ...' if len(names) > NUM_EXAMPLES else ''})"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        file = weights.files[0]
        raise UserError.at(file.name, f"does not match a {weights.kind.name}; keys: {'; '.join(problems)} ({file})")


def _product(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
