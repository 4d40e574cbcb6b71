"""Which layers a LoRA of Chroma or Flux may touch, by name: presets, and the names themselves as the model's files say them.

Needs no torch, so that a workflow's targets are checked before anything heavy is imported. The same blocks are in both models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.model import ModelConfig
from ..storage.safetensors_header import header_of
from .loading.locate import is_local, load_shipped_config

IMAGE_ATTENTION = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0")
TEXT_ATTENTION = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
TEXT_MLP = ("*.ff_context.net.0.proj", "*.ff_context.net.2")
# Not `*proj_out`: that takes the final projection as well.
MLP = ("*.ff.net.0.proj", "*.ff.net.2", *TEXT_MLP, "*.proj_mlp", "single_transformer_blocks.*.proj_out")
MODULATIONS = ("*.norm1.linear", "*.norm1_context.linear", "single_transformer_blocks.*.norm.linear")
TARGETS = {
    "mmdit": IMAGE_ATTENTION,
    "all": IMAGE_ATTENTION + TEXT_ATTENTION,
    "context": TEXT_ATTENTION,
    "context+ffs": TEXT_ATTENTION + TEXT_MLP,
    "all+ffs": IMAGE_ATTENTION + TEXT_ATTENTION + MLP,
    "all+ffs+embedder": (*IMAGE_ATTENTION, *TEXT_ATTENTION, *MLP, "x_embedder"),
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
DOUBLE = (
    *ATTENTION, "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
SINGLE = ("proj_mlp", "proj_out", *ATTENTION)
ENDS = ("context_embedder", "x_embedder", "proj_out")


@dataclass(frozen=True)
class Linears:
    """Of one family.

    Args:
        targets: preset name -> patterns of names. frozen: patterns of what a LoRA never touches.
        double, single: layers of one block of each kind. ends: those outside of the blocks.
        released: config of the released model, for files that are not here yet. class_name: of a config.json of this family.
    """

    targets: Mapping[str, tuple[str, ...]]
    frozen: tuple[str, ...]
    double: tuple[str, ...]
    single: tuple[str, ...]
    ends: tuple[str, ...]
    released: str
    class_name: str

    def names(self, model: ModelConfig) -> list[str] | None:
        """Every layer that a LoRA may touch; None where the files that are here can't be read: the run says why."""
        counts = self._counts(model)
        if counts is None:
            return None
        blocks = (("transformer_blocks", counts[0], self.double), ("single_transformer_blocks", counts[1], self.single))
        inside = [f"{kind}.{i}.{layer}" for kind, count, layers in blocks for i in range(count) for layer in layers]
        return [*self.ends, *inside]

    def num_blocks(self, model: ModelConfig) -> int | None:
        """Double and single ones; None where the files that are here can't be read."""
        counts = self._counts(model)
        return None if counts is None else sum(counts)

    def _counts(self, model: ModelConfig) -> tuple[int, int] | None:
        try:
            if model.transformer_file:
                file = Path(model.transformer_file)
                config = _config(file.parent / "config.json")
                return _of(config) if config.get("_class_name") == self.class_name else _of_keys(header_of(file)[0])
            if is_local(model.repo):
                return _of(_config(Path(model.repo) / "transformer" / "config.json"))
            return _of(load_shipped_config(self.released))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _of(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["num_layers"]), int(config["num_single_layers"])


def _config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _of_keys(keys: Iterable[str]) -> tuple[int, int]:
    found: dict[str, set[int]] = {"double": set(), "single": set()}
    for key in keys:
        words = key.split(".")
        for i, word in enumerate(words[:-1]):
            kind = {"double_blocks": "double", "transformer_blocks": "double", "single_blocks": "single"}.get(
                word, "single" if word == "single_transformer_blocks" else ""
            )
            if kind and words[i + 1].isdigit():
                found[kind].add(int(words[i + 1]))
                break
    if not found["double"]:
        raise ValueError("no blocks")
    return len(found["double"]), len(found["single"])


CHROMA = Linears(
    targets={**TARGETS, "ai-toolkit": TARGETS["all+ffs"]},  # its adaLN layers exist in Flux only
    frozen=("distilled_guidance_layer*",),
    double=DOUBLE, single=SINGLE, ends=ENDS,
    released="chroma_transformer", class_name="ChromaTransformer2DModel",
)  # fmt: skip
EMBEDDERS = ("timestep_embedder", "guidance_embedder", "text_embedder")
FLUX = Linears(
    targets={**TARGETS, "ai-toolkit": TARGETS["all+ffs"] + MODULATIONS},
    frozen=(),
    double=(*DOUBLE, "norm1.linear", "norm1_context.linear"),
    single=(*SINGLE, "norm.linear"),
    ends=(*ENDS, "norm_out.linear", *(f"time_text_embed.{e}.linear_{i}" for e in EMBEDDERS for i in (1, 2))),
    released="flux_transformer", class_name="FluxTransformer2DModel",
)  # fmt: skip
