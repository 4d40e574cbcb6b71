"""Seconds from the start of the interpreter to the end of the first step, and peak memory. `python benchmarks/start.py`

Each run is a process of its own, on the tiny model at 128 px with 16 pictures. cold: text and latents must be encoded
first; warm: they are there. CPU seconds are told beside those of the clock, for the machine may be busy. Medians of three.
Goals: 15 s and 700 MiB cold, 6 s and 300 MiB warm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from models import RESULTS, host, model_folder, picture_folder, request, surroundings

GOALS = {"cold": {"seconds": 15.0, "peak_mib": 700}, "warm": {"seconds": 6.0, "peak_mib": 300}}
NAMES = ("seconds", "cpu_seconds", "first_step_cpu_seconds", "peak_mib")


def child(cache: Path) -> None:
    """Train until the first step is done, and print when it was."""
    from chroma_trainer.trainer_core.devices import peak_ram_bytes
    from chroma_trainer.trainer_core.host import PhaseStarted, SinkHost, StepReport
    from chroma_trainer.trainer_core.train.run import run

    found: dict[str, float] = {}

    def sink(event: Any) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "train":
            found["before"] = time.process_time()
        if isinstance(event, StepReport):
            found["ended"], found["cpu_seconds"] = time.time(), time.process_time()
            found["first_step_cpu_seconds"] = found["cpu_seconds"] - found["before"]
            found["peak_mib"] = peak_ram_bytes() / 2**20
            found["modules"] = len(sys.modules)
            print(json.dumps(found), flush=True)
            os._exit(0)

    wanted = request(model_folder("tiny"), picture_folder(16, 128, mixed=False), 128)
    with tempfile.TemporaryDirectory() as folder:
        paths = host(Path(folder), cache).paths
        run(wanted, SinkHost(paths=paths, sinks=(sink,), device="cpu"))


def measure_once(cache: Path) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(cache)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": found["ended"] - began, **{name: found[name] for name in NAMES[1:]}, "modules": found["modules"]}


def measure(repeats: int) -> dict[str, Any]:
    """Medians of cold and of warm runs, in turns."""
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in runs:
                runs[kind].append(measure_once(Path(folder)))
    return {
        kind: {name: round(median(entry[name] for entry in entries), 2) for name in entries[0]}
        for kind, entries in runs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0
    model_folder("tiny"), picture_folder(16, 128, mixed=False)
    result = measure(arguments.repeats)
    for kind, found in result.items():
        print(f"{kind}: {found}")
    if not arguments.dry:
        text = json.dumps({"goals": GOALS, **surroundings(), **result}, indent=2)
        (RESULTS / "start.json").write_text(text + "\n", encoding="utf-8")
    return int(any(result[kind][name] > limit for kind, goals in GOALS.items() for name, limit in goals.items()))


if __name__ == "__main__":
    sys.exit(main())
