"""Describe how a LoRA was trained, from the header of its file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.adapter import FULL
from ..errors import UserError
from ..storage.bounded_files import Unusable, parse_json
from ..storage.safetensors_header import Header, read_header

OWN, PROMPT = "chroma_trainer", "prompt"  # metadata that is shown as a record and a workflow
RECORD = ("request", "versions", "dataset", "trigger", "step", "parents")
MAX_SHOWN = 300  # characters of one metadata value as text; --json has all of them
MAX_GENERATIONS = 16
UNKNOWN = "unknown"


def read_lora_header(path: Path) -> Header:
    """Return the header of a safetensors file, with what is wrong with it.

    Raises:
        UserError: The file does not exist, or is not a safetensors file.
    """
    try:
        return read_header(path)
    except OSError as error:
        raise UserError.at(str(path), f"can't be read: {error.strerror or error}; use a .safetensors file") from error
    except ValueError as error:
        raise UserError.at(
            str(path), f"is not a safetensors file ({error}); use a LoRA that ends in .safetensors"
        ) from error


class Description(dict[str, Any]):
    """The contents of a LoRA's header, as JSON values."""

    def text(self) -> str:
        """Return the description as lines of text. It may contain control characters of the file."""
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self["dtypes"].items())
        lines = [self["file"], f"  tensors   {self['tensors']} ({kinds})"]
        lines += [f"  damaged   {fault}" for fault in self.get("faults", ())]
        if "request" in self:
            lines += self._record_lines()
        else:
            lines += ["  not written by ChromaTrainer, or its record was removed"]
            lines += [f"  {name}: {_shorten(text)}" for name, text in self["metadata"].items()]
        nodes = self["workflow"].items()
        lines += [
            "  workflow  " + (", ".join(f"{key} ({_get(node, 'class_type')})" for key, node in nodes) or "(none)")
        ]
        return "\n".join(line.replace("\n", "\\n") for line in lines)

    def _record_lines(self) -> list[str]:
        metadata, training = self["metadata"], _get(self, "request", "training")
        digest = _get(self, "dataset", "digest")
        settings = training if isinstance(training, dict) else {}
        versions = self["versions"] if isinstance(self.get("versions"), dict) else {}
        is_full = _get(self, "request", "adapter", "kind") == FULL
        size = "all weights" if is_full else f"rank {metadata.get('ss_network_dim', '?')}"
        return [
            f"  kind      {metadata.get('modelspec.architecture', UNKNOWN)}, {size}",
            f"  base      {describe_base(_get(self, 'request', 'model'))}",
            f"  trigger   {self.get('trigger') or '(none)'}",
            f"  trained   {self.get('step', UNKNOWN)} steps on {_get(self, 'dataset', 'images')} images "
            f"(digest {str(digest)[:16]})",
            *_parent_lines(self.get("parents")),
            "  settings  " + ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name"),
            "  versions  " + ", ".join(f"{key} {value}" for key, value in versions.items()),
        ]


def _parent_lines(parents: Any, depth: int = 0) -> list[str]:
    """Return a line for the LoRA that the training started from, and for each that this one was made from."""
    lines: list[str] = []
    for parent in parents if isinstance(parents, list) and depth < MAX_GENERATIONS else ():
        step, digest = _get(parent, "step"), str(_get(parent, "sha256"))
        steps = f", {step} steps" if isinstance(step, int) else ""
        lines.append(f"  {'  ' * depth}from      {_get(parent, 'name')}{steps} (sha256 {digest[:16]})")
        lines += _parent_lines(_get(parent, "parents"), depth + 1)
    return lines


def describe(path: Path) -> Description:
    """Return everything in a LoRA's header: tensors, metadata, and ChromaTrainer's training record if there is one.

    What is damaged is listed under `faults`. A record or a workflow that is not JSON stays among the metadata.

    Raises:
        UserError: The file does not exist, or is not a safetensors file.
    """
    header = read_lora_header(path)
    metadata, faults = dict(header.metadata), list(header.faults)
    record = _pop_object(metadata, OWN, faults)
    workflow = _pop_object(metadata, PROMPT, faults if record else [])  # other tools store a plain text as `prompt`
    description = Description(
        file=path.name,
        tensors=len(header.tensors),
        dtypes=dict(Counter(entry["dtype"] for entry in header.tensors.values())),
        metadata=metadata,
        workflow=workflow,
        **{name: record[name] for name in RECORD if name in record},
    )
    return Description(description, faults=faults) if faults else description


def _pop_object(metadata: dict[str, str], name: str, faults: list[str]) -> dict[str, Any]:
    """Remove a JSON object from the metadata and return it. Anything else stays there, and the result is {}."""
    if name not in metadata:
        return {}
    try:
        value = parse_json(metadata[name])
        reason = "" if isinstance(value, dict) else "is not a JSON object"
    except Unusable as error:
        value, reason = {}, str(error)
    if reason:
        faults.append(f"its metadata {name} {reason}")
        return {}
    del metadata[name]
    return value


def _get(value: Any, *names: str) -> Any:
    """Return a value inside nested objects, or UNKNOWN where one of them is missing or has another type."""
    for name in names:
        value = value.get(name, UNKNOWN) if isinstance(value, Mapping) else UNKNOWN
    return value


def describe_base(model: Any) -> str:
    """Return the base model, its precision and quantization: the level, and the products if they were not exact."""
    names = {name: _get(model, name) for name in ("family", "flavour", "repo", "dtype")}
    stored = _get(model, "quantization")
    products = f" with {stored['products']} products" if isinstance(stored, dict) and "products" in stored else ""
    base = f"{names['family']} {names['flavour']} ({names['repo']}), {names['dtype']}"
    return f"{base}, {_get(stored, 'level')}{products}"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters; --json shows all)"
