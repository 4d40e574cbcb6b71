"""Converters that the tables share: from a value in another trainer's file to a value of a field here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..config.dataset import LARGEST_ASPECT
from ..config.flux import FLAVOURS
from ..config.model import CHROMA_REPOS
from ..errors import UserError
from ..models.loading.locate import is_hub_id
from .option_table import Convert, NothingToSet, NotThere, Values, Wrong

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "")
RENAMED_REPOS = {"lodestones/chroma": "hd", "lodestones/chroma1-hd-flash": "flash"}
MAX_RANK = 512  # of an adapter here
NUM_BLOCKS = 57  # of Chroma and Flux
FAMILIES = "there is chroma and flux"  # what can be trained
MEMBER = re.compile(r"(\d+)\s*[xX*,]\s*(\d+)")


def number(value: Any, others: Mapping[str, Any] | None = None) -> float:
    """Return a number, which may be written as a text: PyYAML reads 1e-4 as one."""
    try:
        result = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise Wrong(f"{shorten(value)} is not a number")
    return result


def whole(value: Any, others: Mapping[str, Any] | None = None) -> int:
    result = number(value)
    if result != int(result):
        raise Wrong(f"{shorten(value)} is not a whole number")
    return int(result)


def flag(value: Any, others: Mapping[str, Any] | None = None) -> bool:
    text = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or text not in (*TRUE, *FALSE):
        raise Wrong(f"{shorten(value)} is not true or false")
    return text in TRUE


def text(value: Any, others: Mapping[str, Any] | None = None) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Wrong(f"{shorten(value)} is not a text")
    return str(value)


def is_off(value: Any) -> bool:
    """Return whether a value says that an option is not used."""
    return value in (None, False, 0, 0.0) or value in ("", [], {}) or str(value).strip().lower() in FALSE


def unless_zero(value: Any, others: Mapping[str, Any]) -> int:
    result = whole(value)
    if result <= 0:
        raise NothingToSet("0, not used")
    return result


def one_of(values: Mapping[str, Any], instead: str = "") -> Convert:
    """Return a converter of names. A name that is not in the map has no equivalent.

    Args:
        values: their name in lower case -> value here, or NothingToSet.
        instead: what is used for other names.
    """

    def convert(value: Any, others: Mapping[str, Any]) -> Any:
        name = text(value).strip().lower()
        if name not in values:
            raise NotThere(instead or f"not there; there is {', '.join(dict.fromkeys(map(str, values.values())))}")
        result = values[name]
        if isinstance(result, (NothingToSet, NotThere)):
            raise result
        return result

    return convert


def same(*names: str, instead: str = "") -> Convert:
    return one_of({name: name for name in names}, instead)


def if_on(result: Any, off: str = "off") -> Convert:
    """Return a converter of a switch: the value where it is on, nothing to set where it is off."""

    def convert(value: Any, others: Mapping[str, Any]) -> Any:
        if not flag(value):
            raise NothingToSet(off)
        return result

    return convert


def cfg_scale(value: Any, others: Mapping[str, Any]) -> float:
    return max(1.0, number(value))


def betas(value: Any, others: Mapping[str, Any]) -> Values:
    """Return beta1 and beta2 of a pair, a list or a text such as "0.9,0.99"."""
    parts = value if isinstance(value, list) else re.findall(r"[\d.eE+-]+", str(value))
    if len(parts) < 2:
        raise Wrong(f"{shorten(value)} is not a pair of numbers")
    names = ("beta1", "beta2", "beta3")
    return Values({name: number(part) for name, part in zip(names, parts[:3], strict=False)})


def all_linears(value: Any, others: Mapping[str, Any]) -> Values:
    """Return the targets of trainers that have no choice of them."""
    return Values({"targets": "ai-toolkit"}, "all Linears of the blocks")


def alpha_of_rank(rank_option: str, usual_rank: int, kind_option: str = "") -> Convert:
    """Return a converter of alpha that says how the update is scaled.

    A LoKr of a rank above MAX_RANK has whole matrices there, which alpha does not scale.

    Args:
        rank_option: their name of the rank.
        usual_rank: the rank where it is not set.
        kind_option: their name of the kind of adapter; "" if it is never a LoKr.
    """

    def convert(value: Any, others: Mapping[str, Any]) -> Values:
        alpha, rank = number(value), number(others.get(rank_option) or usual_rank)
        if rank > MAX_RANK:
            is_whole = str(others.get(kind_option, "")).lower() == "lokr"
            note = "whole matrices there, which it does not scale" if is_whole else f"for a rank of {MAX_RANK}"
            return Values({"alpha": 0.0 if is_whole else round(alpha * MAX_RANK / rank, 2)}, note)
        is_scaled = alpha < rank != 0
        note = f"the update is scaled by {alpha / rank:.3g}, as there; keep the learning rate" if is_scaled else ""
        return Values({"alpha": alpha}, note)

    return convert


def blocks_to_swap(value: Any, others: Mapping[str, Any]) -> Values:
    """Return the share of the blocks that are offloaded, of a number of blocks."""
    count = unless_zero(value, others)
    share = min(1.0, max(0.01, round(count / NUM_BLOCKS, 2)))
    return Values({"group_offload": "block", "offload_share": share}, f"{count} of {NUM_BLOCKS} blocks")


def shuffled_tags(value: Any, others: Mapping[str, Any]) -> Values:
    if not flag(value):
        raise NothingToSet("off")
    return Values({"tag_orders": 8}, "8 orders of each caption, made once")


def bucketed(value: Any, others: Mapping[str, Any]) -> str:
    return "preserve" if flag(value) else "square"


def often(value: Any, others: Mapping[str, Any]) -> Values:
    """Return the share of mirrored images of a switch that mirrors half of them."""
    if not flag(value):
        raise NothingToSet("off")
    return Values({"flip": 0.5}, "half of the time")


def huber_loss(value: Any, others: Mapping[str, Any]) -> Values:
    """Return the loss of kohya and SimpleTuner by its name."""
    losses = {"l2": "mse", "mse": "mse", "l1": "mae", "mae": "mae", "huber": "huber", "smooth_l1": "huber"}
    name = text(value).strip().lower()
    if name not in losses:
        raise NotThere("not there; mse is used")
    notes = {
        "huber": "with the same huber_c at all noise levels",
        "smooth_l1": "the same up to a factor, which does not change the steps of Adam",
    }
    return Values({"loss": losses[name]}, notes.get(name, ""))


def huber_option(name: str, convert: Convert) -> Convert:
    """Return a converter of an option of the Huber loss, where that is the loss.

    Args:
        name: their option with the loss.
        convert: converts the option.
    """

    def convert_used(value: Any, others: Mapping[str, Any]) -> Any:
        if str(others.get(name)).lower() not in ("huber", "smooth_l1"):
            raise NothingToSet("of a loss that is not used")
        return convert(value, others)

    return convert_used


def huber_schedule(value: Any, others: Mapping[str, Any]) -> Any:
    if text(value).lower() == "constant":
        raise NothingToSet("constant, as here")
    raise NotThere("not there; huber_c is the same at all noise levels")


def aspect_list(value: Any) -> str:
    """Return aspect ratios, a list of width / height or of [width, height], as `aspects` takes them."""
    aspects = []
    for item in value if isinstance(value, list) else []:
        pair = item if isinstance(item, list) and len(item) > 1 else [item, 1]
        aspect = number(pair[0]) / (number(pair[1]) or 1)
        if not 1 / LARGEST_ASPECT <= aspect <= LARGEST_ASPECT:
            raise NotThere(f"{shorten(item)} is not an aspect ratio from 1:4 to 4:1; the nearest bucket is used")
        aspects.append(f"{aspect:.6g}")
    return ", ".join(dict.fromkeys(aspects))


def table_file(value: Any, others: Mapping[str, Any]) -> Values:
    return Values({"table": file_name(value), "captions": "table"}, "by its name in the image folder")


def prompt_text(prompts: Sequence[str], label: str, keeps_copies: bool = False) -> str:
    """Return prompts as ValidateSampler takes them: one a line, or a library where lines would be read differently.

    Args:
        prompts: at least one.
        label: what a prompt is called in a library.
        keeps_copies: make a library of prompts of which two are equal.
    """
    named = {f"{label} {i + 1}": prompt for i, prompt in enumerate(prompts)}
    is_library = prompts[0].startswith("{") or (keeps_copies and len(set(prompts)) < len(prompts))
    return json.dumps(named, ensure_ascii=False) if is_library else "\n".join(prompts)


def refuse(file: str, option: str, value: Any, wanted: str) -> UserError:
    """Return the error about a model or a kind of training that is not there."""
    return UserError.at(f"{file}: {option}", f"{shorten(value)} can't be trained here; {wanted}")


def model_file(field: str, none: str = "") -> Convert:
    """Return a converter of the path of a model file: its name, as ComfyUI's folders list it."""

    def convert(value: Any, others: Mapping[str, Any]) -> Values:
        name = file_name(value)
        if not name:
            raise NothingToSet(none or "empty")
        if not name.lower().endswith(".safetensors"):
            raise NotThere("is not a .safetensors file; the flavour's own file is used")
        return Values({field: name}, "by its name in ComfyUI's models folders")

    return convert


def file_name(value: Any) -> str:
    """Return the last part of a path of any system."""
    return PurePosixPath(text(value).strip().replace("\\", "/")).name


def base_model(family: Callable[[Mapping[str, Any]], str]) -> Convert:
    """Return a converter of the base model: a repository, a folder, or a file of the transformer."""

    def convert(value: Any, others: Mapping[str, Any]) -> Values:
        name = text(value).strip()
        if not name:
            raise NothingToSet("empty: by flavour")
        if name.lower().endswith((".safetensors", ".sft")):
            flavour = guess_flavour(name, family(others))
            values = {"diffusion_model": file_name(name), **({"flavour": flavour} if flavour else {})}
            return Values(values, "by its name in models/diffusion_models")
        flavour = flavour_of_repo(name, family(others))
        if flavour:
            return Values({"flavour": flavour}, "" if name.lower() not in RENAMED_REPOS else "its release is used")
        if is_hub_id(name) and not name.startswith((".", "/", "~")):
            return Values({"diffusion_model": name}, "its transformer; the other parts come from the flavour")
        return Values({"folder": file_name(name)}, "by its name in models/diffusers")

    return convert


def flavour_of_repo(name: str, family: str) -> str:
    """Return the flavour whose Hugging Face repository this is, "" if none."""
    repos = CHROMA_REPOS if family == "chroma" else {flavour: rules.repo for flavour, rules in FLAVOURS.items()}
    known = {repo.lower(): flavour for flavour, repo in repos.items()}
    return known.get(name.lower(), RENAMED_REPOS.get(name.lower(), "") if family == "chroma" else "")


def guess_flavour(name: str, family: str) -> str:
    """Return the flavour that a file's name contains; without one, the usual flavour of such files."""
    flavours = CHROMA_REPOS if family == "chroma" else FLAVOURS
    lower = file_name(name).lower()
    usual = "hd" if family == "chroma" else "dev"
    return next((flavour for flavour in flavours if flavour != "dev" and flavour in lower), usual)


def substrings(value: Any, others: Mapping[str, Any]) -> str:
    """Return patterns for names that contain one of these texts."""
    words = value if isinstance(value, list) else text(value).split(",")
    patterns = []
    for word in words:
        word = text(word).strip().removeprefix("transformer.").strip("*")
        if word and not re.fullmatch(r"[\w.\-]+", word):
            raise NotThere(f"{shorten(word)} is not part of a layer's name; the default targets are used")
        patterns += [f"*{word}*"] if word else []
    if not patterns:
        raise NothingToSet("empty: all layers of the default")
    return ",".join(patterns)


def sizes(value: Any, others: Mapping[str, Any]) -> Values:
    """Return image sizes: 1024, 1024x768 or megapixels such as 1.0, several with commas."""
    parts, rounded = [], False
    for part in filter(None, (part.strip() for part in text(value).split(","))):
        match = MEMBER.fullmatch(part)
        edges = [int(edge[:6]) for edge in match.groups()] if match else [_edge(number(part))] * 2
        fixed = [round_edge(edge) for edge in edges]
        rounded |= fixed != edges
        parts.append(f"{fixed[0]}x{fixed[1]}")
    if not parts:
        raise NothingToSet("empty")
    return Values({"resolutions": ", ".join(parts)}, "rounded to multiples of 16" if rounded else "")


def round_edge(edge: float) -> int:
    """Return the nearest size of an image's edge that can be sampled."""
    return min(max(round(edge / 16) * 16, 16), 8192)


def _edge(size: float) -> int:
    return round(min(abs(size), 1e5)) if size > 16 else round(abs(size * 1e6) ** 0.5 / 64) * 64


def pairs(value: Any) -> dict[str, str]:
    """Return `key=value` arguments as a dict: a list of texts, or one text with spaces."""
    words: Sequence[Any] = value if isinstance(value, list) else str(value or "").split() if value is not True else ()
    split = (str(word).strip().strip("\"'").partition("=") for word in words)
    return {name.strip(): rest.strip() for name, equals, rest in split if equals}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one dict with dots in the names. Lists stay."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat.update(flatten(item, f"{name}.") if isinstance(item, dict) and item else {name: item})
    return flat


def shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "torch-adamw": "adamw",
    "adamw_bf16": "adamw_bf16",
    "adamw8bit": "bnb-adamw8bit",
    "adamw_8bit": "bnb-adamw8bit",
    "adam8bit": "bnb-adamw8bit",
    "adam_8bit": "bnb-adamw8bit",
    "pagedadamw8bit": "bnb-adamw8bit",
    "bnb-adamw8bit": "bnb-adamw8bit",
    "bnb-adamw8bit-paged": "bnb-adamw8bit",
    "ademamix_8bit": "bnb-ademamix8bit",
    "ademamix8bit": "bnb-ademamix8bit",
    "bnb-ademamix8bit": "bnb-ademamix8bit",
    "bnb-ademamix8bit-paged": "bnb-ademamix8bit",
    "lion": "optimi-lion",
    "optimi-lion": "optimi-lion",
    "lion_8bit": "bnb-lion8bit-paged",
    "lion8bit": "bnb-lion8bit-paged",
    "pagedlion8bit": "bnb-lion8bit-paged",
    "bnb-lion8bit": "bnb-lion8bit-paged",
    "bnb-lion8bit-paged": "bnb-lion8bit-paged",
    "optimi-adamw": "adamw",
    "adamw_optimi": "adamw",
    "optimi-stableadamw": "optimi-stableadamw",
    "stableadamw": "optimi-stableadamw",
    "adamw8bitkahan": "bnb-adamw8bit",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
    "came": "came",
    "adamwschedulefree": "schedulefree-adamw",
    "schedulefree-adamw": "schedulefree-adamw",
    "schedule_free_adamw": "schedulefree-adamw",
    "optimi-adamw-schedulefree": "schedulefree-adamw",
    "torch-adafactor": "adafactor",
    "schedulefreewrapper": "schedulefree-adamw",
    "adafactor_dpm": "adafactor",
}
optimizer = one_of(OPTIMIZERS, "not there; adamw is used, at the same learning rate")
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
    "cosine": "cosine",
    "linear": "linear",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "warmup_stable_decay": "wsd",
    "cosine_annealing": "cosine",
    "cosine_annealing_with_restarts": "cosine_with_restarts",
    "cosineannealinglr": "cosine",
    "cosine_with_hard_restarts": "cosine_with_restarts",
    "none": "constant",
}
schedule = one_of(SCHEDULES, "not there; the learning rate stays constant")
PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "bfloat_16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "float_16": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
    "float_32": "fp32",
    "no": "fp32",
    "float": "fp32",
}
precision = one_of(PRECISIONS, "not there; there is bf16, fp16 and fp32")
ATTENTION = {
    "diffusers": "native",
    "sdpa": "native",
    "torch": "native",
    "default": "native",
    "native": "native",
    "cudnn": "cudnn",
    "native-efficient": "efficient",
    "native-flash": "flash",
    "native-math": "math",
    "flash": "flash",
    "flash-attn": "flash",
    "flash-attn-2": "flash",
    "math": "math",
    "efficient": "efficient",
    "cross_attention": "native",
}
attention = one_of(ATTENTION, "not there in training; torch's kernels are used")
