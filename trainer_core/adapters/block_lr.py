"""Learning rates by block: which layers learn slower, faster or not at all. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..config.adapter import block_rules
from ..errors import Problem, UserError

FIELD = "block_lr"
NUM_SHOWN = 3


def rates_of(names: Sequence[str], text: str) -> dict[str, float]:
    """Each layer's factor of the learning rate; where several rules fit, the last one counts. 0: it does not learn.

    Raises:
        UserError: a rule fits no layer that is trained, or nothing is left to train.
    """
    rates = dict.fromkeys(names, 1.0)
    problems = []
    for rule in block_rules(text):
        fitting = [name for name in names if any(_fits(name, pattern) for pattern in rule.patterns)]
        rates.update(dict.fromkeys(fitting, rule.factor))
        if not fitting:
            shown = ", ".join(names[:: max(1, len(names) // NUM_SHOWN)][:NUM_SHOWN])
            problems.append(
                Problem(FIELD, f"{rule.text!r} fits none of the {len(names)} layers that learn, such as {shown}")
            )
    if problems:
        raise UserError(problems)
    if not any(rates.values()):
        raise UserError.at(FIELD, "gives every layer a rate of 0, so that nothing learns; leave some out")
    return rates


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
