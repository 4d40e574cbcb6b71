"""Layers of Chroma and Flux that may be trained, by name: presets, and the layer names derived from the model's files.

Does not need torch, so that a workflow's targets are checked before anything heavy is imported. Both models have the
same blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.model import ModelConfig
from ..storage.model_header import model_header_of
from .loading.config_file import read_config
from .loading.locate import cached_alone, folder_of_part, is_hub_id, is_local, load_shipped_config

IMAGE_ATTENTION = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0")
TEXT_ATTENTION = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
TEXT_MLP = ("*.ff_context.net.0.proj", "*.ff_context.net.2")
# Not `*proj_out`, which also matches the final projection.
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
# What kind full can train beside the Linear layers.
NORMS = ("attn.norm_q", "attn.norm_k")
TEXT_NORMS = ("attn.norm_added_q", "attn.norm_added_k")
ALL_NORMS = {"norms": tuple(f"*.{norm}" for norm in (*NORMS, *TEXT_NORMS))}
APPROXIMATOR = "distilled_guidance_layer"
APPROXIMATOR_LAYERS = (
    f"{APPROXIMATOR}.in_proj", f"{APPROXIMATOR}.out_proj", f"{APPROXIMATOR}.layers.*.linear_1",
    f"{APPROXIMATOR}.layers.*.linear_2", f"{APPROXIMATOR}.norms.*",
)  # fmt: skip
RELEASED_LAYERS = {"approximator_layers": 5, "nerf_depth": 4}


@dataclass(frozen=True)
class Linears:
    """The layers of one family that may be trained.

    Args:
        targets: Preset name -> patterns of layer names.
        frozen: Patterns of layers that no LoRA trains.
        double: Layers of one double block.
        single: Layers of one single block.
        ends: Layers outside of the blocks.
        released: Config of the released model, for files that are not downloaded yet.
        class_name: Class name in a config.json of this family.
        whole: Further presets, for the training of the model itself (kind full).
        whole_ends: Further layers outside of the blocks, for kind full. `*` is the number of a layer in a row of
            layers: the approximator's, or those of Radiance's pixels.
    """

    targets: Mapping[str, tuple[str, ...]]
    frozen: tuple[str, ...]
    double: tuple[str, ...]
    single: tuple[str, ...]
    ends: tuple[str, ...]
    released: str
    class_name: str
    whole: Mapping[str, tuple[str, ...]]
    whole_ends: tuple[str, ...] = ()

    def names(self, model: ModelConfig, is_full: bool = False) -> list[str] | None:
        """Return every layer that may be trained. None: local files can't be read; the run reports why.

        Args:
            model: The model.
            is_full: The model itself is trained (kind full), not a LoRA.
        Raises:
            UserError: config.json is damaged.
        """
        counts = self._counts(model)
        if counts is None:
            return None
        double, single, ends = self.double, self.single, self.ends
        if is_full:
            double, single = (*double, *NORMS, *TEXT_NORMS), (*single, *NORMS)
            ends = (*ends, *(name for end in self.whole_ends for name in counts.expand(end)))
        blocks = (("transformer_blocks", counts.double, double), ("single_transformer_blocks", counts.single, single))
        inside = [f"{kind}.{i}.{layer}" for kind, count, layers in blocks for i in range(count) for layer in layers]
        return [*ends, *inside]

    def num_blocks(self, model: ModelConfig) -> int | None:
        """Return the number of double and single blocks. None: local files can't be read."""
        counts = self._counts(model)
        return None if counts is None else counts.double + counts.single

    def _counts(self, model: ModelConfig) -> Counts | None:
        try:
            if is_hub_id(model.transformer_file):
                folder = cached_alone(model.transformer_file, "transformer")
                return _count_in_config(read_config(folder / "config.json")) if folder else None
            if model.transformer_file:
                file = Path(model.transformer_file)
                if file.is_dir():
                    return _count_in_config(read_config(folder_of_part(file, "transformer") / "config.json"))
                config = read_config(file.parent / "config.json")
                is_ours = config.get("_class_name") == self.class_name
                return _count_in_config(config) if is_ours else _count_in_keys(model_header_of(file)[0])
            if is_local(model.repo):
                return _count_in_config(read_config(Path(model.repo) / "transformer" / "config.json"))
            return _count_in_config(load_shipped_config(self.released))
        except (OSError, ValueError, KeyError, TypeError):  # KeyError, TypeError: a config of another kind of model
            return None


@dataclass(frozen=True)
class Counts:
    """How many layers a model has of each kind."""

    double: int
    single: int
    approximator: int
    pixels: int  # Radiance's layers behind the blocks

    def expand(self, name: str) -> list[str]:
        """Return the names that a name with `*` for a number stands for."""
        count = self.approximator if name.startswith(APPROXIMATOR) else self.pixels
        return [name.replace("*", str(i)) for i in range(count)] if "*" in name else [name]


def _count_in_config(config: Mapping[str, Any]) -> Counts:
    ends = (int(config.get(name, count)) for name, count in RELEASED_LAYERS.items())
    return Counts(int(config["num_layers"]), int(config["num_single_layers"]), *ends)


# Names before the number of a layer, in either layout.
ROWS = {
    "double_blocks": "double", "transformer_blocks": "double", "single_blocks": "single",
    "single_transformer_blocks": "single", "layers": "approximator", "nerf_blocks": "pixels",
}  # fmt: skip


def _count_in_keys(keys: Iterable[str]) -> Counts:
    indices: dict[str, set[int]] = {kind: set() for kind in ROWS.values()}
    for key in keys:
        words = key.split(".")
        for i, word in enumerate(words[:-1]):
            kind = ROWS.get(word, "")
            if kind and words[i + 1].isdigit():
                indices[kind].add(int(words[i + 1]))
                break
    if not indices["double"]:
        raise ValueError("no blocks")
    return Counts(**{kind: len(numbers) for kind, numbers in indices.items()})


CHROMA = Linears(
    targets={**TARGETS, "ai-toolkit": TARGETS["all+ffs"]},  # its adaLN layers exist in Flux only
    frozen=(f"{APPROXIMATOR}*",),
    double=DOUBLE, single=SINGLE, ends=ENDS,
    released="chroma_transformer", class_name="ChromaTransformer2DModel",
    whole={**ALL_NORMS, "embedders": ENDS, "approximator": (f"{APPROXIMATOR}*",)}, whole_ends=APPROXIMATOR_LAYERS,
)  # fmt: skip
# Its patches are embedded by a convolution, and the layers behind the blocks generate weights; neither gets a LoRA.
PIXELS = (
    "nerf_image_embedder.embedder.0", "nerf_blocks.*.param_generator", "nerf_blocks.*.norm",
    *(f"nerf_final_layer{head}" for head in (".norm", ".linear", "_conv.norm", "_conv.conv")),
)  # fmt: skip
RADIANCE = Linears(
    targets={name: patterns for name, patterns in CHROMA.targets.items() if "x_embedder" not in patterns},
    frozen=(f"{APPROXIMATOR}*", "nerf_*"),
    double=DOUBLE, single=SINGLE, ends=("context_embedder",),
    released="chroma_transformer", class_name="",
    whole={
        **ALL_NORMS, "embedders": ("context_embedder", "img_in_patch"), "approximator": (f"{APPROXIMATOR}*",),
        "pixels": ("nerf_*",),
    },
    whole_ends=(*APPROXIMATOR_LAYERS, "img_in_patch", *PIXELS),
)  # fmt: skip
EMBEDDERS = ("timestep_embedder", "guidance_embedder", "text_embedder")
CONDITIONING = tuple(f"time_text_embed.{e}.linear_{i}" for e in EMBEDDERS for i in (1, 2))
FLUX = Linears(
    targets={**TARGETS, "ai-toolkit": TARGETS["all+ffs"] + MODULATIONS},
    frozen=(),
    double=(*DOUBLE, "norm1.linear", "norm1_context.linear"),
    single=(*SINGLE, "norm.linear"),
    ends=(*ENDS, "norm_out.linear", *CONDITIONING),
    released="flux_transformer", class_name="FluxTransformer2DModel",
    whole={**ALL_NORMS, "embedders": (*ENDS, "time_text_embed*")},
)  # fmt: skip
