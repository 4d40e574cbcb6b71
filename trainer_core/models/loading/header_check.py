"""Tell from the header of a safetensors file whether it can be a part of the model, and if not, what it is.

It reads no tensors and needs no torch, so that `check` and the nodes can call it. What it does not know is left to
the loading, which compares every key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...storage.gguf.header import BLOCKS, is_gguf
from ...storage.model_header import model_header_of
from ...storage.packed.packed_header import MAX_DESCRIPTION, Unreadable, layers_in_metadata, packed_weights

LATENT_CHANNELS, VAE_LEVELS, NORM_GROUPS = 16, 4, 32  # of Flux's VAE, which Chroma uses too
UNREADABLE_BLOCKS = tuple(name for name in BLOCKS if name.startswith("IQ"))
READABLE = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    *(name for name in BLOCKS if name not in UNREADABLE_BLOCKS),
)
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale", "scale_weight")
BETTER_FILE = (
    "use a bf16, fp8, fp8_scaled, mxfp8, nvfp4, int8 or nf4 file, or a GGUF file of Q4_0 to Q8_0 or Q2_K to Q6_K"
)

# Part of a model -> suffixes of keys, one of which it always has.
ANCHORS = {
    "chroma": ("distilled_guidance_layer.in_proj.weight",),
    "flux": ("double_blocks.0.img_mod.lin.weight", "single_transformer_blocks.0.norm.linear.weight"),
    "radiance": ("nerf_blocks.0.param_generator.weight",),
    "text_encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "vae": ("decoder.conv_in.weight",),
    "clip": ("embeddings.token_embedding.weight",),
}
# Keys of Flux.1 with a guidance embedding, in either layout.
GUIDANCE = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
FAMILY_NAMES = {
    "chroma": "a Chroma transformer",
    "flux": "a Flux.1 transformer",
    "radiance": "a Chroma Radiance transformer",
}
WANTED = {
    **FAMILY_NAMES, "text_encoder": "a T5-XXL text encoder (t5xxl)", "vae": "the VAE of Flux.1 (ae.safetensors)",
    "clip": "a CLIP-L text encoder (clip_l.safetensors)",
}  # fmt: skip
NODES = {"chroma": "LoadChroma", "flux": "LoadFlux", "radiance": "LoadChroma"}
# What a file is -> a pattern of its keys. The first that matches is named.
KINDS: tuple[tuple[str, str], ...] = (
    ("a LoRA", r"\.lora_(A|B|down|up|mid)\.|(^|\.)lora_(unet|te\d?|transformer)_|\.(hada_w1|lokr_w)"),
    ("a ControlNet", r"(^|\.)(controlnet_|control_model\.|input_hint_block\.)"),
    ("a Chroma Radiance transformer", r"(^|\.)(nerf_blocks|nerf_image_embedder|img_in_patch)\."),
    ("a Chroma transformer", r"(^|\.)distilled_guidance_layer\."),
    ("a Flux.2 transformer", r"(^|\.)(double|single)_stream_modulation"),
    ("a Flux.1 transformer", r"(^|\.)double_blocks\.0\.img_mod\.lin\.|(^|\.)single_transformer_blocks\.0\.norm\."),
    ("a HunyuanVideo transformer", r"individual_token_refiner"),
    ("a Stable Diffusion 3 transformer", r"(^|\.)joint_blocks\.0\."),
    ("a Qwen-Image transformer", r"(^|\.)transformer_blocks\.0\.img_mod\.1\."),
    ("a Lumina or Z-Image transformer", r"(^|\.)(cap_embedder|noise_refiner)\."),
    ("a Wan transformer", r"(^|\.)blocks\.0\.cross_attn\."),
    ("an LTX or PixArt transformer", r"(^|\.)adaln_single\."),
    ("a U-Net of Stable Diffusion", r"(^|\.)input_blocks\.0\.0\.|^(unet\.)?down_blocks\.0\.(resnets|attentions)\."),
    ("the text encoder UMT5 (of Wan)", r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias"),
    ("a T5 text encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\."),
    ("a CLIP vision model", r"(^|\.)(vision_model\.|visual\.)"),
    ("a CLIP text encoder", r"embeddings\.token_embedding\.|transformer\.resblocks\.0\."),
    ("a language model (such as Qwen, Gemma, Llama or Mistral)", r"(^|\.)layers\.0\.self_attn\.q_proj\."),
    ("a tiny VAE for previews (TAESD)", r"(^|\.)taesd_|^(decoder|encoder)\.layers\.\d|^(decoder\.)?\d+\.conv\.0\."),
    (
        "a VAE of a video model (such as Wan or Qwen-Image)",
        r"(^|\.)decoder\.(middle\.0\.residual|mid_block\.resnets\.0\.conv1\.conv)",
    ),
    ("a VAE", r"(^|\.)decoder\.conv_in\."),
    ("an upscaler", r"(^|\.)(RRDB|body\.0\.rdb1|conv_first)"),
)  # fmt: skip
VAES = {4: "a VAE of Stable Diffusion 1, 2 or XL", 32: "the VAE of Flux.2"}  # by latent channels


Header = Mapping[str, Any]


def part_fault(files: Sequence[Path], part: str, family: str, config: Mapping[str, Any] | None = None) -> str:
    """Return why files can't be a part of the model, starting with a verb; "" if nothing speaks against it.

    Args:
        files: The part's shards, or one single file, which may also hold other parts.
        part: "transformer", "text_encoder", "vae" or "clip".
        family: "chroma", "flux" or "radiance".
        config: The part's config.json, if there is one.
    """
    header: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for file in files:
        try:
            entries, start = model_header_of(file)
            layers |= layers_in_metadata(entries)
            header |= {
                key: {**entry, "file": file, "start": start} for key, entry in entries.items() if _is_tensor(entry)
            }
        except (OSError, ValueError) as error:
            # Of a safetensors file the loading says what is damaged.
            return str(error) if is_gguf(file) and isinstance(error, ValueError) else ""
    part = family if part == "transformer" else part
    prefix = _prefix(header, ANCHORS[part])
    if prefix is None:
        return _other_kind(header, part)
    own = {key[len(prefix) :]: entry for key, entry in header.items() if key.startswith(prefix)}
    if part == "vae":
        return _vae_fault(own, config or {})
    if part == "clip":
        return _clip_fault(own)
    fault = _t5_fault(own) if part == "text_encoder" else _transformer_fault(own, part)
    own_layers = {name[len(prefix) :]: value for name, value in layers.items() if name.startswith(prefix)}
    return fault or _quantization_fault(own, own_layers)


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("shape"), list) and isinstance(entry.get("dtype"), str)


def family_of_file(file: Path) -> str:
    """Return the family of a transformer in a single file, by its keys; "" if it has none or can't be read."""
    try:
        kind = kind_of(list(model_header_of(file)[0]))
    except (OSError, ValueError):
        return ""
    return next((family for family, name in FAMILY_NAMES.items() if name == kind), "")


def _prefix(header: Header, anchors: Sequence[str]) -> str | None:
    for anchor in anchors:
        for key in header:
            if key == anchor or key.endswith(f".{anchor}"):
                return key[: len(key) - len(anchor)]
    return None


def kind_of(keys: Sequence[str]) -> str:
    """Return what a file with these keys is, such as "a Flux.1 transformer"; "" if it is not known."""
    text = "\n".join(keys)
    return next((name for name, pattern in KINDS if re.search(pattern, text, re.MULTILINE)), "")


def _other_kind(header: Header, part: str) -> str:
    """Return the message about a file without the part's anchor."""
    if part == "text_encoder" and _ends(header, "DenseReluDense.wi.weight"):
        return _t5_fault(header)
    kind = kind_of(list(header))
    if not kind or kind == "a VAE":
        return ""
    other = next((node for name, node in NODES.items() if FAMILY_NAMES[name] == kind and part in NODES), "")
    return f"is {kind}, not {WANTED[part]}" + (f"; use {other} for it" if other else "; choose another file")


def _transformer_fault(own: Header, family: str) -> str:
    """Return why a transformer with the family's anchor is of another family. Radiance has Chroma's anchor too."""
    if family != "chroma" or kind_of(list(own)) != FAMILY_NAMES["radiance"]:
        return ""
    return f"is {FAMILY_NAMES['radiance']}, which works on pixels; choose its file as diffusion_model of LoadChroma"


def _t5_fault(own: Header) -> str:
    if _ends(own, "DenseReluDense.wi.weight") and not _ends(own, "DenseReluDense.wi_0.weight"):
        return (
            "is a text encoder T5 1.0 (such as t5_base of Stable Audio), whose layers differ from those of T5 1.1; use "
            f"{WANTED['text_encoder']}"
        )
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in own:
        return f"is the text encoder UMT5 (of Wan); use {WANTED['text_encoder']}"
    return ""


def _clip_fault(own: Header) -> str:
    if any(".layers.31." in key for key in own):
        return f"is the text encoder CLIP-G (of Stable Diffusion XL or 3); use {WANTED['clip']}"
    return ""


def _vae_fault(own: Header, config: Mapping[str, Any]) -> str:
    shape = own["decoder.conv_in.weight"]["shape"]
    if len(shape) != 4:
        return f"is a VAE of a video model; use {WANTED['vae']}"
    if shape[1] != LATENT_CHANNELS:
        kind = VAES.get(shape[1], "another VAE")
        return f"is {kind}: it has {shape[1]} latent channels instead of {LATENT_CHANNELS}; use {WANTED['vae']}"
    if "encoder.conv_in.weight" not in own:
        return f"has no encoder, only the decoder, so images can't be encoded; use the whole of {WANTED['vae']}"
    levels = {match[1] for key in own if (match := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key))}
    if len(levels) != VAE_LEVELS:
        return (
            f"reduces images by {2 ** (len(levels) - 1)} instead of {2 ** (VAE_LEVELS - 1)} ({len(levels)} levels); "
            f"use {WANTED['vae']}"
        )
    return "" if config.get("norm_num_groups") else _width_fault(own)


def _width_fault(own: Header) -> str:
    """Return why a VAE without config.json can't have the released VAE's norms of 32 groups."""
    pattern = r"encoder\.down(_blocks)?\.\d+\.(block|resnets)\.\d+\.conv1\.weight"
    widths = sorted({entry["shape"][0] for key, entry in own.items() if re.fullmatch(pattern, key)})
    if all(width % NORM_GROUPS == 0 for width in widths):
        return ""
    return (
        f"has layers of {', '.join(map(str, widths))} channels, which {NORM_GROUPS} groups do not divide; put its "
        "config.json (with norm_num_groups) beside it"
    )


def _quantization_fault(own: Header, layers: Mapping[str, Any]) -> str:
    """Return how weights are stored if they can't be read."""
    tensors = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in own.items()}
    try:
        packed = packed_weights(tensors, lambda key: _read_start(own[key]), layers)
        others = {key: entry for key, entry in own.items() if key not in packed}
        storage = _packed_format(others, is_bnb=any(key.type == "4bit-table" for key in packed.values()))
        storage = storage or _scaled_format(others)
    except Unreadable as error:
        storage = str(error)
    return f"is quantized as {storage}, which can't be read here; {BETTER_FILE}" if storage else ""


def _packed_format(own: Header, is_bnb: bool) -> str:
    """Return the format of weights that several tensors describe, by its name; "" if there is none.

    Args:
        own: The tensors without weights that can be read.
        is_bnb: Some of those are of bitsandbytes, and their scales are here.
    """
    ends = {key.rpartition(".")[2] for key in own}
    if not is_bnb and {"absmax", "quant_map"} & ends:
        return "nf4 or fp4 of bitsandbytes"
    if {"wscales", "smooth_factor"} & ends:
        return "int4 of Nunchaku (SVDQuant)"
    if {"qweight", "qzeros"} & ends:
        return "int4 of GPTQ or AWQ"
    return "a format of optimum-quanto" if "_data" in ends else ""


def _scaled_format(own: Header) -> str:
    """Return the format of the first weight whose dtype or scale can't be read; "" if all can."""
    for key, entry in own.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "weight":
            continue
        scale = next((own[f"{module}.{name}"] for name in SCALES if f"{module}.{name}" in own), None)
        is_readable = entry["dtype"] in (FP8 if scale else READABLE)
        if is_readable and (scale is None or _count(scale) in (1, entry["shape"][0])):
            continue
        return _name_format(own, module, entry, scale)
    return ""


def _name_format(own: Header, module: str, weight: Header, scale: Header | None) -> str:
    if f"{module}.weight_scale_2" in own:
        return "nvfp4 (4 bits, one scale for every 16 values)"
    if weight["dtype"] in FP8 and scale:
        inputs, per_row = _count(weight) // weight["shape"][0], _count(scale) // weight["shape"][0]
        block = inputs // per_row if per_row else 0
        if scale["dtype"] in ("U8", "F8_E8M0") and block == 32:
            return "mxfp8 (fp8, one scale for every 32 values)"
        return "fp8 with one scale for each block of a weight"
    names = {"I8": "int8", "U8": "packed values of fewer than 8 bits"}
    name = names.get(weight["dtype"], weight["dtype"])
    return f"{name} of GGUF (a codebook of importance-matrix quantization)" if name in UNREADABLE_BLOCKS else name


def _read_start(entry: Header) -> bytes:
    """Return the first bytes of a tensor that describes a layer; b"" if the file can't be read."""
    try:
        begin, end = entry["data_offsets"]
        with entry["file"].open("rb") as stream:
            stream.seek(entry["start"] + begin)
            return stream.read(min(end - begin, MAX_DESCRIPTION))
    except (OSError, ValueError, TypeError, KeyError):
        return b""


def _count(entry: Header) -> int:
    total = 1
    for length in entry["shape"]:
        total *= length
    return total


def _ends(header: Header, end: str) -> bool:
    return any(key.endswith(end) for key in header)
