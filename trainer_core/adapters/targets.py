"""Select the layers to train, by preset name or by patterns of module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from ..errors import Problem, UserError, nearest

if TYPE_CHECKING:
    from torch import nn

FIELD = "targets"
NUM_NEAR = 3


class Adaptable(Protocol):
    """The part of a model family that defines which layers may be trained. See models/lora_targets.py."""

    @property
    def frozen(self) -> tuple[str, ...]: ...

    @property
    def whole(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def targets(self) -> Mapping[str, tuple[str, ...]]: ...


def resolve_targets(transformer: nn.Module, family: Adaptable, text: str, is_full: bool = False) -> list[str]:
    """Return the full names of the layers to train, in model order. See choose_layers."""
    from torch import nn

    if is_full:
        parts = transformer.named_modules()
        names = [name for name, part in parts if next(part.parameters(recurse=False), None) is not None]
    else:
        names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return choose_layers(names, family, text, is_full)


def choose_layers(names: Sequence[str], family: Adaptable, text: str, is_full: bool = False) -> list[str]:
    """Select the layers to train, in the order of names. Does not need torch.

    Args:
        names: Full names of all Linear layers of the model; with kind full of all layers with parameters.
        family: The model family.
        text: Names of presets or patterns of full module names, separated by commas, spaces or line breaks. `*` matches
            anything, dots included. A pattern matches the whole name: `proj_out` is only the final projection,
            `*.proj_out` are those of the blocks.
        is_full: The model itself is trained (kind full). Norms, convolutions and what no LoRA trains can be named.
    Raises:
        UserError: Patterns match no layer. Lists all of them, each with the most similar names.
    """
    presets = {**family.targets, **family.whole} if is_full else family.targets
    if not is_full:
        names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in family.frozen)]
    words = [word for word in re.split(r"[,\s]+", text) if word]
    if not words:
        raise UserError.at(FIELD, f"is empty; use one of {', '.join(presets)}, or patterns of module names")
    problems: list[Problem] = []
    chosen: set[str] = set()
    for word in words:
        for pattern in presets.get(word, (word,)):
            matches = [name for name in names if fnmatchcase(name, pattern)]
            chosen.update(matches)
            if not matches:
                problems.append(Problem(FIELD, _no_match(word, pattern, names, family, presets)))
    if problems:
        raise UserError(problems)
    return [name for name in names if name in chosen]


def _no_match(
    word: str, pattern: str, names: Sequence[str], family: Adaptable, presets: Mapping[str, tuple[str, ...]]
) -> str:
    if word != pattern:
        return f"{word!r} needs {pattern}, which this model does not have; {_near(pattern, names)}"
    if presets is family.targets:  # not kind full
        if word in family.whole:
            return (
                f"{word!r} names layers that only kind full of AdapterSettings trains ({', '.join(family.whole[word])})"
            )
        if any(fnmatchcase(pattern, frozen) for frozen in family.frozen):
            return f"{word!r} names layers that only kind full of AdapterSettings trains ({', '.join(family.frozen)})"
    return f"{word!r} matches no layer{nearest(word, tuple(presets))}; {_near(pattern, names)}"


def _near(pattern: str, names: Sequence[str]) -> str:
    """List similar names. Block numbers become `*`, because a list of 57 numbered names is not helpful."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names))
    generic_pattern = re.sub(r"\.\d+\.", ".*.", pattern, count=1)
    by_end = [kind for kind in kinds if kind.endswith("." + generic_pattern.lstrip("*."))]
    near = by_end or difflib.get_close_matches(generic_pattern, kinds, n=NUM_NEAR, cutoff=0.3) or kinds
    return f"similar names: {', '.join(near[:NUM_NEAR])}"
