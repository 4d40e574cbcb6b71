"""Reading weights: safetensors files in any of the layouts in the wild, into a model built without memory of its own.

A model says which parameters it needs; a layout says under which keys a file may hold them. So what is missing or left
over is known exactly. Tensors are mapped from disk, and only what must change its precision is copied; where layers are converted on
the way (quantised), they are read one by one and freed again, so that the full weights never lie in memory together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import UserError
from ...storage.safetensors_header import header_of
from ..family import Convert

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Names under which ComfyUI keeps the scale of `X.weight`: fp8_scaled files, and the newer files with `X.comfy_quant`.
SCALES = ("scale_weight", "weight_scale")
# Tensors that describe others; a scale of inputs matters only to fp8 matrix products.
DESCRIPTIONS = ("scaled_fp8", *SCALES, "scale_input", "input_scale", "comfy_quant")
# safetensors' names of what is read without a map.
STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, from its header alone. dtype: safetensors' name, such as "BF16"; start: its first byte in the file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class Kind:
    """What a part of a model is recognised by.

    Args:
        name: in words, for messages.
        anchors: ends of keys, one of which this part always has. What stands before it is cut from every key, and keys
            without that prefix belong to other parts.
    """

    name: str
    anchors: tuple[str, ...]


T5 = Kind("T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",))
VAE = Kind("VAE", ("decoder.conv_in.weight",))


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the byte at which the tensors begin.

    Raises:
        UserError: the file is missing, cut short or not safetensors.
    """
    try:
        header, start = header_of(file)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        wanted = start + max(ends, default=0)
        if file.stat().st_size != wanted:
            raise ValueError(f"it has {file.stat().st_size} bytes and its header wants {wanted}; download it again")
    except OSError as error:
        raise UserError.at(file.name, f"can't be read: {error.strerror or error} ({file})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.at(file.name, f"is not a whole safetensors file: {error} ({file})") from error
    return header, start


class Weights:
    """The tensors of one part of a model over one or more safetensors files.

    Args:
        files: the part's shards, or one single file; a file that holds several parts is fine. None: nothing is known but a config.
        kind: what the part is.
        mapped: tensors are views of the mapped files. False: each is read into memory of its own, for what is freed soon: pages of
            a map stay with the process until the last tensor of that file is gone.
    Raises:
        UserError: a file is damaged, or none of them holds such a part.
    """

    def __init__(self, files: Sequence[Path], kind: Kind, mapped: bool = True):
        entries: list[Entry] = []
        for file in files:
            header, start = read_header(file)
            for key, entry in header.items():
                if key != "__metadata__":
                    place = start + entry["data_offsets"][0]
                    entries.append(Entry(file, key, tuple(entry["shape"]), entry["dtype"], place))
        self.kind, self.files, self.mapped = kind, tuple(files), mapped
        self.prefix = _prefix([entry.key for entry in entries], kind, files) if files else ""
        self.entries = {entry.key[len(self.prefix) :]: entry for entry in entries if entry.key.startswith(self.prefix)}
        self._open: dict[Path, Any] = {}

    @property
    def keys(self) -> list[str]:
        """Keys of weights, without the prefix and without the tensors that only describe others."""
        return [key for key in self.entries if key.rpartition(".")[2] not in DESCRIPTIONS]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape

    def count(self, prefix: str) -> int:
        """Number of blocks `prefix.0`, `prefix.1`, ..."""
        start = len(prefix) + 1
        return len({key[start:].split(".")[0] for key in self.entries if key.startswith(prefix + ".")})

    def read(self, key: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor: as stored, or as fp32 where it is stored in fp8 with a scale."""
        tensor = self._raw(key, rows)
        scale = self._scale(key)
        if scale is None:
            return tensor
        if tensor.dtype not in FP8:
            raise UserError.at(
                self.entries[key].file.name,
                f"{key} is stored as {self.entries[key].dtype} with a scale, which can't be read; "
                "use a bf16 or fp8 file",
            )
        if scale.numel() > 1:  # one scale a row
            scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))[rows]
        return tensor.float() * scale.float()

    def _scale(self, key: str) -> Tensor | None:
        module, _, leaf = key.rpartition(".")
        if leaf != "weight":
            return None
        found = [name for name in SCALES if f"{module}.{name}" in self.entries]
        return self._raw(f"{module}.{found[0]}") if found else None

    def _raw(self, key: str, rows: slice = slice(None)) -> Tensor:
        entry = self.entries[key]
        if not self.mapped and entry.dtype in STORED:
            return _read(entry, rows)
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt", device="cpu").__enter__()
        tensor = self._open[entry.file].get_tensor(entry.key)
        return tensor[rows] if rows != slice(None) else tensor


def _read(entry: Entry, rows: slice) -> Tensor:
    """Rows of a tensor, in memory of its own."""
    shape, start = entry.shape, entry.start
    tensor_dtype = STORED[entry.dtype]
    if rows != slice(None):
        first, last, _ = rows.indices(shape[0])
        start += first * _product(shape[1:]) * tensor_dtype.itemsize
        shape = (last - first, *shape[1:])
    raw = torch.empty(_product(shape) * tensor_dtype.itemsize, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(start)
        view, done = memoryview(raw.numpy().data), 0
        while done < len(view):  # one call reads 2 GiB at most
            count = stream.readinto(view[done:])
            if not count:
                raise UserError.at(
                    entry.file.name, f"ends within {entry.key}; it was changed while it was read ({entry.file})"
                )
            done += count
    return raw.view(tensor_dtype).reshape(shape)


def _prefix(keys: Sequence[str], kind: Kind, files: Sequence[Path]) -> str:
    for anchor in kind.anchors:
        for key in keys:
            if key == anchor or key.endswith("." + anchor):
                return key[: len(key) - len(anchor)]
    shown = ", ".join(sorted(keys)[:NUM_EXAMPLES]) or "nothing"
    raise UserError.at(
        files[0].name, f"is no {kind.name}: none of its keys is {' or '.join(kind.anchors)} (it has {shown}, ...)"
    )


# A parameter's name -> keys that may hold it, and the rows of it. Extra axes of length 1 are dropped.
Layout = Callable[[str], tuple[Sequence[str], slice]]


def same_names(parameter: str) -> tuple[Sequence[str], slice]:
    """The layout of diffusers' and transformers' own files."""
    return (parameter,), slice(None)


def convert_(model: nn.Module, convert: Convert | None) -> None:
    """What load_weights_ does to each Linear, without weights: for counting."""
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
    """Fill a model that was built on the meta device, module by module. Afterwards it is frozen and in eval mode.

    Args:
        dtype: parameter name -> precision.
        ignored: keys that the model has no use for.
        convert: called with each Linear as soon as it is filled; the layer it returns takes its place, and the full one is freed
            before the next is read.
    Raises:
        UserError: keys are missing, left over or of another shape; all of them, in one message.
    """
    places = _places(model, weights, layout, ignored)
    uses = Counter(places.values())
    shared: dict[tuple[str, int | None, int | None], Tensor] = {}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for module_name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(module_name)
        groups: Any = (module._parameters, module._buffers)
        for tensors in groups:
            for leaf in tensors:
                name = f"{module_name}.{leaf}" if module_name else leaf
                if name not in places:
                    continue
                place = places[name]
                if (tensor := shared.get(place)) is None:
                    tensor = weights.read(place[0], slice(*place[1:])).reshape(wanted[name])
                    tensor = tensor.to(dtype(name)) if tensor.is_floating_point() else tensor
                    if uses[place] > 1:
                        shared[place] = tensor
                tensors[leaf] = nn.Parameter(tensor, requires_grad=False) if tensors is groups[0] else tensor
        if convert is not None and type(module) is nn.Linear:
            parent = model.get_submodule(module_name.rpartition(".")[0])
            setattr(parent, module_name.rpartition(".")[2], convert(module_name, module))
    model.requires_grad_(False).eval()
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not lost, f"still on the meta device: {lost}"


def _places(
    model: nn.Module, weights: Weights, layout: Layout, ignored: Callable[[str], bool]
) -> dict[str, tuple[str, int | None, int | None]]:
    """Parameter -> its key and rows in the files, from headers alone.

    Raises:
        UserError: keys are missing, left over or of another shape.
    """
    found: dict[str, tuple[str, int | None, int | None]] = {}
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
        if _without_ones(shape) != _without_ones(tensor.shape):  # convolutions of one pixel are Linears here
            misshapen.append(f"{key} is {list(shape)} instead of {list(tensor.shape)}")
        found[name] = key, rows.start, rows.stop
    used = {key for key, _, _ in found.values()}
    left_over = [key for key in weights.keys if key not in used and not ignored(key)]
    _complain(weights, missing, left_over, misshapen)
    return found


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def _complain(weights: Weights, missing: list[str], left_over: list[str], misshapen: list[str]) -> None:
    faults = [
        f"{len(names)} {word} ({', '.join(sorted(names)[:NUM_EXAMPLES])}{', ...' if len(names) > NUM_EXAMPLES else ''})"
        for word, names in (("missing", missing), ("not known", left_over), ("of another shape", misshapen))
        if names
    ]
    if faults:
        file = weights.files[0]
        raise UserError.at(file.name, f"does not fit a {weights.kind.name}; keys: {'; '.join(faults)} ({file})")


def _product(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
