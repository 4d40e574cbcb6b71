"""What a setting changes of what is learnt: `python benchmarks/learning.py [--only density rank] [--steps 250] [--seeds 3] [--list]`

Every setting trains a LoRA on chroma-nano with the demo's data (workflows/api/first-lora.json) through the engine, then draws
subjects that are not in the data. Each run is kept in benchmarks/results/learning.json as it is finished and not run again;
docs/learning.md and docs/images/learning.png are written from that file. What is registered is found: quantisers, optimisers
and adapters that can't work here are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "learning.json"
WORKFLOW = PROJECT / "workflows" / "api" / "first-lora.json"
STEPS, SEEDS = 250, 3
RANKS = (4, 16, 64)
ROLLOUTS = ((0.25, 3), (1.0, 3), (1.0, 10))  # probability, most steps
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
# Where AdamW's 3e-3, high for its usual 1e-4 because this model is small, is not the optimiser's scale: as much higher than the
# middle of the rates that are usual with it (optim/*.py, usual_rates), and 1 where it finds its own.
OPTIMIZER_RATES = {
    "optimi-lion": 4.2e-4,
    "bnb-lion8bit-paged": 4.2e-4,
    "came": 6.8e-4,
    "prodigy": 1.0,
    "schedulefree-adamw": 1.5e-2,
}
LOSSES: dict[str, dict[str, Any]] = {
    "mse": {},
    "mae": {"loss": "mae"},
    "huber 0.1": {"loss": "huber"},
    "mse, weighted by cosmap": {"loss_weighting": "cosmap"},
    "mse, weighted by bell": {"loss_weighting": "bell"},
}
PRODUCT_LEVELS = {"int8": "int8-quanto", "fp8": "fp8-native"}
SAME = {"sigmoid": "logit-normal"}  # sigmoid(scale * normal) at scale 1: the same samples


@dataclass(frozen=True)
class Setting:
    """One thing changed of the baseline. training, optimizer, adapter: fields that differ; level: quantisation; products: of rounded numbers."""

    group: str
    name: str
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    level: str = "none"
    products: str = "exact"

    @property
    def key(self) -> str:
        changed = any((self.training, self.optimizer, self.adapter, self.level != "none"))
        return f"{self.group}={self.name}" if changed else "baseline"


def settings() -> tuple[list[Setting], dict[str, str]]:
    """All that can be compared here, and what can't with its reason."""
    import torch
    from chroma_trainer.trainer_core.config.training import SIGMA_DENSITIES
    from chroma_trainer.trainer_core.registry import load, names

    found = [Setting("density", "chroma")]
    found += [Setting("density", n, {"sigma_density": n}) for n in SIGMA_DENSITIES if n != "chroma" and n not in SAME]
    found += [Setting("rank", str(r), {"rank": r, "alpha": float(r)} if r != 16 else {}) for r in RANKS]
    found += [Setting("rate", f"{r:g}", {"learning_rate": r} if r != 3e-3 else {}) for r in LEARNING_RATES]
    found += [
        Setting(
            "rollout",
            f"{share:g} of 1 to {most} steps" if share else "none",
            {"rollout_probability": share, "rollout_steps": most} if share else {},
        )
        for share, most in ((0.0, 0), *ROLLOUTS)
    ]
    found += [Setting("routing", f"{share:g}", {"routed_share": share} if share else {}) for share in (0.0, 0.5)]
    found += [Setting("loss", name, values) for name, values in LOSSES.items()]
    found += [Setting("noise choice", str(n), {"noise_choice": n} if n > 1 else {}) for n in (1, 4)]
    found += [
        Setting(
            "preservation", f"{weight:g}, empty caption" if weight else "0", {"preservation": weight} if weight else {}
        )
        for weight in (0.0, 1.0)
    ]
    missing: dict[str, str] = {}
    for level in names("quantization"):
        part = load("quantization", level)()
        if reason := part.missing() or part.unfit(torch.device("cpu")):
            missing[f"quantization={level}"] = reason
        else:
            found.append(Setting("quantization", level, level=level))
    for products, level in PRODUCT_LEVELS.items():
        if reason := load("products", products)().unfit(torch.device("cpu")):
            missing[f"quantization={level}, {products} products"] = reason
        else:
            found.append(Setting("quantization", f"{level}, {products} products", level=level, products=products))
    for name in names("optimizer"):
        part = load("optimizer", name)
        training = {"learning_rate": OPTIMIZER_RATES[name]} if name in OPTIMIZER_RATES else {}
        if part.averages:  # in place of a falling schedule
            training["lr_schedule"] = "constant"
        if reason := part.missing("cpu"):
            missing[f"optimizer={name}"] = reason
        else:
            found.append(Setting("optimizer", name, training, {} if name == "adamw" else {"optimizer": name}))
    corrected = {"optimizer": "prodigy", "prodigy_bias_correction": True}
    found.append(Setting("optimizer", "prodigy, bias corrected", {"learning_rate": 1.0, "warmup_steps": 0}, corrected))
    for kind in names("adapter"):
        found.append(Setting("adapter", kind, adapter={} if kind == "lora" else {"kind": kind}))
    found.append(Setting("adapter", "full", FULL, {"optimizer": "adafactor"}, {"kind": "full"}))
    return found, missing


# The model's own weights: no rank, no clipping of the whole gradient (docs/full-rank.md).
FULL = {"learning_rate": 3e-3, "max_grad_norm": 0.0, "rank": 16, "alpha": 16.0}


def request_of(setting: Setting, seed: int, steps: int) -> Any:
    """The demo's request with its data, the setting's change, and neither checkpoints nor pictures."""
    from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
    from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
    from chroma_trainer.trainer_core.config.request import TrainRequest
    from chroma_trainer.trainer_core.config.training import TrainingConfig
    from chroma_trainer.trainer_core.host import ASSETS

    nodes = json.loads(WORKFLOW.read_text("utf-8"))
    trainer = next(n["inputs"] for n in nodes.values() if n["class_type"] == "LoRATrainer")
    parts, link = [], trainer["dataset"]
    while link:
        inputs = dict(nodes[link[0]]["inputs"])
        link = inputs.pop("dataset", None)
        parts.insert(0, FolderConfig(**inputs))
    known = TrainingConfig.__dataclass_fields__
    own = {"steps": steps, "seed": seed, "checkpoint_every": 0, "validate_every": 0, "resume": False}
    values = {k: v for k, v in trainer.items() if k in known} | own | setting.training
    values["name"] = f"{setting.key}-{seed}".replace("=", "-").replace(", ", "-").replace(" ", "-")
    nano = str(ASSETS / "chroma-nano")
    return replace(
        TrainRequest(
            ModelConfig(
                "chroma",
                "nano",
                nano,
                dtype="fp32",
                quantization=QuantizationConfig(setting.level, products=setting.products),
            ),
            DatasetConfig(tuple(parts), tuple(str(ASSETS / part.folder) for part in parts)),
            TrainingConfig(**values),
        ),
        optimizer=_changed("optimizer", "OptimizerConfig", setting.optimizer),
        adapter=_changed("adapter", "AdapterConfig", setting.adapter),
    )


def _changed(module: str, name: str, values: dict[str, Any]) -> Any:
    import importlib

    return getattr(importlib.import_module(f"chroma_trainer.trainer_core.config.{module}"), name)(**values)


def measure(setting: Setting, seed: int, steps: int, work: Path) -> dict[str, Any]:
    """Train and score one run: a row of the result."""
    from chroma_trainer.trainer_core.config.validation import ValidationConfig
    from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost, StepReport
    from chroma_trainer.trainer_core.train.run import run
    from chroma_trainer.trainer_core.validation.style_score import learning_score

    clock: list[float] = []

    def sink(event: Any) -> None:
        if isinstance(event, StepReport):
            clock.append(time.process_time())

    host = SinkHost(paths=Paths(output=work, cache=work / "cache"), sinks=(sink,), device="cpu")
    request = request_of(setting, seed, steps)
    drawing = ValidationConfig(steps=20, cfg=3.0, resolutions="64x64")
    result = run(request, host)
    shares = learning_score(request.model, result.lora, ASSETS / "neon-emoji", drawing, host)
    Path(result.lora.path).unlink()
    losses = result.report["eval_loss"]
    return {
        "group": setting.group, "name": setting.name, "seed": seed, "steps": steps,
        "learning_rate": request.training.learning_rate,
        "eval_before": round(losses["before"], 5), "eval_after": round(losses["after"], 5),
        **{name: shares[name] for name in ("base", "lora", "without_trigger", "pictures")},
        "cpu_seconds_per_step": round((clock[-1] - clock[0]) / (len(clock) - 1), 4), "level": setting.level,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware, versions and day of a measurement."""
    import datetime
    import platform

    from chroma_trainer.trainer_core.train.results.metadata import versions

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8", errors="replace").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "hardware": f"{processor}, {os.cpu_count()} cores, one thread a run",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def read_rows() -> dict[str, Any]:
    return json.loads(RESULT.read_text("utf-8"))["runs"] if RESULT.is_file() else {}


def keep(key: str, row: dict[str, Any], left_out: dict[str, str]) -> None:
    """Add one run to the file. Read again first: another process may have added its own."""
    from chroma_trainer.trainer_core.storage.atomic import write_json

    rows = read_rows() | {key: row}
    write_json(RESULT, {**machine(), "left_out": left_out, "runs": dict(sorted(rows.items()))})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="groups, or settings as group=name")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="training seeds of each setting")
    parser.add_argument("--list", action="store_true", help="name the settings and end")
    parser.add_argument("--report", action="store_true", help="write table and chart of what there is, and end")
    parser.add_argument("--work", type=Path, default=PROJECT / "output" / "learning", help="caches and LoRAs")
    options = parser.parse_args()
    from learning_report import write_report

    if options.report:
        write_report(json.loads(RESULT.read_text("utf-8")))
        return 0
    wanted, left_out = settings()
    if options.only:
        wanted = [
            s
            for s in wanted
            if s.group in options.only or f"{s.group}={s.name}" in options.only or s.key in options.only
        ]
    if options.list:
        print(*dict.fromkeys(s.key for s in wanted), *(f"left out: {k}: {v}" for k, v in left_out.items()), sep="\n")
        return 0
    import torch

    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for setting in {s.key: s for s in wanted}.values():
            key = f"{setting.key} steps={options.steps} seed={seed}"
            if key in read_rows():
                continue
            row = measure(setting, seed, options.steps, options.work)
            keep(key, row, left_out)
            print(key, row, flush=True)
    write_report(json.loads(RESULT.read_text("utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
