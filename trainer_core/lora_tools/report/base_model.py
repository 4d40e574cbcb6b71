"""Tell from names and shapes which base model a LoRA belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...adapters.files.keys import layers_of
from ...adapters.files.load import DOWNS
from ..reader import LoraReader

WIDTH, DOUBLE, SINGLE = 3072, 19, 38  # of Chroma and Flux.1
CHROMA, FLUX, RADIANCE = "Chroma", "Flux.1", "Chroma Radiance"
EITHER, TINY = "Chroma or Flux.1", "tiny"
# Outputs and inputs of a layer, in multiples of the width. None: another number.
SHAPES: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(
        (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        ),
        (1, 1),
    ),
    "ff.net.0.proj": (4, 1), "ff.net.2": (1, 4), "ff_context.net.0.proj": (4, 1), "ff_context.net.2": (1, 4),
    "proj_mlp": (4, 1), "single proj_out": (1, 5), "norm1.linear": (6, 1), "norm1_context.linear": (6, 1), "norm.linear": (3, 1),
    "x_embedder": (1, None), "context_embedder": (1, None), "proj_out": (None, 1), "norm_out.linear": (2, 1),
}  # fmt: skip
MODULATIONS = re.compile(r"(norm1(_context)?|norm|norm_out)\.linear$|^time_text_embed\.")
# Another model -> a pattern of its module names in LoRA files. The first that matches is named.
OTHERS: tuple[tuple[str, str], ...] = (
    ("Flux.2", r"stream_modulation|to_qkv_mlp_proj|single_transformer_blocks\.\d+\.attn\.to_out|\.ff(_context)?\.linear_(in|out)"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod)"),
    ("HunyuanVideo", r"double_blocks[._]\d+[._](img|txt)_attn_(qkv|proj)$(?<!kohya)|individual_token_refiner"),
    ("HiDream", r"(double|single)_stream_blocks[._]"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d"),
    ("AuraFlow", r"joint_transformer_blocks[._]\d"),
    ("Wan", r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)"),
    ("Lumina or Z-Image", r"(^|[._])(layers[._]\d+[._](attention|feed_forward|adaLN)|(noise|context)_refiner[._]\d)"),
    ("Stable Diffusion (U-Net)", r"(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)[._]"),
    ("a language model", r"(^|[._])layers[._]\d+[._](self_attn|mlp)[._](q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj)"),
    ("LTX-Video, PixArt or another model of its kind", r"transformer_blocks[._]\d+[._]attn[12][._]to_"),
    ("CogVideoX or Mochi", r"transformer_blocks[._]\d+[._]attn1?[._]"),
)  # fmt: skip
CROSS_WIDTHS = {2048: "Stable Diffusion XL", 768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}


@dataclass(frozen=True)
class BaseModel:
    """The base model of a LoRA.

    Attributes:
        name: In words.
        is_ours: Whether it is Chroma or Flux.1, of any size.
        width: Width h of its hidden states, 0 if unknown.
        reason: How this is known.
        unknown: Module names that are no layers of Chroma or Flux.1.
        misshapen: Diffusers' names of layers whose shape fits no Chroma or Flux.1 of this width.
    """

    name: str
    is_ours: bool
    width: int
    reason: str
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def is_released(self) -> bool:
        """Whether the width is that of the released models."""
        return self.is_ours and self.width in (0, WIDTH)


def base_of(lora: LoraReader) -> BaseModel:
    """Return the base model of a LoRA. Reads no tensors."""
    modules = list(lora.groups.parts)
    known = {module: layers for module in modules if (layers := layers_of(module))}
    shapes = {module: shape for module in modules if (shape := _shape(lora, module))}
    other = _other(modules, known, shapes, lora)
    if other:
        return other
    width = _width(known, shapes)
    layers = {name: module for module, places in known.items() for name, _ in places}
    unknown = [module for module in modules if module not in known]
    unknown += [module for name, module in layers.items() if width == WIDTH and _is_beyond(name)]
    misshapen = [
        name
        for name, module in layers.items()
        if width and not _fits(name, len(known[module]), shapes.get(module), width)
    ]
    family, reason = _family(layers, lora.metadata)
    return BaseModel(
        family if width in (0, WIDTH) else f"{family} of width {width}, a model of another size than the released ones",
        True, width, reason, tuple(dict.fromkeys(unknown)), tuple(misshapen),
    )  # fmt: skip


def _other(
    modules: list[str], known: Mapping[str, object], shapes: Mapping[str, tuple[int, int]], lora: LoraReader
) -> BaseModel | None:
    """Return another base model if most layers are none of Chroma or Flux.1."""
    names = [*modules, *lora.groups.unknown]
    strangers = [name for name in names if name not in known]
    if len(known) > len(strangers):
        wide = [shape[0] / shape[1] for name, shape in shapes.items() if name.endswith(("linear1", "_linear1"))]
        if wide and min(wide) >= 9:  # 3 h of queries, keys and values, and 6 h of a gated MLP
            return BaseModel("Flux.2", False, 0, "its single blocks have a gated MLP (9 h rows)")
        return None
    for name, pattern in OTHERS:
        example = next((module for module in strangers if re.search(pattern, module)), None)
        if example:
            return BaseModel(_unet(shapes) if "U-Net" in name else name, False, 0, f"it has layers such as {example}")
    if known or not names:
        return None if known else BaseModel("unknown", False, 0, "it has no layers")
    return BaseModel("unknown", False, 0, f"no name is known here, such as {names[0]}")


def _unet(shapes: Mapping[str, tuple[int, int]]) -> str:
    widths = Counter(shape[1] for name, shape in shapes.items() if re.search(r"attn2[._]to_(k|v)$", name))
    return (
        CROSS_WIDTHS.get(widths.most_common(1)[0][0], "Stable Diffusion (U-Net)")
        if widths
        else "Stable Diffusion (U-Net)"
    )


def _shape(lora: LoraReader, module: str) -> tuple[int, int] | None:
    """Return (out, in) of the weight that a layer of the file changes, from the header; None if it does not say."""
    part = {end: lora.entries[key].shape for end, key in lora.groups.parts[module].items()}
    down = next((part[end] for end in DOWNS if end in part), None)
    ups = [end.replace("lora_A", "lora_B").replace("down", "up") for end in DOWNS]
    up = next((part[end] for end in ups if end in part), None)
    if down and up and len(down) >= 2 and len(up) >= 2:
        return up[0], down[1]
    if ".hada_w1_a" in part and ".hada_w1_b" in part:
        return part[".hada_w1_a"][0], part[".hada_w1_b"][-1]
    edges = [_edges(part, name) for name in ("w1", "w2")]
    if edges[0] and edges[1]:
        return edges[0][0] * edges[1][0], edges[0][1] * edges[1][1]
    return None


def _edges(part: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int] | None:
    whole, a, b = (part.get(f".lokr_{end}") for end in (name, f"{name}_a", f"{name}_b"))
    if whole and len(whole) == 2:
        return whole[0], whole[1]
    return (a[0], b[-1]) if a and b else None


def _multiples(name: str) -> tuple[int | None, int | None]:
    leaf = re.sub(r"^(single_)?transformer_blocks\.\d+\.", "", name)
    is_single = name.startswith("single_") and leaf == "proj_out"
    return SHAPES.get("single proj_out" if is_single else leaf, (None, None))


def _width(known: Mapping[str, tuple], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the width that most layers agree on, 0 if none says."""
    votes: Counter[int] = Counter()
    for module, layers in known.items():
        out, into = shapes.get(module, (0, 0))
        rows, columns = _multiples(layers[0][0])
        if columns and into and into % columns == 0:
            votes[into // columns] += 1
        elif rows and out and len(layers) == 1 and out % rows == 0:
            votes[out // rows] += 1
    return votes.most_common(1)[0][0] if votes else 0


def _fits(name: str, num_parts: int, shape: tuple[int, int] | None, width: int) -> bool:
    if shape is None:
        return True
    rows, columns = _multiples(name)
    fused = {3: 3, 4: 7}.get(num_parts, rows)
    return (not fused or shape[0] == fused * width) and (not columns or shape[1] == columns * width)


def _is_beyond(name: str) -> bool:
    """Return whether the released models have fewer blocks."""
    match = re.match(r"(single_)?transformer_blocks\.(\d+)\.", name)
    return bool(match) and int(match[2]) >= (SINGLE if match[1] else DOUBLE)


def _family(layers: Mapping[str, str], metadata: Mapping[str, str]) -> tuple[str, str]:
    text = " ".join(metadata.get(name, "") for name in ("ss_base_model_version", "modelspec.architecture")).lower()
    if any(name.startswith("distilled_guidance_layer") for name in layers):
        return CHROMA, "it changes the approximator, which only Chroma has"
    if modulation := next((name for name in layers if MODULATIONS.search(name)), ""):
        return FLUX, f"it changes {modulation}, which Chroma does not have"
    if "radiance" in text:
        return RADIANCE, "its metadata says so, and its layers fit"
    if "chroma" in text:
        return CHROMA, "its metadata says so, and its layers fit"
    if "flux" in text:
        return FLUX, "its metadata says so, and its layers fit"
    return EITHER, "these layers have the same names and shapes in both, and the metadata does not say which"
