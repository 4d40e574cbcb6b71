"""Predicted beside measured peaks of real steps on a CPU, over shapes, settings and levels. `python benchmarks/plan.py`

Predicted: planner/meta_model.py, optimizer_cost.py and step_peak.py, from shapes. Measured: torch's profiler, in the run's second step, kernels' own
allocations among them, weights, adapter and optimiser's states included. Goal: within a tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from chroma_trainer.tools.step_profiler import measured_step_peak
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.planner.step_peak import training_peak
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from models import RESULTS, host, model_folder, picture_folder, request, surroundings

GOAL = 0.1
CASES: tuple[dict[str, Any], ...] = (
    {"model": "tiny", "edge": 128},
    {"model": "tiny", "edge": 256},
    {"model": "tiny", "edge": 128, "batch": 4},
    {"model": "tiny", "edge": 256, "checkpointing": True},
    {"model": "tiny", "edge": 256, "batch": 4, "checkpointing": True, "targets": "all+ffs"},
    {"model": "tiny", "edge": 256, "checkpointing": True, "interval": 3},
    {"model": "tiny", "edge": 128, "level": "int8-quanto", "checkpointing": True},
    {"model": "tiny", "edge": 128, "level": "int4-quanto", "batch": 4},
    {"model": "medium", "edge": 128, "checkpointing": True},
    {"model": "medium", "edge": 128},
    {"model": "medium", "edge": 256, "checkpointing": True, "level": "int8-quanto"},
    {"model": "tiny", "edge": 256, "routed_share": 0.5, "route_first": 1},
    {"model": "medium", "edge": 256, "routed_share": 0.5, "route_first": 1, "checkpointing": True},
    {"model": "tiny", "edge": 64, "rank": 32, "kind": "dora", "optimizer": "prodigy"},
    {"model": "tiny", "edge": 64, "rank": 32, "kind": "loha", "optimizer": "optimi-lion", "ema_decay": 0.9},
    {"model": "tiny", "edge": 64, "rank": 64, "optimizer": "adamw_bf16", "checkpointing": True},
    {"model": "tiny", "edge": 64, "rank": 32, "init": "pissa", "optimizer": "schedulefree-adamw", "accumulation": 2},
    {"model": "medium", "edge": 128, "rank": 64, "kind": "dora", "optimizer": "prodigy", "checkpointing": True},
    {"model": "medium", "edge": 128, "rank": 64, "kind": "loha", "optimizer": "adafactor", "checkpointing": True},
    {"model": "medium", "edge": 128, "rank": 64, "kind": "lokr", "optimizer": "came", "level": "int8-quanto"},
)
TRAINING = ("rank", "init", "accumulation", "routed_share", "route_first")
ADAPTER = ("kind", "ema_decay")


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    edge, batch = case["edge"], case.get("batch", 1)
    asked = request(
        model_folder(case["model"]), picture_folder(4, edge, mixed=False), edge, batch_size=batch, caption_dropout=0.0,
        gradient_checkpointing=case.get("checkpointing", False), targets=case.get("targets", "all"),
        **{name: case[name] for name in TRAINING if name in case},
    )  # fmt: skip
    model = replace(asked.model, quantization=QuantizationConfig(case.get("level", "none")))
    asked = replace(
        asked, model=model, memory=MemoryConfig(checkpointing_interval=case.get("interval", 1)),
        adapter=AdapterConfig(**{name: case[name] for name in ADAPTER if name in case}),
        optimizer=OptimizerConfig(optimizer=case.get("optimizer", "adamw")),
    )  # fmt: skip
    run = build_run(plan_run(asked, host(folder)), host(folder), PhaseTimer())
    tokens = max(len(run.text.get(sample.captions[0])) for sample in run.samples)
    predicted, _ = training_peak(MetaModel(run.family, asked, "cpu").cost(Shape(edge, edge, batch, tokens)), asked)
    measured = measured_step_peak(run)
    return {**case, "predicted_bytes": predicted, "measured_bytes": measured, "off": round(predicted / measured - 1, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-result", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            rows.append(measure(case, Path(folder)))
            row = rows[-1]
            print(
                f"{row['off']:+7.1%}  {row['predicted_bytes'] / 1e6:9.2f} MB predicted {row['measured_bytes'] / 1e6:9.2f} measured  {case}",
                flush=True,
            )
            worst = max(abs(row["off"]) for row in rows)
            if not arguments.no_result:
                value = {"goal": GOAL, "worst": worst, **surroundings(), "cases": rows}
                (RESULTS / "plan.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8", newline="\n")
    worst = max(abs(row["off"]) for row in rows)
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
