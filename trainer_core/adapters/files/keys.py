"""Module names in two layouts: diffusers (used here) and the original one (files of ComfyUI and lodestones).

The original layout fuses projections along their output rows: q, k, v -> `qkv`, and in single blocks q, k, v, mlp ->
`linear1` (h, h, h, 4h). Everything else is only renamed. Weights, biases and LoRA deltas all use the table below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")

# diffusers module -> original module, and its rows there: 0, 1, 2 for q, k, v; 3 for the rest (mlp); None for all rows.
DOUBLE_BLOCK = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
    "norm1.linear": ("img_mod.lin", None),  # modulations: Flux alone has them
    "norm1_context.linear": ("txt_mod.lin", None),
}
SINGLE_BLOCK = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "attn.norm_q": ("norm.query_norm", None),
    "attn.norm_k": ("norm.key_norm", None),
    "norm.linear": ("modulation.lin", None),
}
OUTSIDE_BLOCKS = {
    "x_embedder": ("img_in", None),
    "context_embedder": ("txt_in", None),
    "proj_out": ("final_layer.linear", None),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj", None),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj", None),
}
EMBEDDERS = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"}
EMBEDDER_LAYER = {"linear_1": "in_layer", "linear_2": "out_layer"}
# Flux's last modulation: the original layout has the shift's rows first, diffusers has the scale's rows first.
SWAPPED = "norm_out.linear"
APPROXIMATOR_LAYER = {"linear_1": "in_layer", "linear_2": "out_layer"}
KOHYA_PREFIX = "lora_unet_"
# diffusers' name of a kind of block -> the original one, and its layers.
BLOCKS = {
    "transformer_blocks": ("double_blocks", DOUBLE_BLOCK),
    "single_transformer_blocks": ("single_blocks", SINGLE_BLOCK),
}
JOINED_ROWS = {"linear1_qkv": "linear1"}  # ComfyUI's name of the first rows: q, k and v
# Original name outside of the blocks -> diffusers' name.
OUTSIDE_NAMES = {
    **{original: diffusers for diffusers, (original, _) in OUTSIDE_BLOCKS.items()},
    **{
        f"{theirs}.{EMBEDDER_LAYER[layer]}": f"time_text_embed.{ours}.{layer}"
        for ours, theirs in EMBEDDERS.items() for layer in EMBEDDER_LAYER
    },
    "final_layer.adaLN_modulation.1": SWAPPED,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A module's position in the original layout.

    Attributes:
        module: Name of the module there.
        part: Part of its rows, as in the tables above.
        is_swapped: The two halves of its rows are exchanged.
    """

    module: str
    part: int | None = None
    is_swapped: bool = False

    def rows(self, width: int) -> slice:
        """Return the rows in the fused weight. width: hidden width h; q, k and v have h rows each, mlp has the rest."""
        if self.part is None:
            return slice(None)
        return slice(self.part * width, None if self.part == 3 else (self.part + 1) * width)


def original_place(module: str) -> Place:
    """Return the position of a diffusers module in the original layout.

    Raises:
        KeyError: The module has no counterpart there.
    """
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        name, part = DOUBLE_BLOCK[match[2]]
        return Place(f"double_blocks.{match[1]}.{name}", part)
    if match := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", module):
        name, part = SINGLE_BLOCK[match[2]]
        return Place(f"single_blocks.{match[1]}.{name}", part)
    if match := re.fullmatch(r"(distilled_guidance_layer\.layers\.\d+)\.(.+)", module):
        return Place(f"{match[1]}.{APPROXIMATOR_LAYER[match[2]]}")
    if re.fullmatch(r"distilled_guidance_layer\.norms\.\d+", module):
        return Place(module)
    if match := re.fullmatch(r"time_text_embed\.(\w+)\.(linear_[12])", module):
        return Place(f"{EMBEDDERS[match[1]]}.{EMBEDDER_LAYER[match[2]]}")
    if module == SWAPPED:
        return Place("final_layer.adaLN_modulation.1", is_swapped=True)
    return Place(*OUTSIDE_BLOCKS[module])


def layers_of(name: str) -> tuple[tuple[str, Place], ...]:
    """Return the diffusers modules that a module name of a LoRA file stands for, with their positions in it.

    Args:
        name: Name without the model's prefix: diffusers', the original one, or either with `_` for `.` and kohya's
            prefix.
    Returns:
        Several modules for a fused one, in the order of their rows; () if the name is none of Chroma or Flux.
    """
    if name.startswith(KOHYA_PREFIX):
        return _layers_of_kohya(name)
    for kind, (original_kind, table) in BLOCKS.items():
        if match := re.fullmatch(rf"{kind}\.(\d+)\.(.+)", name):
            return ((name, Place(name)),) if match[2] in table else ()
        if match := re.fullmatch(rf"{original_kind}\.(\d+)\.(.+)", name):
            rows = JOINED_ROWS.get(match[2])
            layers = [(leaf, part) for leaf, (original, part) in table.items() if original == (rows or match[2])]
            layers = layers[:3] if rows else layers
            return tuple((f"{kind}.{match[1]}.{leaf}", Place(name, part)) for leaf, part in layers)
    diffusers = OUTSIDE_NAMES.get(name, name)
    if match := re.fullmatch(r"(distilled_guidance_layer\.layers\.\d+)\.(in_layer|out_layer)", name):
        diffusers = f"{match[1]}.{'linear_1' if match[2] == 'in_layer' else 'linear_2'}"
    try:
        place = original_place(diffusers)
    except KeyError:
        return ()
    return ((diffusers, Place(name, is_swapped=place.is_swapped and diffusers != name)),)


def _layers_of_kohya(name: str) -> tuple[tuple[str, Place], ...]:
    flat = name.removeprefix(KOHYA_PREFIX)
    for kind, (original_kind, table) in BLOCKS.items():
        for start, leaves in ((original_kind, {leaf for leaf, _ in table.values()} | {*JOINED_ROWS}), (kind, {*table})):
            if match := re.fullmatch(rf"{start}_(\d+)_(.+)", flat):
                leaf = next((leaf for leaf in leaves if leaf.replace(".", "_") == match[2]), "")
                return layers_of(f"{start}.{match[1]}.{leaf}")
    if match := re.fullmatch(r"distilled_guidance_layer_layers_(\d+)_(in_layer|out_layer|linear_1|linear_2)", flat):
        return layers_of(f"distilled_guidance_layer.layers.{match[1]}.{match[2]}")
    return next((layers_of(outside) for outside in _outside_names() if outside.replace(".", "_") == flat), ())


def _outside_names() -> tuple[str, ...]:
    return (*OUTSIDE_NAMES, *OUTSIDE_NAMES.values())


def original_parameter(parameter: str) -> tuple[str, Place]:
    """Return a diffusers parameter's original name and position. There, a norm's parameter is called `scale`."""
    module, _, leaf = parameter.rpartition(".")
    place = original_place(module)
    is_norm = module.rpartition(".")[2].startswith("norm_") or ".norms." in module
    return f"{place.module}.{'scale' if is_norm else leaf}", place
