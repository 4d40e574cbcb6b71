"""How a LoRA came to be, read from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.safetensors_header import header_of


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        UserError: no such file, or no safetensors file.
    """
    try:
        return header_of(path)[0]
    except OSError as error:
        raise UserError.at(str(path), f"can't be read: {error.strerror or error}; name a .safetensors file") from error
    except ValueError as error:
        raise UserError.at(str(path), "is no safetensors file; name a LoRA that ends in .safetensors") from error


class Description(dict[str, Any]):
    """What a LoRA's header says, as JSON values."""

    def text(self) -> str:
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
            f"  kind      {self['metadata'].get('modelspec.architecture', '(unknown)')}, rank {self['metadata'].get('ss_network_dim', '?')}",
            f"  base      {model['family']} {model['flavour']} ({model['repo']}), {model['dtype']}, {_quantization(model)}",
            f"  trigger   {self['trigger'] or '(none)'}",
            f"  trained   {self['step']} steps on {self['dataset']['images']} images (digest {self['dataset']['digest'][:16]})",
            "  settings  " + ", ".join(f"{key} {value}" for key, value in training.items() if key != "name"),
            "  versions  " + ", ".join(f"{key} {value}" for key, value in self["versions"].items()),
            "  workflow  "
            + (", ".join(f"{k} ({node['class_type']})" for k, node in self["workflow"].items()) or "(none)"),
        ]
        return "\n".join(lines)


def describe(path: Path) -> Description:
    """Everything a LoRA's header tells: tensors, metadata, and our own record where there is one."""
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
    """The level, and its products where they were not exact."""
    stored = model["quantization"]
    return stored["level"] + (f" with {stored['products']} products" if "products" in stored else "")
