"""Reading weights: safetensors files in any of the layouts in the wild, into a model built without memory of its own.

A model says which parameters it needs; a layout says under which keys a file may hold them. So what is missing or left
over is known exactly. Tensors are mapped from disk, and only what must change its precision is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..problems import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Names under which ComfyUI keeps the scale of `X.weight`: fp8_scaled files, and the newer files with `X.comfy_quant`.
SCALES = ("scale_weight", "weight_scale")
# Tensors that describe others; a scale of inputs matters only to fp8 matrix products.
DESCRIPTIONS = ("scaled_fp8", *SCALES, "scale_input", "input_scale", "comfy_quant")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, from its header alone. dtype: safetensors' name, such as "BF16"."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


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


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        UserError: the file is missing, cut short or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8).ljust(8, b"\0"), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise ValueError(f"its first 8 bytes say a header of {size} bytes; only .safetensors files are read")
            header = _parse(stream.read(size))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        wanted = 8 + size + max(ends, default=0)
        if file.stat().st_size != wanted:
            raise ValueError(f"it has {file.stat().st_size} bytes and its header wants {wanted}; download it again")
    except OSError as error:
        raise UserError.at(file.name, f"can't be read: {error.strerror or error} ({file})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.at(file.name, f"is not a whole safetensors file: {error} ({file})") from error
    return header


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError("its header is not JSON; it is damaged or of another format") from error


class Weights:
    """The tensors of one part of a model over one or more safetensors files.

    Args:
        files: the part's shards, or one single file; a file that holds several parts is fine.
        kind: what the part is.
    Raises:
        UserError: a file is damaged, or none of them holds such a part.
    """

    def __init__(self, files: Sequence[Path], kind: Kind):
        entries = [
            Entry(file, key, tuple(entry["shape"]), entry["dtype"])
            for file in files
            for key, entry in read_header(file).items()
            if key != "__metadata__"
        ]
        self.kind, self.files = kind, tuple(files)
        self.prefix = _prefix([entry.key for entry in entries], kind, files)
        self.entries = {
            entry.key[len(self.prefix) :]: entry for entry in entries if entry.key.startswith(self.prefix)
        }
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
        tensor = self._raw(key)
        scale = self._scale(key)
        if scale is None:
            return tensor[rows] if rows != slice(None) else tensor
        if tensor.dtype not in FP8:
            raise UserError.at(
                self.entries[key].file.name,
                f"{key} is stored as {self.entries[key].dtype} with a scale, which can't be read; "
                "use a bf16 or fp8 file",
            )
        if scale.numel() > 1:  # one scale a row
            scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))[rows]
        return tensor[rows].float() * scale.float()

    def _scale(self, key: str) -> Tensor | None:
        module, _, leaf = key.rpartition(".")
        if leaf != "weight":
            return None
        found = [name for name in SCALES if f"{module}.{name}" in self.entries]
        return self._raw(f"{module}.{found[0]}") if found else None

    def _raw(self, key: str) -> Tensor:
        entry = self.entries[key]
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt", device="cpu").__enter__()
        return self._open[entry.file].get_tensor(entry.key)


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


def load_weights_(
    model: nn.Module,
    weights: Weights,
    dtype: Callable[[str], torch.dtype],
    layout: Layout = same_names,
    ignored: Callable[[str], bool] = lambda key: False,
) -> None:
    """Fill a model that was built on the meta device. Afterwards it is frozen and in eval mode.

    Args:
        dtype: parameter name -> precision.
        ignored: keys that the model has no use for.
    Raises:
        UserError: keys are missing, left over or of another shape; all of them, in one message.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = {name: layout(name) for name in wanted}
    found = {name: next((key for key in keys if key in weights.entries), None) for name, (keys, _) in places.items()}
    used = {key for key in found.values() if key is not None}
    missing = [places[name][0][0] for name, key in found.items() if key is None]
    left_over = [key for key in weights.keys if key not in used and not ignored(key)]
    state: dict[str, Tensor] = {}
    misshapen: list[str] = []
    for name, key in found.items():
        if key is None:
            continue
        tensor = weights.read(key, places[name][1])
        if tuple(tensor.shape) != wanted[name] and tensor.numel() == _product(wanted[name]):
            tensor = tensor.reshape(wanted[name])  # 1x1 convolutions that are Linears here
        if tuple(tensor.shape) != wanted[name]:
            misshapen.append(f"{key} is {list(tensor.shape)} instead of {list(wanted[name])}")
            continue
        state[name] = tensor.to(dtype(name)) if tensor.is_floating_point() else tensor
    _complain(weights, missing, left_over, misshapen)
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not lost, f"still on the meta device: {lost}"


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
