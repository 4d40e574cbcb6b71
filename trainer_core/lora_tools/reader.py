"""A LoRA whose layers are read one at a time: a file, or tensors in memory as on ComfyUI's LORA_MODEL connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.files.grouping import KeyGroups, group_keys, update_types
from ..adapters.files.keys import Place, layers_of
from ..adapters.files.load import ALPHA, add_alpha_, build_update, part_of
from ..adapters.files.peft_config import peft_config
from ..adapters.layer import IncompatibleUpdate, Update
from ..errors import UserError
from ..storage.atomic import sha256_of
from ..workflow.lora_metadata import read_lora_header

NUM_EXAMPLES = 3
EDIT = "chroma_trainer_edit"  # metadata: how a tool made this file from others
SEE_DOCTOR = "chroma-trainer doctor shows what it is"


class LoraTensors(dict[str, Tensor]):
    """The tensors of a LoRA, as ComfyUI's LORA_MODEL connections carry them, with what its file's header says.

    Attributes:
        name: Name of the LoRA, for messages.
        metadata: Texts of the header.
        sha256: Digest of the file, "" if it was not a file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, metadata: Mapping[str, str], sha256: str = ""):
        super().__init__(tensors)
        self.name, self.metadata, self.sha256 = name, dict(metadata), sha256


@dataclass(frozen=True)
class Entry:
    """Dtype (as safetensors names it) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class LoraReader:
    """The tensors of a LoRA, read on demand.

    Attributes:
        name: Name for messages.
        path: The file; None for tensors in memory.
        entries: Dtype and shape of each tensor, by key.
        metadata: Texts of the header.
        faults: What is wrong with the file's header.
        read: Returns a tensor by its key.
        digest: Digest of the file that tensors in memory come from.
    """

    name: str
    path: Path | None
    entries: dict[str, Entry]
    metadata: dict[str, str]
    read: Callable[[str], Tensor]
    faults: tuple[str, ...] = ()
    digest: str = ""
    _last: tuple[str, Update | None] = ("", None)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> LoraReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def groups(self) -> KeyGroups:
        """The keys by layer."""
        return group_keys(self.entries)

    @cached_property
    def sha256(self) -> str:
        """Digest of the file; for tensors in memory that of the file they came from, or ""."""
        return sha256_of(self.path) if self.path else self.digest

    @cached_property
    def header_alpha(self) -> dict[str, Any]:
        """The config that diffusers and peft store beside the factors: it gives alpha where no tensor does."""
        return peft_config(self.path or Path(self.name), self.metadata)

    def part(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a layer by suffix, as the file holds them."""
        return {end: self.read(key) for end, key in self.groups.parts[module].items()}

    def scaled_part(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a layer by suffix, with the alpha of the header if it has none of its own."""
        part = self.part(module)
        add_alpha_(part, self.header_alpha, module)
        return part

    def update(self, module: str) -> Update | None:
        """Return the update of a layer as the file names it; None if its tensors do not fit together."""
        part = self.scaled_part(module)
        if ALPHA in part and (part[ALPHA].numel() != 1 or not math.isfinite(float(part[ALPHA]))):
            return None
        return build_update(part, update_types())

    @cached_property
    def places(self) -> dict[str, tuple[str, Place]]:
        """Diffusers' name of each layer -> the module in the file, and the layer's rows there. The first one counts."""
        places: dict[str, tuple[str, Place]] = {}
        for module in self.groups.parts:
            for layer, place in layers_of(module):
                places.setdefault(layer, (module, place))
        return places

    def layer(self, name: str) -> Update:
        """Return the update of one layer by diffusers' name, split from a fused one if needed.

        Raises:
            UserError: Its tensors do not fit together, or this kind can't be split.
        """
        module, place = self.places[name]
        if self._last[0] != module:  # the parts of a fused layer follow one another
            self._last = module, self.update(module)
        update = self._last[1]
        if update is None:
            raise UserError.at(self.name, f"its tensors of {module} do not form an update; {SEE_DOCTOR}")
        try:
            return part_of(update, place)
        except IncompatibleUpdate as error:
            raise UserError.at(self.name, f"{module} can't be used: {error}") from error


def open_lora(path: Path) -> LoraReader:
    """Open a LoRA file. Nothing but its header is read.

    Raises:
        UserError: The file can't be read, or is not a safetensors file.
    """
    header = read_lora_header(path)
    entries = {key: Entry(entry["dtype"], tuple(entry["shape"])) for key, entry in header.tensors.items()}
    stack = ExitStack()
    if header.faults:
        return LoraReader(path.name, path, entries, header.metadata, _refuse(path, header.faults[0]), header.faults)
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise UserError.at(path.name, f"is not a readable LoRA file: {error} ({path})") from error
    return LoraReader(path.name, path, entries, header.metadata, file.get_tensor, _stack=stack)


def _refuse(path: Path, fault: str) -> Callable[[str], Tensor]:
    def read(key: str) -> Tensor:
        raise UserError.at(path.name, f"is damaged: {fault} ({path})")

    return read


def of_tensors(tensors: Mapping[str, Tensor], name: str = "lora") -> LoraReader:
    """Return a reader of tensors in memory."""
    from ..adapters.files.safetensors import DTYPE_NAMES

    entries = {
        key: Entry(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for key, tensor in tensors.items()
    }
    own = tensors if isinstance(tensors, LoraTensors) else LoraTensors({}, name, {})

    def read(key: str) -> Tensor:
        return tensors[key].detach().to("cpu")

    return LoraReader(own.name, None, entries, own.metadata, read, digest=own.sha256)


def load_tensors(path: Path, sha256: str = "") -> LoraTensors:
    """Read a whole file into memory, for a LORA_MODEL connection.

    Args:
        path: The file.
        sha256: Its digest if it is known, so that it is not read twice.
    Raises:
        UserError: The file can't be read.
    """
    with open_lora(path) as lora:
        tensors = {key: lora.read(key).clone() for key in lora.entries}
        return LoraTensors(tensors, path.name, lora.metadata, sha256 or lora.sha256)


def require_lora(lora: LoraReader) -> None:
    """Raise UserError if this is not one readable LoRA of Chroma or Flux."""
    if lora.faults:
        raise UserError.at(lora.name, f"is damaged: {lora.faults[0]}")
    if not lora.groups.parts:
        raise UserError.at(lora.name, f"is not a LoRA, DoRA, LoKr, LoHa or OFT file; {SEE_DOCTOR}")
    adapters = lora.groups.adapters - {""}
    if len(adapters) > 1:
        names = ", ".join(sorted(adapters))
        raise UserError.at(lora.name, f"contains several adapters ({names}); save one of them alone")
    strangers = [module for module in lora.groups.parts if not layers_of(module)]
    if strangers:
        raise UserError.at(
            lora.name,
            f"{len(strangers)} of its {len(lora.groups.parts)} layers are none of Chroma or Flux, such as "
            f"{strangers[0]}; {SEE_DOCTOR}",
        )
