"""Files of torch.distributed.checkpoint in the safetensors format: each rank writes its rows of every tensor in a file.

DCP decides which rank writes which rows, and which rows of which files a rank of a later run reads, whatever the number of
ranks then and now. Its own files are pickles, which are never read here.

    shard-0000.safetensors    rows of rank 0; the header's `slices` says which: {name: [whole shape, offsets]}
    shard-0001.safetensors    rows of rank 1
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..adapters.files.safetensors import DTYPE_NAMES, Planned, write_tensors
from ..storage.safetensors_header import METADATA, header_of
from .sharding import SHARD_PREFIX

SLICES = "slices"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def shard_file(rank: int) -> str:
    return f"{SHARD_PREFIX}{rank:04}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{SHARD_PREFIX}*.safetensors"))


class ShardWriter(StorageWriter):
    """Writes the file of one rank.

    Args:
        folder: The folder, which exists.
        rank: Number of the rank.
        copies: Only copy the tensors to RAM. `write` writes the copies later, in any thread: all messages between the
            ranks have been exchanged by then.
    Attributes:
        sha256: Of the file, once it is written.
    """

    def __init__(self, folder: Path, rank: int, copies: bool = False):
        self.path, self.sha256, self._copies = folder / shard_file(rank), "", copies
        self._tensors: dict[str, Planned] = {}
        self._slices: dict[str, list[list[int]]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            data, name = item.tensor_data, item.index.fqn
            assert data is not None and name not in self._tensors, (
                f"{name} is no tensor, or has several parts on a rank"
            )
            resolve = _resolver(planner, item)
            if self._copies:
                resolve = partial(_same, resolve().detach().to("cpu", copy=True))
            self._tensors[name] = Planned(data.properties.dtype, tuple(data.chunk.sizes), resolve)
            self._slices[name] = [[*data.size], [*data.chunk.offsets]]
            size = data.chunk.sizes.numel() * data.properties.dtype.itemsize
            results.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=None))
        if not self._copies:
            self.write()
        return _finished(results)

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: The disk is full or can't be written to.
        """
        tensors, self._tensors = self._tensors, {}
        self.sha256 = write_tensors(self.path, tensors, {SLICES: json.dumps(self._slices, sort_keys=True)})
        with self.path.open("rb+") as stream:
            os.fsync(stream.fileno())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _resolver(planner: SavePlanner, item: Any) -> Callable[[], Tensor]:
    def resolve() -> Tensor:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        return data

    return resolve


def _finished(value: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class ShardReader(StorageReader):
    """Reads the files that ShardWriter has written.

    Args:
        folder: Their folder. Their hashes were compared (train/hooks/checkpoint.py).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.forms: dict[str, tuple[torch.Size, torch.dtype]] = {}  # of the whole tensors
        self._places: dict[MetadataIndex, Path] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the files hold.

        Raises:
            ValueError, KeyError: A header is not one that ShardWriter has written.
        """
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for file in shard_files(self.folder):
            header, _ = header_of(file)
            slices: Mapping[str, Any] = json.loads(header[METADATA][SLICES])
            for name, (whole, offsets) in slices.items():
                entry = header[name]
                self.forms[name] = torch.Size(whole), DTYPES[entry["dtype"]]
                chunks.setdefault(name, []).append(
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(entry["shape"]))
                )
                self._places[MetadataIndex(name, torch.Size(offsets))] = file
        return Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks[name])
                for name, (size, dtype) in self.forms.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.read_metadata()  # DCP reads it on one rank

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[Path, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._places[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(file, "pt") as opened:
                for item in items:
                    self._read(opened, item, planner)
        return _finished(None)

    def _read(self, opened: Any, item: Any, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        rows = tuple(
            slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
        )
        tensor = opened.get_slice(name)[rows] if rows else opened.get_tensor(name)
        target = planner.resolve_tensor(item).detach()
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
