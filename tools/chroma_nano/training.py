"""What both trainings share: a budget of minutes, its learning rate, an average of the weights, and checkpoints."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WARMUP_STEPS = 100
SAVE_EVERY_S = 90.0


@dataclass
class Budget:
    """How far a training is: by steps where `steps` is given (repeatable to the bit), else by the minutes it has run.

    Args:
        minutes: length of the whole training, pauses between sessions not counted.
        steps: length in steps; 0: by minutes.
        spent_s: seconds of earlier sessions.
    """

    minutes: float
    steps: int = 0
    spent_s: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self.began

    def fraction(self, step: int) -> float:
        return min(1.0, step / self.steps if self.steps else self.seconds() / (60 * self.minutes))

    def rate(self, step: int) -> float:
        """1 after a linear warm-up, then down to 0.02 along a cosine."""
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * self.fraction(step))) / 2
        return min(1.0, (step + 1) / WARMUP_STEPS) * cosine


class Average:
    """Exponential moving average of parameters: e <- d e + (1 - d) p, d rising to `decay` as steps go by."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update_(self, step: int) -> None:
        d = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.model.named_parameters():
            self.values[name].lerp_(p, 1 - d)


class Checkpoint:
    """Model, average, optimiser and step in one safetensors file, written beside and renamed over the old one."""

    def __init__(self, file: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer):
        self.file, self.model, self.average, self.optimizer = file, model, average, optimizer
        self.saved_at = time.monotonic()

    @classmethod
    def opened(cls, file: Path, model: nn.Module) -> Checkpoint:
        """For reading alone."""
        return cls(file, model, Average(model, 0.0), torch.optim.SGD(model.parameters()))

    def save(self, step: int, seconds: float, log: list[dict]) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v.contiguous() for k, v in self.average.values.items()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        partial = self.file.with_suffix(".partial")
        save_file(
            {k: v.detach().clone().contiguous() for k, v in tensors.items()},
            partial,
            {"step": str(step), "seconds": str(seconds)},
        )
        partial.replace(self.file)
        self.file.with_suffix(".log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at > SAVE_EVERY_S

    def load(self) -> tuple[int, float, list[dict]]:
        """(step, seconds, log) of the newest state, (0, 0, []) if there is none."""
        if not self.file.is_file():
            return 0, 0.0, []
        tensors = load_file(self.file)
        with safe_metadata(self.file) as metadata:
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
        self.model.load_state_dict(part(tensors, "model."))
        self.average.values = part(tensors, "average.")
        for name, p in self.model.named_parameters():
            state = {
                k: tensors[f"optimizer.{k}.{name}"]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{k}.{name}" in tensors
            }
            if state:
                self.optimizer.state[p] = state
        return step, seconds, json.loads(self.file.with_suffix(".log.json").read_text(encoding="utf-8"))


class safe_metadata:
    """The metadata of a safetensors file, as a context."""

    def __init__(self, file: Path):
        from safetensors import safe_open

        self.opened = safe_open(str(file), framework="pt")

    def __enter__(self) -> dict[str, str]:
        return self.opened.__enter__().metadata()

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(*error)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Random numbers of one step of one purpose: nothing depends on what ran before."""
    mixed = (seed * 1_000_003 + sum(ord(c) * 31**i for i, c in enumerate(purpose)) * 7919 + step) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def say(text: object) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)
