"""Read a model's config.json, and check the types of the entries that this package uses. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...storage.bounded_files import Unusable, read_json

MAX_BYTES = 16 << 20  # of a JSON file of a model: an index of weights has 0.2 MB
MAX_LAYERS, MAX_SIZE, MAX_LEVELS = 1000, 1 << 24, 16
LAYERS = frozenset({
    "num_layers", "num_single_layers", "num_hidden_layers", "approximator_layers", "layers_per_block",
})  # fmt: skip
SIZES = frozenset({
    "approximator_hidden_dim", "approximator_num_channels", "attention_head_dim", "d_ff", "d_kv", "d_model", "hidden_size",
    "in_channels", "intermediate_size", "joint_attention_dim", "latent_channels", "max_position_embeddings",
    "norm_num_groups", "num_attention_heads", "num_heads", "out_channels", "patch_size", "pooled_projection_dim",
    "relative_attention_max_distance", "relative_attention_num_buckets", "vocab_size",
})  # fmt: skip
NUMBERS = frozenset({"layer_norm_eps", "layer_norm_epsilon", "scaling_factor", "shift_factor"})
FLAGS = frozenset({"guidance_embeds", "mid_block_add_attention", "use_post_quant_conv", "use_quant_conv"})
TEXTS = frozenset({"_class_name", "act_fn", "feed_forward_proj", "hidden_act", "model_type"})
SIZE_LISTS, TEXT_LISTS = (
    frozenset({"axes_dims_rope", "block_out_channels"}),
    frozenset({"down_block_types", "up_block_types"}),
)
NULLABLE = frozenset({"out_channels", "shift_factor", *FLAGS})
_TRANSFORMER = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
REQUIRED = {
    "ChromaTransformer2DModel": _TRANSFORMER,
    "FluxTransformer2DModel": _TRANSFORMER,
    "AutoencoderKL": (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels",
        "scaling_factor",
    ),
    "t5": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"),
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json. Return {} if there is no such file.

    Raises:
        UserError: It is not a JSON object, or of a kind of model that is used, and an entry has another type. All such
            entries are listed.
    """
    config = read_object(path)
    kind = str(config.get("_class_name", config.get("model_type")))
    if kind not in REQUIRED and not kind.startswith("clip"):
        return config
    faults = [fault for name, value in config.items() if (fault := _fault_of(name, value))]
    faults += [f"{name} is missing" for name in REQUIRED.get(kind, ()) if name not in config]
    if faults:
        raise UserError.at(path.name, f"is damaged: {'; '.join(faults)}; download it again ({path})")
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Return {} if there is no such file.

    Raises:
        UserError: The file can't be read, or is not a JSON object.
    """
    try:
        value = read_json(path, MAX_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError.at(path.name, f"can't be read: {error.strerror or error} ({path})") from error
    except Unusable as error:
        raise UserError.at(path.name, f"is not readable JSON: it {error} ({path})") from error
    if not isinstance(value, dict):
        raise UserError.at(path.name, f"is not a JSON object ({path})")
    return value


def _fault_of(name: str, value: Any) -> str:
    for names, is_valid, expected in RULES:
        if name in names and not is_valid(value) and not (value is None and name in NULLABLE):
            return f"{name} is {repr(value)[:60]}, not {expected}"
    return ""


def _is_whole(value: Any, high: int = MAX_SIZE) -> bool:
    return type(value) is int and 1 <= value <= high


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_LEVELS and all(map(is_valid, value))


RULES: tuple[tuple[frozenset[str], Callable[[Any], bool], str], ...] = (
    (LAYERS, lambda value: _is_whole(value, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS}"),
    (SIZES, _is_whole, f"a whole number from 1 to {MAX_SIZE}"),
    (NUMBERS, lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    (FLAGS, lambda value: isinstance(value, bool), "true or false"),
    (TEXTS, _is_text, "a text"),
    (SIZE_LISTS, lambda value: _is_list(value, _is_whole), "a list of whole numbers"),
    (TEXT_LISTS, lambda value: _is_list(value, _is_text), "a list of texts"),
)
