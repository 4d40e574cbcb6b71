"""Our step: fit(), with its report and a hook. It also writes down what all train on, when asked to."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.models.flux_lineage import original_layout
from chroma_trainer.trainer_core.seeds import generator
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.step.loop import fit
from chroma_trainer.trainer_core.train.step.state import TrainState
from models import host, request
from safetensors.torch import load_file, save_file
from turns import CHECK_SIGMA, LEARNING_RATE, RANK, Setting, Turns, started

NUM_EPOCHS = 64


def build(setting: Setting, folder: Path) -> TrainState:
    wanted = request(
        Path(setting.model), Path(setting.pictures), setting.edge, rank=RANK, alpha=float(RANK), batch_size=setting.batch,
        learning_rate=LEARNING_RATE, gradient_checkpointing=setting.checkpointing, caption_dropout=0.0,
        sigma_density="uniform",
    )  # fmt: skip
    wanted = replace(wanted, model=replace(wanted.model, dtype=setting.precision))
    return build_run(plan_run(wanted, host(folder)), host(folder), PhaseTimer())


def write_material(run: TrainState, folder: Path) -> None:
    """Latents and text of every sample, the order of the batches, and the noise of our first step."""
    samples = list(run.samples)
    text = [run.text.get(sample.captions[0]).float().clone() for sample in samples]
    tensors = {f"latent.{i}": run.latents.get(sample).clone() for i, sample in enumerate(samples)}
    tensors |= {f"text.{i}": tokens for i, tokens in enumerate(text)}
    first = [samples[i] for i in run.plan.batch(0)]
    shape = tensors["latent.0"].shape
    draws = [generator(run.config.seed, "noise", 0, place, sample.key) for place, sample in enumerate(first)]
    tensors["noise"] = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
    count = run.plan.batches_per_epoch
    epochs = [[list(run.plan.batch(epoch * count + i)) for i in range(count)] for epoch in range(NUM_EPOCHS)]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "material.safetensors")
    told = {"num_tokens": [len(tokens) for tokens in text], "epochs": epochs}
    (folder / "material.json").write_text(json.dumps(told), encoding="utf-8")


def write_original(model: Path, file: Path) -> None:
    """The transformer's weights under the names of the original release, with q, k and v in one."""
    weights = load_file(next((model / "transformer").glob("*.safetensors")))
    layout = original_layout(weights["x_embedder.weight"].shape[0])
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, weight in weights.items():
        (key, *_), rows = layout(name)
        parts.setdefault(key, []).append((rows.start or 0, weight))
    ordered = {key: sorted(found, key=lambda part: part[0]) for key, found in parts.items()}
    save_file({key: torch.cat([weight for _, weight in found]) for key, found in ordered.items()}, file)


class Given:
    """A density that always gives the checked noise level."""

    def at(self, _: int) -> Given:
        return self

    def sample(self, count: int, _: Any) -> torch.Tensor:
        return torch.full((count,), CHECK_SIGMA)


def train(run: TrainState, turns: Turns, folder: Path) -> None:
    seen: list[StepReport] = []
    console = type(host(folder))(paths=host(folder).paths, sinks=(seen.append,), device="cpu")
    turns.said["parameters"] = sum(parameter.numel() for parameter in run.parameters)
    density: Any = run.density
    for batch in turns:
        run.density = Given() if turns.checking else density  # type: ignore[assignment]
        assert list(run.plan.batch(run.step)) == batch
        run.num_steps = run.step + 1
        fit(run, console, hooks=(lambda _: None,))
        if turns.checking:
            turns.said["loss"] = run.losses[-1]
            run.step = 0  # the checked batch is the first of the first epoch again


def main() -> None:
    writing = len(sys.argv) > 2
    setting, turns = (Setting(**json.loads(sys.argv[1])), None) if writing else started()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = build(setting, Path(folder))
        if turns is None:
            write_material(run, Path(setting.material))
            write_original(Path(setting.model), Path(setting.material) / "original.safetensors")
        else:
            train(run, turns, Path(folder))


if __name__ == "__main__":
    main()
