"""How many SIGKILLs, cancels without a console and full disks a training survives: every byte is compared afterwards.

    python benchmarks/faults.py --kills 200 --inside 50 --interrupts 50

A tiny Chroma is trained for 8 steps with everything that is random switched on. Kills hit at uniformly random instants of a
run, `--inside` of them at a random file operation inside a save; every third start is killed again. After each, the run goes on
to its end, and LoRA, last checkpoint (adapter, optimiser, loss history) and validation pictures are compared with those of
a run that nobody touched. Cancels, compared in the same way: Ctrl-C under a pipe whose reader is gone, and a terminal that is
closed, which sends SIGHUP. Full disks: a disk that takes nothing more, from each single file operation of a run on.
Result: benchmarks/results/faults.json, each measurement with its commit. `--kills 0`, `--interrupts 0` and `--full-disks 0` leave theirs
as it was measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
CANCELS = {"pipe": "ctrl_c_with_a_closed_console", "terminal": "closed_terminal"}
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
    parser.add_argument("--inside", type=int, help="kills inside a save; default: half of them")
    parser.add_argument("--interrupts", type=int, default=20, help="cancels of each of the two kinds")
    arguments = parser.parse_args()
    if arguments.inside is None:
        arguments.inside = arguments.kills // 2
    names = ("kills", "test_full_disk", "conftest")
    kills, disks, fixtures = (module(TESTS / "faults" / f"{name}.py") for name in names)
    with tempfile.TemporaryDirectory() as text:
        folder, home = Path(text), Path(text) / "home"
        module(TESTS / "conftest.py").write_tiny_chroma(folder / "tiny-chroma")
        fixtures.make_home(folder / "tiny-chroma", home)
        for name in ("kills", "pipe", "terminal", "disks"):
            (folder / name).mkdir()
        lost: list[str] = []
        if arguments.kills:
            lost += kill(kills, home, folder / "kills", arguments)
        if arguments.interrupts:
            lost += cancel(kills, home, folder, arguments)
        if arguments.full_disks:
            lost += fill_disks(kills, disks, home, folder / "disks", arguments.full_disks)
    return 1 if lost else 0


def kill(kills: ModuleType, home: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Measure kills, write the result, and return what was lost."""
    count = kills.kill_many(
        home, folder, arguments.kills, arguments.inside, arguments.seed,
        told=lambda text: print(text, end="\r", flush=True),
    )  # fmt: skip
    print(f"\n{count}", flush=True)
    write("kills", {"seed": arguments.seed, **vars(count)})
    return count.lost


def cancel(kills: ModuleType, home: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Measure cancels of both kinds, write the result, and return what was lost."""
    lost: list[str] = []
    for name, closed_terminal in (("pipe", False), ("terminal", True)):
        count = kills.interrupt_many(home, folder / name, arguments.interrupts, closed_terminal, arguments.seed)
        print(f"{CANCELS[name]}: {count}", flush=True)
        write(CANCELS[name], {"seed": arguments.seed, **vars(count)})
        lost += count.lost
    return lost


def fill_disks(kills: ModuleType, disks: ModuleType, home: Path, folder: Path, trials: int) -> list[str]:
    """Measure full disks, write the result, and return what was lost."""
    tried, ended, lost = disks.fill_disk(kills, home, folder, trials)
    survived = tried - len(lost)
    print(f"full disk: {tried} tried, {ended} ended with an error, {survived} survived, {len(lost)} lost")
    count = {"tried": tried, "ended_with_an_error": ended, "survived": survived, "lost": lost}
    write("full_disk", count)
    return lost


def circumstances() -> dict[str, str]:
    import torch

    system = f"{platform.system()} {platform.machine()}"
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "platform": f"{system}, Python {platform.python_version()}, torch {torch.__version__}",
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def write(name: str, count: dict[str, Any]) -> None:
    """Replace one measurement in the result."""
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    result[name] = {**circumstances(), **count}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
