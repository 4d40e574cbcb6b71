"""The blocks of the model that a layer belongs to, and strengths by block."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..adapters.files.keys import BLOCKS, layers_of
from ..config.adapter import BlockRule, block_rules
from ..errors import UserError

OUTSIDE = "outside"
ORIGINAL = {original: kind for kind, (original, _) in BLOCKS.items()}


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
        rules = _rules(text)
    except ValueError as error:
        raise UserError.at(field, str(error)) from error
    for rule in rules:
        values.update(dict.fromkeys([name for name in values if rule.matches(name)], rule.factor))
    return values


def unmatched(names: Iterable[str], text: str) -> list[str]:
    """Return the rules that match no layer."""
    layers = list(names)
    return [rule.text for rule in _rules(text) if not any(rule.matches(name) for name in layers)]


def _rules(text: str) -> list[BlockRule]:
    return block_rules(re.sub(r"\b(double_blocks|single_blocks)\b", lambda match: ORIGINAL[match[1]], text))
