"""What the choice of an optimiser costs: bytes a weight, and time a step. `python benchmarks/optimizers.py`

alone   the optimiser's step over a LoRA of the shapes of Chroma's at rank 16 (fewer layers)
steps   whole training steps of the tiny model of models.py, with its far smaller LoRA

All optimisers take turns, step by step, in one process; CPU seconds are compared with adamw's of the same rounds, for
the machine may be busy. On a GPU the step of a 9 billion weight model hides all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.optim.optimizer import OptimizerPart
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.step.loop import train_step
from models import RESULTS, host, model_folder, picture_folder, request, surroundings
from torch import nn

RANK, WIDTH = 16, 3072
LAYERS = ((WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))  # (in, out), of each of the blocks
WARMUP = 3


def chosen() -> dict[str, OptimizerPart]:
    """Those that can run here."""
    parts = {name: load("optimizer", name) for name in names("optimizer")}
    return {name: part for name, part in parts.items() if not part.missing("cpu")}


def lora(num_blocks: int) -> list[nn.Parameter]:
    """The matrices A and B of a LoRA, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for _ in range(num_blocks) for i, o in LAYERS for shape in ((RANK, i), (o, RANK))]
    return [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]


def step_alone(
    part: OptimizerPart, config: OptimizerConfig, num_blocks: int
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """(one step, bytes of weights, gradients and states for each weight)."""
    params = lora(num_blocks)
    optimizer = part.build(params, config, part.usual_rates[0], 0.01, 0)
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = (0.01 * torch.randn(param.shape, generator=generator)).to(param.dtype)

    def bytes_a_weight() -> float:
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        held = [*states, *params, *(param.grad for param in params if param.grad is not None)]
        return sum(t.numel() * t.element_size() for t in held) / sum(param.numel() for param in params)

    return optimizer.step, bytes_a_weight


def whole_step(name: str, part: OptimizerPart, folder: Path) -> Callable[[], Any]:
    """One training step of the tiny model."""
    a_host = host(folder / name)
    wanted = request(model_folder("tiny"), picture_folder(16, 128, mixed=False), 128, learning_rate=part.usual_rates[0])
    run = build_run(plan_run(replace(wanted, optimizer=OptimizerConfig(optimizer=name)), a_host), a_host, PhaseTimer())

    def step() -> None:
        train_step(run, run.config.learning_rate)
        run.step += 1

    return step


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step of each; every round runs each once, and the order turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(WARMUP + rounds):
        for name in order if turn % 2 else order[::-1]:
            began = time.process_time()
            steps[name]()
            if turn >= WARMUP:
                seconds[name].append(time.process_time() - began)
    return {name: median(values) for name, values in seconds.items()}


def measure(num_blocks: int, rounds: int) -> list[dict[str, Any]]:
    parts = chosen()
    alone = {name: step_alone(part, OptimizerConfig(optimizer=name), num_blocks) for name, part in parts.items()}
    alone["adamw_bf16 kahan"] = step_alone(parts["adamw_bf16"], OptimizerConfig(kahan=True), num_blocks)
    seconds = in_turns({name: step for name, (step, _) in alone.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        whole = in_turns({name: whole_step(name, part, Path(folder)) for name, part in parts.items()}, 4 * rounds)
    return [
        {
            "optimizer": name,
            "bytes_a_weight": round(bytes_a_weight(), 2),
            "alone_seconds": round(seconds[name], 5),
            "alone_to_adamw": round(seconds[name] / seconds["adamw"], 2),
            "steps_a_second_to_adamw": round(whole["adamw"] / whole[name], 3) if name in whole else None,
        }
        for name, (_, bytes_a_weight) in alone.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.blocks, arguments.rounds)
    weights = sum(param.numel() for param in lora(arguments.blocks))
    result = {**surroundings(), "weights": weights, "rounds": arguments.rounds, "optimizers": rows}
    (RESULTS / "optimizers.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(*row.values(), sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
