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


def original_parameter(parameter: str) -> tuple[str, Place]:
    """Return a diffusers parameter's original name and position. There, a norm's parameter is called `scale`."""
    module, _, leaf = parameter.rpartition(".")
    place = original_place(module)
    is_norm = module.rpartition(".")[2].startswith("norm_") or ".norms." in module
    return f"{place.module}.{'scale' if is_norm else leaf}", place
