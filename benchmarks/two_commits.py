"""Our step at an earlier commit and as it is now, in turns: `python benchmarks/two_commits.py COMMIT`

Each commit trains in a process of its own, on one thread; they take turns, a few steps each, and the order turns too.
Compared are CPU seconds, because the machine may be busy. The third in turn is the step as it is now with compiled
blocks (MemorySettings, `compile`), which is off by default. The earlier commit's files are unpacked into a temporary
folder. Models, images and requests are those of models.py here, so both train the same thing; they need not have the
same losses, for last bits may have changed. `--settings` selects from the ones below.
Result: benchmarks/results/two_commits.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from models import PROJECT, RESULTS, host, model_folder, picture_folder, request, surroundings

PACKAGE = "chroma_trainer"
SIZE, EDGE = "tiny", 128
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 recomputed": {"recomputed": True},
    "bf16": {"dtype": "bf16"},
    "bf16 recomputed": {"dtype": "bf16", "recomputed": True},
}
BEFORE, NOW, COMPILED = "before", "now", "now, compiled"
STEPS, WARMUP = 4, 6


def train_on_request(dtype: str = "fp32", recomputed: bool = False, compiled: bool = False) -> None:
    """A process that trains: a number of steps a line from its parent, their CPU seconds and the last loss back."""
    import torch
    from chroma_trainer.trainer_core.train import phase_timer
    from chroma_trainer.trainer_core.train.build import build_run
    from chroma_trainer.trainer_core.train.prepare import plan_run
    from chroma_trainer.trainer_core.train.step.loop import fit

    torch.set_num_threads(1)
    answer, sys.stdout = sys.stdout, sys.stderr
    timer: Any = getattr(phase_timer, "PhaseTimer", None) or phase_timer.Phases  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        chosen = host(Path(folder), Path(folder) / "cache")
        wanted = request(
            model_folder(SIZE), picture_folder(16, EDGE, mixed=False), EDGE, {"compile": compiled},
            gradient_checkpointing=recomputed,
        )  # fmt: skip
        wanted = replace(wanted, model=replace(wanted.model, dtype=dtype))
        run = build_run(plan_run(wanted, chosen), chosen, timer())
        for line in sys.stdin:
            run.num_steps = run.step + int(line)
            began = time.process_time()
            fit(run, chosen)
            print(time.process_time() - began, run.losses[-1], file=answer, flush=True)


class Trainer:
    """train_on_request in a process that imports the package from this folder."""

    def __init__(self, package: Path, setting: str, compiled: bool):
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train", setting, *["--compiled"] * compiled], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def take(self, steps: int) -> tuple[float, float]:
        """CPU seconds of so many more steps, and the last one's loss."""
        assert self._process.stdin and self._process.stdout
        print(steps, file=self._process.stdin, flush=True)
        seconds, loss = map(float, self._process.stdout.readline().split())
        return seconds, loss

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        self._process.wait()


def compare(setting: str, packages: dict[str, Path], rounds: int) -> dict[str, Any]:
    """CPU seconds a step of each package."""
    with ExitStack() as stack:
        trainers = {
            name: stack.enter_context(Trainer(package, setting, name == COMPILED)) for name, package in packages.items()
        }
        losses = {name: trainer.take(WARMUP)[1] for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for turn in range(rounds):
            for name in list(trainers)[:: 1 if turn % 2 else -1]:
                seconds[name].append(trainers[name].take(STEPS)[0] / STEPS)
    found = {}
    for name, values in seconds.items():
        ratios = sorted(ours / before for ours, before in zip(values, seconds[BEFORE], strict=True))
        found[name] = {
            "cpu_seconds": round(median(values), 5), "fastest": round(min(values), 5),
            "ratio": round(median(values) / median(seconds[BEFORE]), 3),
            "ratios_of_turns": [round(ratios[0], 3), round(ratios[-1], 3)], f"loss_of_step_{WARMUP}": losses[name],
        }  # fmt: skip
    return found


def unpack(commit: str, folder: Path) -> None:
    """The files of a commit."""
    done = subprocess.run(["git", "archive", commit], cwd=PROJECT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the earlier one")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--train", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_on_request(**SETTINGS[arguments.train], compiled=arguments.compiled)
        return 0
    if not arguments.commit:
        parser.error("name a commit to compare with")
    model_folder(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        unpack(arguments.commit, Path(folder) / "source")
        packages = {BEFORE: Path(folder) / "before", NOW: Path(folder) / "now"}
        for path, source in zip(packages.values(), (Path(folder) / "source", PROJECT), strict=True):
            path.mkdir()
            (path / PACKAGE).symlink_to(source, target_is_directory=True)
        packages[COMPILED] = packages[NOW]
        results: dict[str, Any] = {}
        about = {"commit_before": arguments.commit, "model": SIZE, "edge": EDGE, "rounds": arguments.rounds}
        about |= {"steps_a_round": STEPS, **surroundings(), "threads": 1, "settings": results}
        for setting in arguments.settings:
            results[setting] = compare(setting, packages, arguments.rounds)
            told = (f"{name} {entry['cpu_seconds']} ({entry['ratio']})" for name, entry in results[setting].items())
            print(f"{setting}: {', '.join(told)}", flush=True)
            if not arguments.dry:
                (RESULTS / "two_commits.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
