"""Counts the operators of a step that compute or copy, as torch dispatches them: about the kernels that a GPU would launch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch nothing, beside views.
IDLE = frozenset(
    [
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "detach",
        "alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
        "_local_scalar_dense",
        "is_same_size",
        "resolve_conj",
    ]
)


class OperatorCounter(TorchDispatchMode):
    """Counts operators by name while it is open. Views, allocations and the read of a number are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in IDLE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
