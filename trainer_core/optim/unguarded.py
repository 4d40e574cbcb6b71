"""torch's optimisers without the guards that keep its compiler out of them.

The guards load the compiler, 1.5 to 2 s and 800 modules, to tell it to stay away. Here it never looks at an optimiser: what is
compiled are blocks. The functions are torch's own; where a version of it has no guard, inspect.unwrap gives what it gets.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


class Unguarded(Optimizer):
    """Goes before torch's class among the bases."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Unguarded, torch.optim.AdamW):
    """torch's, to the bit. Not differentiable itself, so that its step is taken without gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _ADAMW_STEP(self, closure)


_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)
