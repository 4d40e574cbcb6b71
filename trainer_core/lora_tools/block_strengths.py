"""The blocks of the model that a layer belongs to, and strengths by block."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..adapters.files.keys import layers_of
from ..config.adapter import BlockRule, block_rules
from ..errors import UserError

OUTSIDE = "outside"
ORIGINAL = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def block_of(module: str) -> str:
    """Return the block of a module of a file, such as "double 3", "single 12" or "outside"."""
    layers = layers_of(module)
    match = re.match(r"(single_)?transformer_blocks\.(\d+)\.", layers[0][0] if layers else module)
    return f"{'single' if match[1] else 'double'} {match[2]}" if match else OUTSIDE


def strengths(names: Iterable[str], text: str, field: str = "blocks") -> dict[str, float]:
    """Return the strength of each layer, by diffusers' name. If several rules match a layer, the last one counts.

    Args:
        names: Names of the layers.
        text: Rules as in block_lr of AdapterSettings; the original names double_blocks and single_blocks work too.
        field: Field that errors refer to.
    Raises:
        UserError: A rule is malformed, or matches no layer.
    """
    values = dict.fromkeys(names, 1.0)
    try:
        rules = block_rules(re.sub(r"\b(double_blocks|single_blocks)\b", lambda match: ORIGINAL[match[1]], text))
    except ValueError as error:
        raise UserError.at(field, str(error)) from error
    for rule in rules:
        fitting = [name for name in values if _fits(name, rule)]
        values.update(dict.fromkeys(fitting, rule.factor))
    return values


def unmatched(names: Iterable[str], text: str) -> list[str]:
    """Return the rules that match no layer."""
    layers = list(names)
    text = re.sub(r"\b(double_blocks|single_blocks)\b", lambda match: ORIGINAL[match[1]], text)
    return [rule.text for rule in block_rules(text) if not any(_fits(name, rule) for name in layers)]


def _fits(name: str, rule: BlockRule) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in rule.patterns)
