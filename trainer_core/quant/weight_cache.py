"""Cache a quantized base model on disk, so that the next start neither reads nor quantizes the full weights.

    <cache>/quantized/<key>/<sha256 of the shard>.safetensors   every tensor of the model, by its name in the state dict
    <cache>/quantized/<key>/index.json                          which layers are quantized; written last

The key is a digest of everything that determines the bits. A folder without a valid index, or with a shard that does
not match its checksum, is recreated. If there are too many cached models, the least recently used ones are deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.atomic import sha256_text, write_json
from ..storage.tensor_store import Store
from .quantized_linear import QuantizedLinear
from .quantizer import Quantizer

FORMAT = "1"
INDEX = "index.json"
SHARD_BYTES = 256 << 20
ABANDONED_SECONDS = 24 * 3600  # age at which a folder without an index is abandoned: its writer was killed


def base_key(identity: str, level: str, quantizer: Quantizer, dtype: str, keep: tuple[str, ...], encoder: str) -> str:
    """Return the digest of everything that determines the stored bits.

    Args:
        identity: Identity of the full weights, Family.identity(model, "transformer").
        level: The quantization level.
        quantizer: The quantizer of this level.
        dtype: Precision of the model.
        keep: Patterns of modules that are not quantized.
        encoder: Type of the device that encodes the weights, because the last bit of a scale may differ.
    """
    return sha256_text("quantised base", FORMAT, identity, level, quantizer.version, dtype, json.dumps(keep), encoder)


@dataclass(frozen=True)
class CachedBase:
    """The cache folder of one base model.

    Attributes:
        folder: The folder.
        quantizer: The quantizer of its level.
        log: Called with a line of text if the folder is damaged or can't be written.
    """

    folder: Path
    quantizer: Quantizer
    log: Callable[[str], None]

    @property
    def is_there(self) -> bool:
        """Whether the folder contains a model, sound or not."""
        return (self.folder / INDEX).is_file()

    def fill_(self, empty: nn.Module) -> bool:
        """Put the quantized layers and the other weights, memory-mapped, into an empty transformer.

        Returns:
            Whether the folder contains a valid model.
        """
        if not self.is_there:
            return False
        store = Store(self.folder)
        index = _read_index(self.folder / INDEX)
        if index is None or store.missing(index["tensors"]) or not _fits(empty, index):
            store.close()
            self.log(
                f"the quantized base model in {self.folder} is damaged; it is quantized again from the full weights"
            )
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        tensors = {name: store.get(name) for name in index["tensors"]}
        for name, about in index["layers"].items():
            stored = {part: tensors.pop(f"{name}.{part}") for part in about["stored"]}
            bias = tensors.pop(f"{name}.bias", None)
            shape = about["shape"][0], about["shape"][1]
            layer = QuantizedLinear(self.quantizer, stored, shape, getattr(torch, about["dtype"]), bias)
            setattr(empty.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
        for name, tensor in tensors.items():
            module, leaf = empty.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor
        empty.requires_grad_(False).eval()
        os.utime(self.folder / INDEX)
        return True

    def writer(self) -> BaseWriter:
        return BaseWriter(self)


class BaseWriter:
    """Writes a base model to the cache while it is quantized, one shard at a time.

    If the disk is full, the run continues without the cache.
    """

    def __init__(self, cached: CachedBase):
        self._folder, self._log = cached.folder, cached.log
        self._store: Store | None = Store(cached.folder)
        self._waiting: dict[str, Tensor] = {}
        self._names: list[str] = []

    def add(self, name: str, module: nn.Module) -> None:
        """Add a layer that was just quantized."""
        self._put({f"{name}.{leaf}": tensor for leaf, tensor in module.state_dict().items()})

    def finish(self, base: nn.Module) -> None:
        """Write all tensors that were not added, and the index."""
        written = set(self._names)
        for name, tensor in base.state_dict().items():
            if name not in written:
                self._put({name: tensor})
        layers = {
            name: {
                "shape": [module.out_features, module.in_features],
                "dtype": str(module.dtype).removeprefix("torch."),
                "stored": list(module.stored_names),
            }
            for name, module in base.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        self._flush()
        if self._store is not None:
            body = {"tensors": self._names, "layers": layers}
            self._attempt(lambda: write_json(self._folder / INDEX, {**body, "sha256": _digest(body)}))

    def _put(self, tensors: dict[str, Tensor]) -> None:
        if self._store is None:
            return
        self._names += tensors
        self._waiting.update(tensors)
        if sum(tensor.numel() * tensor.element_size() for tensor in self._waiting.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        store, waiting = self._store, self._waiting
        self._waiting = {}
        if store is not None:
            self._attempt(lambda: store.put(waiting))

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._store = None
            self._log(
                f"the quantized base model can't be cached in {self._folder}: {error.strerror or error}; the run "
                "continues, and the next one quantizes it again"
            )
            shutil.rmtree(self._folder, ignore_errors=True)


def forget_old(root: Path, keep: int) -> None:
    """Delete all but the `keep` most recently used models, and folders that were never finished."""
    if not root.is_dir():
        return
    finished = []
    for folder in root.iterdir():
        index = folder / INDEX
        if index.is_file():
            finished.append((index.stat().st_mtime, folder))
        elif folder.is_dir() and time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    for _, folder in sorted(finished, reverse=True)[keep:]:
        (folder / INDEX).unlink(missing_ok=True)  # first, so that a partly deleted folder does not look complete
        shutil.rmtree(folder, ignore_errors=True)  # Windows can't delete open files; they are deleted next time


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        claimed = index.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return index if claimed == _digest(index) else None


def _digest(body: dict[str, Any]) -> str:
    return sha256_text(json.dumps(body, sort_keys=True))


def _fits(empty: nn.Module, index: dict[str, Any]) -> bool:
    """Return whether the tensors make up the whole model, with the stored tensors in place of quantized weights."""
    expected = set(empty.state_dict())
    for name, about in index["layers"].items():
        expected -= {f"{name}.weight"}
        expected |= {f"{name}.{part}" for part in about["stored"]}
    return expected == set(index["tensors"])
