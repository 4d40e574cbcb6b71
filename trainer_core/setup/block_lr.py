"""Per-block learning rates: train some layers more slowly, faster or not at all. Does not need torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.adapter import block_rules
from ..errors import Problem, UserError

FIELD = "block_lr"
NUM_SHOWN = 3


def rates_of(names: Sequence[str], text: str) -> dict[str, float]:
    """Return each layer's learning rate factor. If several rules match a layer, the last one counts. 0: not trained.

    Args:
        names: Names of the trained layers.
        text: The rules.
    Raises:
        UserError: A rule matches no trained layer, or all factors are 0.
    """
    rates = dict.fromkeys(names, 1.0)
    problems = []
    for rule in block_rules(text):
        fitting = [name for name in names if rule.matches(name)]
        rates.update(dict.fromkeys(fitting, rule.factor))
        if not fitting:
            examples = ", ".join(names[:: max(1, len(names) // NUM_SHOWN)][:NUM_SHOWN])
            problems.append(
                Problem(FIELD, f"{rule.text!r} matches none of the {len(names)} trained layers, such as {examples}")
            )
    if problems:
        raise UserError(problems)
    if not any(rates.values()):
        raise UserError.at(FIELD, "sets the learning rate of every layer to 0, so nothing is trained; leave some out")
    return rates
