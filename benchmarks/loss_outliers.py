"""How often are images wrongly called out of line by their loss? `python benchmarks/loss_outliers.py [--steps 200] [--seeds 3]`

Every run trains chroma-nano on a set of emoji with held-out images, once as it is and once with faults of each kind planted,
and the losses of its evaluations are judged as the dataset doctor does (docs/decisions/0084). Which images get a fault is
decided by the seed. Each run is stored in benchmarks/results/loss_outliers.json when it is finished, and not repeated. The
file also has, for several limits, the share of sound images that are named and the share of faulty ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stored_rows import measure_missing, read_rows

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "loss_outliers.json"
LIMITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
NUM_FAULTY = 4


def exchange_captions(images: Sequence[Path], folder: Path) -> None:
    """Give each of these images the caption of the next one."""
    captions = [image.with_suffix(".txt").read_text("utf-8") for image in images]
    for image, caption in zip(images, [*captions[1:], captions[0]], strict=True):
        image.with_suffix(".txt").write_text(caption, encoding="utf-8")


def replace_by_noise(images: Sequence[Path], folder: Path) -> None:
    import numpy as np
    from PIL import Image

    for number, path in enumerate(images):
        with Image.open(path) as image:
            size = image.size
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def replace_by_plain(images: Sequence[Path], folder: Path) -> None:
    """Put images of another style in their place: those of plain-emoji, with their own captions."""
    from chroma_trainer.trainer_core.host import ASSETS

    others = sorted((ASSETS / "plain-emoji").glob("*.png"))
    for image, other in zip(images, others, strict=False):
        shutil.copyfile(other, image)


@dataclass(frozen=True)
class Setting:
    """A set of images, and what is done to some of them."""

    name: str
    images: str = "neon-emoji"
    spoil: Callable[[Sequence[Path], Path], None] | None = None


SETTINGS = (
    Setting("as it is"),
    Setting("plain emoji as they are", "plain-emoji"),
    Setting("exchanged captions", spoil=exchange_captions),
    Setting("noise", spoil=replace_by_noise),
    Setting("another style", spoil=replace_by_plain),
)


def prepare(setting: Setting, seed: int, folder: Path) -> set[str]:
    """Write the images of a run, and return the names of those with a fault."""
    import numpy as np
    from chroma_trainer.trainer_core.host import ASSETS

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ASSETS / setting.images, folder)
    if setting.spoil is None:
        return set()
    images = sorted(folder.glob("*.png"))
    chosen = np.random.default_rng(seed).permutation(len(images))[:NUM_FAULTY]
    faulty = [images[number] for number in sorted(chosen.tolist())]
    setting.spoil(faulty, folder)
    return {image.name for image in faulty}


def measure(setting: Setting, seed: int, steps: int, work: Path) -> dict[str, Any]:
    """Train one run and judge its images: a row of the result."""
    import math

    import learning
    from chroma_trainer.trainer_core.dataset_doctor.checks.loss_outliers import losses_of, scores
    from chroma_trainer.trainer_core.host import Paths, SinkHost
    from chroma_trainer.trainer_core.storage.atomic import sha256_of
    from chroma_trainer.trainer_core.train.run import run

    folder, output = work / "images", work / "output"
    shutil.rmtree(output, ignore_errors=True)
    faulty = prepare(setting, seed, folder)
    values = {"holdout": 0.25, "eval_images": 100, "checkpoint_every": steps, "warmup_steps": 10}
    request = learning.request_of(learning.Setting("losses", setting.name, values), seed, steps)
    part = replace(next(part for part in request.dataset.parts if part.trigger), folder=str(folder))
    part = part if setting.images == "neon-emoji" else replace(part, trigger="")
    request = replace(request, dataset=replace(request.dataset, parts=(part,), roots=(str(folder),)))
    run(request, SinkHost(paths=Paths(output=output, cache=work / "cache"), device="cpu"))
    (run_folder,) = (output / "chroma_trainer").iterdir()
    losses, images = losses_of(run_folder), sorted(folder.glob("*.png"))
    known = [(image.name, losses[int(sha256_of(image)[:16], 16)]) for image in images]
    by_loss = scores([math.log(loss) for _, (loss, _) in known])
    by_change = scores([change for _, (_, change) in known])
    return {
        "name": setting.name, "seed": seed, "steps": steps,
        "images": {
            name: {"loss": round(loss, 4), "change": round(change, 4), "scores": [round(a, 2), round(b, 2)], **({"faulty": True} if name in faulty else {})}
            for (name, (loss, change)), a, b in zip(known, by_loss, by_change, strict=True)
        },
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, for each kind of set and each limit, how many images are named: by the loss, by its change, and by either."""
    kinds: dict[str, Any] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        images = [image for row in rows if row["name"] == name for image in row["images"].values()]
        sides = {"sound": [i for i in images if "faulty" not in i], "faulty": [i for i in images if "faulty" in i]}
        kinds[name] = {
            side: {"images": len(group), **{f"above {limit:g}": _named(group, limit) for limit in LIMITS}}
            for side, group in sides.items()
            if group
        }
    return kinds


def _named(images: Sequence[dict[str, Any]], limit: float) -> dict[str, float]:
    above = [[score > limit for score in image["scores"]] for image in images]
    shares = {
        "loss": sum(a for a, _ in above), "change": sum(b for _, b in above), "either": sum(a or b for a, b in above)
    }  # fmt: skip
    return {name: round(count / len(images), 4) for name, count in shares.items()}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"named": summary(rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=PROJECT / "output" / "loss_outliers", help="caches and runs")
    options = parser.parse_args()

    def one(setting: Setting, seed: int) -> dict[str, Any]:
        return measure(setting, seed, options.steps, options.work)

    for key, _ in measure_missing(RESULT, SETTINGS, options.seeds, options.steps, one, figures):
        print(key, flush=True)
    rows = read_rows(RESULT)
    print(json.dumps(summary([*rows.values()]), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
