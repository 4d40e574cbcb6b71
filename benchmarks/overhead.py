"""What the trainer adds to a step: our steady step against a bare PyTorch loop over the same model. `python benchmarks/overhead.py`

The bare loop has everything in memory, draws from torch's global state, and does nothing but the mathematics: text
trimmed and no mask, positions computed once, fused AdamW. Both take turns, step by step, in one process; CPU seconds
are compared, for the machine may be busy. Goal: at most 1.05.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from chroma_trainer.trainer_core.adapters.inject import lora_layers, trainable_parameters
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.step.loop import fit
from chroma_trainer.trainer_core.train.step.state import TrainState
from models import RESULTS, host, model_folder, picture_folder, request, surroundings

GOAL = 1.05
EDGES = {"tiny": 128, "medium": 256}


def bare_step(run: TrainState) -> Callable[[], float]:
    """One step of a loop written for this model alone, over a copy of the run's model."""
    transformer = copy.deepcopy(run.transformer)
    parameters = [parameter for _, parameter in trainable_parameters(lora_layers(transformer))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    data = [(pack(run.latents.get(s)[None]), run.text.get(s.captions[0])[None].clone()) for s in run.samples]
    height, width = run.latents.get(run.samples[0]).shape[1:]
    positions: dict[int, Any] = {}
    order = iter(())

    def step() -> float:
        nonlocal order
        i = next(order, None)
        if i is None:
            order = iter(torch.randperm(len(data)).tolist())
            i = next(order)
        x0, text = data[i]
        if text.shape[1] not in positions:
            with torch.no_grad():
                ids = torch.cat([torch.zeros(text.shape[1], 3), image_ids(height, width)])
                positions[text.shape[1]] = transformer.pos_embed(ids)
        noise, sigma = torch.randn_like(x0), torch.rand(1)
        x_sigma = (1 - sigma) * x0 + sigma * noise
        velocity = transformer(
            hidden_states=x_sigma, encoder_hidden_states=text, timestep=sigma,
            image_rotary_emb=positions[text.shape[1]], return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(velocity, noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step(run: TrainState, chosen_host: Any) -> Callable[[], None]:
    """One step of fit(), with its report and hooks."""

    def step() -> None:
        run.num_steps = run.step + 1
        fit(run, chosen_host, hooks=(lambda _: None,))

    return step


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """CPU seconds of each step of each kind; every round runs each once, and the order turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warmup + rounds):
        for name in names if turn % 2 else names[::-1]:
            began = time.process_time()
            steps[name]()
            if turn >= warmup:
                seconds[name].append(time.process_time() - began)
    return seconds


def compared(seconds: dict[str, list[float]], base: str, digits: int = 2) -> dict[str, dict[str, float]]:
    """Median CPU seconds of what in_turns measured, and their ratio to one of the kinds."""
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        name: {"cpu_seconds": round(value, 4), "ratio": round(value / medians[base], digits)}
        for name, value in medians.items()
    }


def measure(size: str, rounds: int) -> dict[str, Any]:
    edge = EDGES[size]
    with tempfile.TemporaryDirectory() as folder:
        seen: list[StepReport] = []
        chosen = host(Path(folder))
        wanted = request(model_folder(size), picture_folder(16, edge, mixed=False), edge)
        run = build_run(plan_run(wanted, chosen), chosen, PhaseTimer())
        console = type(chosen)(paths=chosen.paths, sinks=(seen.append,), device="cpu")
        seconds = in_turns({"bare": bare_step(run), "ours": our_step(run, console)}, rounds)
    assert len(seen) == rounds + 5
    return {
        "model": size,
        "edge": edge,
        "rounds": rounds,
        "cpu_seconds_a_step": {name: round(median(values), 5) for name, values in seconds.items()},
        "ratio": round(sum(seconds["ours"]) / sum(seconds["bare"]), 4),
        "ratio_of_medians": round(median(seconds["ours"]) / median(seconds["bare"]), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "medium"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"tiny": arguments.rounds, "medium": max(5, arguments.rounds // 8)}
    runs = [measure(size, sizes[size]) for size in arguments.sizes]
    for result in runs:
        print(f"{result['model']}: {result['cpu_seconds_a_step']}, ratio {result['ratio']} of {GOAL}")
    if not arguments.dry:
        text = json.dumps({"goal": GOAL, **surroundings(), "runs": runs}, indent=2)
        (RESULTS / "overhead.json").write_text(text + "\n", encoding="utf-8")
    return int(any(result["ratio_of_medians"] > GOAL for result in runs))


if __name__ == "__main__":
    sys.exit(main())
