"""Step each parameter inside of the backward pass, as soon as its gradient is complete.

The gradients of a whole model take as much memory as the model. Here a gradient is used and freed before that of the
next layer is computed, so that only the largest one is ever in memory. Every parameter moves exactly as it would in a
step after the backward pass, because no optimizer that is used here reads more than one parameter at a time (those
that do: config.optimizer.TOGETHER).

Weights in bf16 are converted to fp32 for their step, and rounded stochastically after it: with rounding to the nearest
bf16, a step of less than 1/512 of a weight would be lost. States of the weight's shape, such as a momentum, are stored
and rounded in the same way. The random numbers are a function of (seed, step, parameter, element).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import works_beside
from ..distributed.ranks import ALONE, Ranks
from ..memory.pinned_memory import PinnedMemory
from ..optim.adamw_bf16 import LOW_BITS, round_stochastically
from ..optim.optimizer import Slice, able
from ..seeds import generator


class StepInBackward:
    """Steps the parameters of an optimizer one by one, from hooks on their gradients.

    Args:
        optimizer: Its parameters are stepped. None of config.optimizer.TOGETHER.
        parameters: The same parameters by name. The names are part of the seed of the rounding.
        seed: The run's seed.
        ranks: The processes that train together. Each computes one micro-batch of a step, and all of them step with the
            sum of the gradients.
        slices: Parameters that are a slice of a larger one (sharding.py).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        ranks: Ranks = ALONE,
        slices: Mapping[nn.Parameter, Slice] | None = None,
    ):
        self.optimizer, self.seed, self.ranks = optimizer, seed, ranks
        self._slices = able(optimizer).slices = slices or {}
        self._names = {parameter: name for name, parameter in parameters.items()}
        # Numbers, because a loaded state comes with new groups.
        self._groups = {param: i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._pinned = PinnedMemory()
        self._buffers: dict[nn.Parameter, dict[str, Tensor]] = {}  # of states in RAM
        self._step: int | None = None
        self._scale = 1.0
        # A weak reference: hooks of a parameter that lead back to it would hold the model's memory after the run.
        itself = weakref.ref(self)

        def on_gradient(parameter: Tensor) -> None:
            if (stepper := itself()) is not None:
                stepper._on_gradient(parameter)

        for parameter in parameters.values():
            if parameter.requires_grad:  # others are stepped by offloaded_layer.py
                parameter.register_post_accumulate_grad_hook(on_gradient)

    @contextmanager
    def active(self, step: int, scale: float = 1.0) -> Iterator[None]:
        """While it is open, each parameter is stepped when its gradient is complete, and the gradient is freed.

        Args:
            step: Number of the step, for the rounding.
            scale: Factor of every gradient.
        """
        self._step, self._scale = step, scale
        self.forget_norms()
        try:
            yield
        finally:
            self._step = None

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the last step, before scaling, on their device."""
        norms = [self._norms[parameter] for parameter in self._names if parameter in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms))

    def forget_norms(self) -> None:
        """Free the norms of the last step."""
        self._norms.clear()

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._step is not None:
            assert isinstance(parameter, nn.Parameter)
            self.step_(parameter, self._step, self._scale)

    @torch.no_grad()
    def step_(self, parameter: nn.Parameter, step: int, scale: float = 1.0, gradient: Tensor | None = None) -> None:
        """Step one parameter with its gradient, and free the gradient.

        Args:
            gradient: None: the one in .grad, summed over the ranks. Else it may have another dtype than the parameter,
                and norm() does not include it.
        """
        if gradient is None:
            assert parameter.grad is not None
            gradient = self.ranks.sum_in_order(parameter.grad)
            self._norms[parameter] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        assert gradient is not None
        if parameter.dtype != torch.bfloat16 or able(self.optimizer).rounds_weights:
            gradient = parameter.grad = gradient.to(parameter.dtype)
            if scale != 1.0:
                gradient.mul_(scale)
            self._step_alone_(parameter)
            return
        stored, parameter.grad = parameter.data, None
        gradient = gradient.float()
        if scale != 1.0:
            gradient.mul_(scale)
        parameter.data = stored.float()
        try:
            self._widen_states_(parameter)
            parameter.grad = gradient
            del gradient
            self._step_alone_(parameter)
            self._narrow_states_(parameter, step)
            stored.copy_(self._round(parameter.data, parameter, step, "weight"))
        finally:
            parameter.data, parameter.grad = stored, None

    def step_copy_(self, home: nn.Parameter, copy: nn.Parameter, gradient: Tensor) -> None:
        """Step a copy of a parameter on the device, in the step that is active.

        Its large states come from RAM and go back.

        Args:
            home: The parameter, in RAM. The caller copies the result there.
            copy: Its copy on the device.
            gradient: Its gradient there, which is freed.
        """
        assert self._step is not None
        states = self.optimizer.state
        self._names[copy], self._groups[copy] = self._names[home], self._groups[home]
        stored = dict(states.pop(home, {}))
        if stored:
            states[copy] = {name: self._on_device(value, copy) for name, value in stored.items()}
        copy.grad = gradient
        try:
            with able(self.optimizer).standing_in(copy, home):
                self.step_(copy, self._step, self._scale)
            self._norms[home] = self._norms.pop(copy)
        finally:
            del self._names[copy], self._groups[copy]
            stepped = states.pop(copy, {})
            states[home] = {name: self._at_home(value, home, name) for name, value in stepped.items()}

    def _on_device(self, value: Any, copy: nn.Parameter) -> Any:
        """Return a state where the optimizer expects it. Steps are counted on the device by fused kernels alone."""
        if not isinstance(value, Tensor):
            return value
        is_fused = self.optimizer.param_groups[self._groups[copy]].get("fused")
        return value.to(copy.device, non_blocking=True) if value.ndim or is_fused else value

    def _at_home(self, value: Any, home: nn.Parameter, name: str) -> Any:
        """Return a state where it waits for the next step: in RAM if it is as large as the parameter."""
        if not isinstance(value, Tensor) or value.numel() < max(2, home.numel()):
            return value
        buffers = self._buffers.setdefault(home, {})
        if name not in buffers or (buffers[name].dtype, buffers[name].shape) != (value.dtype, value.shape):
            is_pinned = works_beside(value.device)
            buffers[name] = self._pinned.empty(value) if is_pinned else torch.empty_like(value, device="cpu")
        return buffers[name].copy_(value, non_blocking=works_beside(value.device))

    def _step_alone_(self, parameter: nn.Parameter) -> None:
        """Let the optimizer see this parameter alone. It would look at all of them for each one."""
        groups = self.optimizer.param_groups
        lists = [group["params"] for group in groups]
        for i, group in enumerate(groups):
            group["params"] = [parameter] if i == self._groups[parameter] else []
        try:
            self.optimizer.step()
        finally:
            for group, params in zip(groups, lists, strict=True):
                group["params"] = params
        parameter.grad = None

    def _widen_states_(self, parameter: nn.Parameter) -> None:
        """Convert the states of the weight's shape to fp32."""
        for name, value in self._large_states(parameter, torch.bfloat16):
            self.optimizer.state[parameter][name] = value.float()

    def _narrow_states_(self, parameter: nn.Parameter, step: int) -> None:
        """Round the states of the weight's shape to bf16."""
        for name, value in self._large_states(parameter, torch.float32):
            self.optimizer.state[parameter][name] = self._round(value, parameter, step, name)

    def _large_states(self, parameter: nn.Parameter, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        values: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        return [
            (name, value)
            for name, value in values.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == dtype
        ]

    def _round(self, value: Tensor, parameter: nn.Parameter, step: int, part: str) -> Tensor:
        """Round fp32 to bf16, with noise that is generated on the tensor's device."""
        source = generator(self.seed, "rounding", step, self._names[parameter], part, device=value.device)
        piece = self._slices.get(parameter, Slice(value.numel(), 0))
        noise = torch.empty(piece.numel, dtype=torch.int32, device=value.device)
        noise.random_(0, 1 << LOW_BITS, generator=source)
        return round_stochastically(value, noise[piece.start : piece.start + value.numel()].view(value.shape))
