"""How many SIGKILLs and full disks a training survives: real processes, random instants, every byte compared afterwards.

    python benchmarks/faults.py --kills 200

A tiny Chroma is trained for 8 steps with everything that is random switched on. Kills hit at uniformly random instants of a
run, half of them at a random file operation inside a save; every third start is killed again. After each, the run goes on
to its end, and LoRA, last checkpoint (adapter, optimiser, loss history) and validation pictures are compared with those of
a run that nobody touched. Full disks: a disk that takes nothing more, from each single file operation of a run on.
Result: benchmarks/results/faults.json. A run with another seed is added to those that are there, a second one with the same
seed takes its place; `--full-disks 0` leaves the disks as they were measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
RESULT = HERE / "results" / "faults.json"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec and spec.loader
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--full-disks", type=int, default=10_000, help="trials at most; the default takes every operation"
    )
    arguments = parser.parse_args()
    import torch

    kills, disks, fixtures = (
        module(TESTS / "faults" / f"{name}.py") for name in ("kills", "test_full_disk", "conftest")
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        module(TESTS / "conftest.py").write_tiny_chroma(Path(folder) / "tiny-chroma")
        fixtures.make_home(Path(folder) / "tiny-chroma", home)
        (Path(folder) / "kills").mkdir()
        count = kills.kill_many(
            home, Path(folder) / "kills", arguments.kills, arguments.kills // 2, arguments.seed,
            told=lambda text: print(text, end="\r", flush=True),
        )  # fmt: skip
        print(f"\n{count}")
        where = {
            "date": datetime.date.today().isoformat(),
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        }
        found = {
            "tried": count.tried, "inside_a_save": count.inside_a_save, "survived": count.survived, "lost": count.lost,
        }  # fmt: skip
        result = kept()
        result["runs"] = [run for run in result["runs"] if run["seed"] != arguments.seed]
        result["runs"].append({"seed": arguments.seed, **where, **found})
        result["kills"] = {name: sum((run[name] for run in result["runs"]), type(found[name])()) for name in found}
        write(result)
        lost: list[str] = []
        if arguments.full_disks:
            (Path(folder) / "disks").mkdir()
            tried, ended, lost = disks.fill_disk(kills, home, Path(folder) / "disks", arguments.full_disks)
            print(
                f"full disk: {tried} tried, {ended} ended with an error, {tried - len(lost)} survived, {len(lost)} lost"
            )
            told = {"tried": tried, "ended_with_an_error": ended, "survived": tried - len(lost), "lost": lost}
            write({**result, "full_disk": {**where, **told}})
    return 1 if count.lost or lost else 0


def kept() -> dict[str, Any]:
    """What earlier runs found."""
    return json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {"kills": {}, "runs": []}


def write(result: dict[str, Any]) -> None:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
