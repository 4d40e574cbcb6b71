"""Describe how a LoRA was trained, from the header of its file alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.safetensors_header import header_of


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file.

    Raises:
        UserError: The file does not exist, or is not a safetensors file.
    """
    try:
        return header_of(path)[0]
    except OSError as error:
        raise UserError.at(str(path), f"can't be read: {error.strerror or error}; use a .safetensors file") from error
    except ValueError as error:
        raise UserError.at(str(path), "is not a safetensors file; use a LoRA that ends in .safetensors") from error


class Description(dict[str, Any]):
    """The contents of a LoRA's header, as JSON values."""

    def text(self) -> str:
        """Return the description as lines of text."""
        request = self.get("request", {})
        training, model = request.get("training", {}), request.get("model", {})
        lines = [
            self["file"],
            f"  tensors   {self['tensors']} ({', '.join(f'{n} {kind}' for kind, n in self['dtypes'].items())})",
        ]
        if not request:
            return "\n".join(
                [
                    *lines,
                    "  not written by ChromaTrainer, or its record was removed",
                    *(f"  {k}: {v}" for k, v in self["metadata"].items()),
                ]
            )
        lines += [
            f"  kind      {self['metadata'].get('modelspec.architecture', '(unknown)')}, "
            f"rank {self['metadata'].get('ss_network_dim', '?')}",
            f"  base      {model['family']} {model['flavour']} ({model['repo']}), {model['dtype']}, "
            f"{_quantization(model)}",
            f"  trigger   {self['trigger'] or '(none)'}",
            f"  trained   {self['step']} steps on {self['dataset']['images']} images "
            f"(digest {self['dataset']['digest'][:16]})",
            "  settings  " + ", ".join(f"{key} {value}" for key, value in training.items() if key != "name"),
            "  versions  " + ", ".join(f"{key} {value}" for key, value in self["versions"].items()),
            "  workflow  "
            + (", ".join(f"{k} ({node['class_type']})" for k, node in self["workflow"].items()) or "(none)"),
        ]
        return "\n".join(lines)


def describe(path: Path) -> Description:
    """Return everything in a LoRA's header: tensors, metadata, and the training record if ChromaTrainer saved the
    file.
    """
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    record = json.loads(metadata.get("chroma_trainer", "{}"))
    return Description(
        file=path.name,
        tensors=len(header),
        dtypes=dict(Counter(entry["dtype"] for entry in header.values())),
        metadata={key: value for key, value in metadata.items() if key not in ("chroma_trainer", "prompt")},
        workflow=json.loads(metadata.get("prompt", "{}")),
        **record,
    )


def _quantization(model: Mapping[str, Any]) -> str:
    """Return the level, and the products if they were not exact."""
    stored = model["quantization"]
    return stored["level"] + (f" with {stored['products']} products" if "products" in stored else "")
