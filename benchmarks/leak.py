"""Does the leak meter agree with images? `python benchmarks/leak.py [--steps 250] [--seeds 1]`

Every setting trains a LoRA on chroma-nano with the demo's style, then samples 32 images with and 32 without the trigger and
counts those in the style (benchmarks/learning.py has the score). The leak is measured on predictions, without images.
Each run is stored in benchmarks/results/leak.json when it is finished, and not repeated. The file also has the rank
correlation of the leak with the share of images without the trigger that are in the style.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stored_rows import measure_missing, read_rows

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "leak.json"


@dataclass(frozen=True)
class Setting:
    """What differs from the demo.

    Attributes:
        plain: "trained" as in the demo, "left out", or "prior": the folder without the trigger preserves the prior.
    """

    name: str
    plain: str = "left out"
    training: dict[str, Any] = field(default_factory=dict)
    class_word: str = ""


SETTINGS = (
    Setting("style alone"),
    Setting("style alone, rate 0.001", training={"learning_rate": 1e-3}),
    Setting("style alone, rank 64", training={"rank": 64, "alpha": 64.0}),
    Setting("style alone, caption_dropout 0", training={"caption_dropout": 0.0}),
    Setting("style alone, caption_dropout 0.3", training={"caption_dropout": 0.3}),
    Setting("with plain images", "trained"),
    Setting("with plain images, caption_dropout 0", "trained", {"caption_dropout": 0.0}),
    Setting("with prior_preservation of plain images", "prior"),
    Setting("preservation 1, empty caption", training={"preservation": 1.0}),
    Setting("preservation 1, class_word emoji", training={"preservation": 1.0}, class_word="emoji"),
)


def request_of(setting: Setting, seed: int, steps: int) -> Any:
    """Return the demo's request with the setting's changes."""
    import learning

    request = learning.request_of(learning.Setting("leak", setting.name, setting.training), seed, steps)
    parts = request.dataset.parts
    if setting.plain == "left out":
        parts = tuple(part for part in parts if part.trigger)
    if setting.plain == "prior":
        parts = tuple(part if part.trigger else replace(part, prior_preservation=True) for part in parts)
    parts = tuple(replace(part, class_word=setting.class_word if part.trigger else "") for part in parts)
    roots = tuple(root for root, part in zip(request.dataset.roots, request.dataset.parts, strict=True)
                  if part.folder in [kept.folder for kept in parts])  # fmt: skip
    return replace(
        request,
        dataset=replace(request.dataset, parts=parts, roots=roots),
        training=replace(request.training, eval_images=4),
    )


def measure(setting: Setting, seed: int, steps: int, work: Path) -> dict[str, Any]:
    """Train and score one run: a row of the result."""
    from chroma_trainer.trainer_core.config.validation import ValidationConfig
    from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost
    from chroma_trainer.trainer_core.train.run import run
    from chroma_trainer.trainer_core.validation.style_score import learning_score

    host = SinkHost(paths=Paths(output=work, cache=work / "cache"), device="cpu")
    request = request_of(setting, seed, steps)
    result = run(request, host)
    drawing = ValidationConfig(steps=20, cfg=3.0, resolutions="64x64")
    shares = learning_score(request.model, result.lora, ASSETS / "neon-emoji", drawing, host)
    Path(result.lora.path).unlink()
    leak = result.report["leak"][-1]
    return {
        "name": setting.name, "seed": seed, "steps": steps,
        **{name: leak[name] for name in ("leak", "standard_error", "by_sigma", "moved_with", "moved_without")},
        **{name: shares[name] for name in ("lora", "without_trigger", "pictures")},
    }  # fmt: skip


def ranks(values: list[float]) -> list[float]:
    """Return the rank of each value; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation."""
    from statistics import correlation as pearson

    return pearson(ranks(first), ranks(second))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the rank correlations with the share of images without the trigger that are in the style."""
    shares = [row["without_trigger"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("leak", "moved_without")}
    columns |= {f"leak at sigma {sigma}": [row["by_sigma"][sigma] for row in rows] for sigma in rows[0]["by_sigma"]}
    return {name: round(correlation(values, shares), 3) for name, values in columns.items()}


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rank_correlation_with_without_trigger": summary(rows)} if len(rows) > 2 else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=PROJECT / "output" / "leak", help="caches and LoRAs")
    options = parser.parse_args()

    def one(setting: Setting, seed: int) -> dict[str, Any]:
        return measure(setting, seed, options.steps, options.work)

    for key, row in measure_missing(RESULT, SETTINGS, options.seeds, options.steps, one, figures):
        print(key, row, flush=True)
    rows = read_rows(RESULT)
    print(json.dumps(summary([*rows.values()]), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
