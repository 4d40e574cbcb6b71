"""Write a LoRA layer by layer, and prove that the file holds what was written and loads where it should.

The tensors are collected in a temporary file, because a safetensors header stands before them and needs all their
sizes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.files.keys import layers_of
from ..adapters.files.safetensors import header_entry, raw_bytes, to_file_dtype
from ..adapters.layer import Update, probe
from ..adapters.lora import ROW_NORMS, LoraPair
from ..errors import UserError
from ..storage.atomic import HASH_CHUNK_BYTES, replace_atomic, sha256_of
from ..storage.safetensors_header import METADATA, header_bytes
from .reader import EDIT, LoraReader, LoraTensors, of_tensors, open_lora
from .report.base_model import base_of
from .report.loading_rules import COMFYUI, DIFFUSERS, NATIVE, WRAPPED, unloaded_keys

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
KEPT = ("modelspec.", "ss_", "prompt", "chroma_trainer", "workflow")  # metadata of a parent that stays
OWN = (
    "sshs_model_hash",
    "sshs_legacy_hash",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_network_args",
    "ss_output_name",
)
NETWORKS = {"lora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya", "oft": "lycoris.kohya"}
RECORDED = ("prompt", "chroma_trainer", "workflow")  # what of a parent's metadata a file of several parents keeps
MAX_METADATA = 8 << 20  # bytes; the largest known workflows have about 5 MB


@dataclass(frozen=True)
class Written:
    """A file that was written, read back and checked.

    Attributes:
        path: The file.
        sha256: Its digest.
        num_keys: Number of its keys.
        loaded: Number of its keys that ComfyUI and diffusers load, by program.
        tensors: The tensors, if they were kept in memory.
    """

    path: Path | None
    sha256: str
    num_keys: int
    loaded: dict[str, int]
    tensors: LoraTensors | None = None

    def text(self) -> str:
        """Return which of the keys are loaded, in words."""
        return "; ".join(f"{count} of {self.num_keys} keys load in {program}" for program, count in self.loaded.items())

    def as_json(self, file: str) -> dict[str, Any]:
        """Return the result as JSON values. file: its path as the user gave it."""
        return {"file": file, "sha256": self.sha256, "keys": self.num_keys, "loaded": self.loaded}


@dataclass
class _Spool:
    """Tensors on their way into a file."""

    stream: Any
    header: dict[str, Any] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)
    end: int = 0

    def add(self, key: str, tensor: Tensor) -> None:
        raw = raw_bytes(tensor)
        self.stream.write(raw)
        self.digest.update(raw)
        self.header[key], self.end = header_entry(tensor, self.end)


@dataclass
class LoraWriter:
    """Collects the layers of a LoRA.

    Args:
        dtype: Dtype of the tensors. Scalars such as alpha are fp32.
        metadata: Texts of the header. Rank and alpha are added.
    """

    dtype: torch.dtype
    metadata: dict[str, str]
    probes: dict[str, Tensor] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def tensors_of(self, layer: str, update: Update) -> dict[str, Tensor]:
        """Return the tensors of a layer by key. layer: a name for key_of."""
        tensors = {
            key_of(layer) + end: to_file_dtype(
                tensor, torch.promote_types(tensor.dtype, self.dtype) if end in ROW_NORMS else self.dtype
            )
            for end, tensor in update.tensors().items()
        }
        self.probes[layer] = update.applied(probe(update.shape[1]))
        self.kinds.add(update.kind)
        if isinstance(update, LoraPair):
            self.ranks.add(update.rank)
        return tensors

    def header(self) -> dict[str, str]:
        """Return the metadata with what the layers add."""
        own = {"ss_network_module": NETWORKS[max(self.kinds)]} if self.kinds else {}
        if self.ranks:  # alpha / rank is multiplied into the factors
            own |= {"ss_network_dim": str(max(self.ranks)), "ss_network_alpha": f"{max(self.ranks):g}"}
        return dict(sorted({**self.metadata, **own}.items()))


def key_of(layer: str) -> str:
    """Return the name of a layer in a file that ComfyUI and diffusers load: diffusers' name or, for a fused one, the original."""
    layers = layers_of(layer)
    return f"{WRAPPED}{layer}" if layers and layers[0][0] == layer else f"{NATIVE}{layer}"


def write_lora(
    path: Path, layers: Iterable[tuple[str, Update]], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> Written:
    """Write a LoRA file layer by layer, read it back, then replace the old file.

    Args:
        path: The file. Its folder is created.
        layers: Name of each layer and its update. It is read once; one layer is in memory at a time.
        metadata: Texts of the header.
        dtype: Dtype of the tensors.
    Raises:
        UserError: Nothing is left to write, or rounding to the dtype changes what the LoRA does.
        OSError: See storage.atomic.
    """
    writer = LoraWriter(dtype, dict(metadata))

    def write(temporary: Path) -> None:
        with tempfile.TemporaryFile(dir=temporary.parent) as stream:
            spool = _Spool(stream)
            for layer, update in layers:
                for key, tensor in writer.tensors_of(layer, update).items():
                    spool.add(key, tensor)
            if not spool.header:
                raise UserError.at(path.name, "would have no layers, so it is not written")
            metadata = {**writer.header(), "sshs_model_hash": spool.digest.hexdigest()}
            stream.seek(0)
            with temporary.open("wb") as target:
                target.write(header_bytes({METADATA: metadata, **spool.header}))
                shutil.copyfileobj(stream, target, HASH_CHUNK_BYTES)
        with open_lora(temporary) as written:
            _check(written, writer, path.name)

    replace_atomic(path, write)
    with open_lora(path) as written:
        return Written(path, sha256_of(path), len(written.entries), loaded_keys(written))


def keep_lora(
    name: str, layers: Iterable[tuple[str, Update]], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> Written:
    """Do the same as write_lora, in memory, for a LORA_MODEL connection."""
    writer = LoraWriter(dtype, dict(metadata))
    tensors = {key: tensor for layer, update in layers for key, tensor in writer.tensors_of(layer, update).items()}
    if not tensors:
        raise UserError.at(name, "has no layers left")
    result = LoraTensors(tensors, name, writer.header())
    lora = of_tensors(result)
    _check(lora, writer, name)
    return Written(None, "", len(tensors), loaded_keys(lora), result)


def loaded_keys(lora: LoraReader) -> dict[str, int]:
    """Return the number of keys that each program loads."""
    unloaded = unloaded_keys(lora, base_of(lora).unknown)
    return {program: len(lora.entries) - len(unloaded[program]) for program in (COMFYUI, DIFFUSERS)}


def _check(lora: LoraReader, writer: LoraWriter, name: str) -> None:
    """Raise unless every layer is in the file, with the effect that was written, under a key that ComfyUI loads."""
    modules = lora.groups.parts
    if modules.keys() != writer.probes.keys():
        raise RuntimeError(f"{name} is not saved: its layers differ from what was written")
    for module, expected in writer.probes.items():
        update = lora.update(module)
        if update is None:
            raise RuntimeError(f"{name} is not saved: {module} can't be read back")
        difference = (update.applied(probe(update.shape[1])) - expected).norm()
        if not bool(difference <= TOLERANCES[writer.dtype] * expected.norm() + 1e-30):
            dtype = str(writer.dtype).removeprefix("torch.")
            raise UserError.at(name, f"is not saved: {dtype} changes what {module} does; save it in fp32")


def edited_metadata(operation: str, parents: Sequence[tuple[LoraReader, str]], **settings: object) -> dict[str, str]:
    """Return the metadata of a file that a tool makes from others.

    A file with one parent keeps its metadata (workflow, trigger, base model). A file with several keeps what they agree
    on, and the records of each inside chroma_trainer_edit.

    Args:
        operation: Name of the tool, such as "lora merge".
        parents: The files, each with what was done to it, such as its strength.
        settings: Settings of the tool.
    """
    shared = [
        {
            name: text
            for name, text in lora.metadata.items()
            if name.startswith(KEPT) and name not in OWN and name != EDIT
        }
        for lora, _ in parents
    ]
    common = {name: text for name, text in shared[0].items() if all(other.get(name) == text for other in shared[1:])}
    triggers = dict.fromkeys(filter(None, (part.get("modelspec.trigger_phrase", "") for part in shared)))
    if triggers:
        common["modelspec.trigger_phrase"] = ", ".join(triggers)
    records = [
        {
            "name": lora.name,
            "sha256": lora.sha256,
            **({"applied": applied} if applied else {}),
            **_records(lora, len(parents)),
        }
        for lora, applied in parents
    ]
    edit = {
        "operation": operation,
        **{key: value for key, value in settings.items() if value not in (None, "")},
        "parents": records,
    }
    return {**common, EDIT: json.dumps(edit, sort_keys=True)}


def _records(lora: LoraReader, num_parents: int) -> dict[str, Any]:
    """Return a parent's own record: how it was trained if it is one of several, and how it was made from others."""
    names = (EDIT, *RECORDED) if num_parents > 1 else (EDIT,)
    texts = {name: lora.metadata[name] for name in names if name in lora.metadata}
    if sum(map(len, texts.values())) > MAX_METADATA:
        return {"metadata": {}}
    return {"metadata": texts} if texts else {}
