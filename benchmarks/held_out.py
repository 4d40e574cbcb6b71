"""What the held-out loss says of four runs on chroma-nano: `python benchmarks/held_out.py`

The table in docs/learned.md, "How far to trust it": one overfits, one learns slowly, one learns and stays, and one has
the demo's rate, which is too high for so few images. Each trains the demo's 28 images of the style with 30 % of them held
out and an evaluation every 30 steps, and is never stopped; when stop_when would have stopped it follows from its losses.
Each run is stored in benchmarks/results/held_out.json when it is finished, and not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stored_rows import measure_missing

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "held_out.json"
EVERY, PATIENCE, HOLDOUT = 30, 3, 0.3


@dataclass(frozen=True)
class Setting:
    name: str
    rank: int
    learning_rate: float
    lr_schedule: str
    steps: int


SETTINGS = (
    Setting("overfits", 64, 6e-3, "constant", 420),
    Setting("learns", 16, 2e-4, "constant", 300),
    Setting("learns, then stays", 16, 5e-4, "cosine", 300),
    Setting("the demo's rate", 16, 3e-3, "cosine", 300),
)


def request_of(setting: Setting, seed: int) -> Any:
    """Return the demo's request with the style's images alone and the setting's values."""
    import learning

    rest = {name: getattr(setting, name) for name in ("rank", "learning_rate", "lr_schedule")}
    values = {**rest, "alpha": float(setting.rank), "holdout": HOLDOUT}
    request = learning.request_of(learning.Setting("held out", setting.name, values), seed, setting.steps)
    style = next(i for i, part in enumerate(request.dataset.parts) if part.trigger)
    dataset = replace(request.dataset, parts=(request.dataset.parts[style],), roots=(request.dataset.roots[style],))
    return replace(request, dataset=dataset, training=replace(request.training, checkpoint_every=EVERY))


def measure(setting: Setting, seed: int, work: Path) -> dict[str, Any]:
    """Train one run: a row of the result."""
    from chroma_trainer.trainer_core.host import EvalCompared, EvalReport, Paths, SinkHost
    from chroma_trainer.trainer_core.train.figures.paired_evals import Evaluation, is_no_longer_better
    from chroma_trainer.trainer_core.train.run import run

    events: list[Any] = []
    run(
        request_of(setting, seed),
        SinkHost(paths=Paths(output=work, cache=work / "cache"), sinks=(events.append,), device="cpu"),
    )
    reports = [event for event in events if isinstance(event, EvalReport) and event.held_out]
    losses = {event.step: event.loss for event in reports}
    compared = {event.step: event for event in events if isinstance(event, EvalCompared)}
    curve = {step: Evaluation({"mean": [loss]}) for step, loss in losses.items()}
    starts = [{s: one for s, one in curve.items() if s <= step} for step in curve if step]
    last = compared[max(compared)]
    return {
        "name": setting.name, "seed": seed, "steps": setting.steps, "rank": setting.rank,
        "learning_rate": setting.learning_rate, "lr_schedule": setting.lr_schedule,
        "standard_error": round(reports[-1].standard_error, 5),  # of the last loss
        "losses": {str(step): round(loss, 5) for step, loss in losses.items()},
        "stops_at": next((max(part) for part in starts if is_no_longer_better(part, PATIENCE)), None),
        "alarm_at": next((step for step, event in compared.items() if event.overfits), None),
        "last": {"since": last.gap_since, "change": last.change, "change_error": last.change_error, "sigmas": last.sigmas,
                 "gaps": last.gaps, "gap_errors": last.gap_errors},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=PROJECT / "output" / "held_out", help="caches and LoRAs")
    options = parser.parse_args()

    def one(setting: Setting, seed: int) -> dict[str, Any]:
        return measure(setting, seed, options.work)

    for setting in SETTINGS:
        for key, row in measure_missing(RESULT, [setting], options.seeds, setting.steps, one, lambda rows: {}):
            print(key, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
