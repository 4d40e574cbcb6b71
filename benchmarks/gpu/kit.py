"""What a GPU shows of the trainer within minutes: that it computes right, and how fast.

`python benchmarks/gpu/kit.py --out DIR`. Each item runs in a process of its own; DIR/gpu.json is whole after every one
of them. README.md, beside this file, says what the items show and how to read the file. `--rehearse` runs the same,
tiny, on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from items import ITEMS, PARTS, THE_DEVICE, Item, chosen
from results import Results, table
from runner import Runner, run_all

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
PACKAGE = "chroma_trainer"
REHEARSED = 2.0  # seconds that an item of a rehearsal is thought to take
SLOWNESS = 5.0  # of a rehearsal, on a machine that does other things as well


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="no item is begun that would not end within these (10)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything tiny, on the CPU; tries the code, measures nothing"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"items, patterns of items, or parts: {', '.join(PARTS)}"
    )
    parser.add_argument("--list", action="store_true", help="name the items, and run nothing")
    parser.add_argument("--trace", action="store_true", help="write a chrome trace of one step (int8, 512 px) as well")
    parser.add_argument(
        "--scratch", type=Path, help="folder for files of true size, 45 GB (default: the system's for temporary files)"
    )
    arguments = parser.parse_args()
    try:
        arguments.items = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.list and arguments.out is None:
        parser.error("--out is missing; name a folder for the results")
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes:g} leaves no time; write for example 10")
    return arguments


def main() -> int:
    """0 whatever was found, 2 for wrong arguments or where there is no GPU."""
    arguments = parsed()
    if arguments.list:
        for item in ITEMS:
            print(f"{item.part:12} {item.seconds:4.0f} s  {item.name}: {item.shows}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of what is to be closed
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "gpu.json")
    with tempfile.TemporaryDirectory() as links:
        runner = Runner(
            [sys.executable, str(HERE / "child.py")], environment_of_children(Path(links), arguments.rehearse),
            arguments.out / "logs", is_shared=arguments.rehearse, is_ahead=not arguments.rehearse,
        )  # fmt: skip
        try:
            return run_kit(arguments, runner, results)
        finally:
            runner.close()


def run_kit(arguments: argparse.Namespace, runner: Runner, results: Results) -> int:
    """The device first, then the items."""
    stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}
    context: dict[str, Any] = {
        "is_rehearsal": arguments.rehearse, "is_traced": arguments.trace, "limit_flops": 0.0,
        "out": str(arguments.out.resolve()),
        "scratch": str((arguments.scratch or Path(tempfile.gettempdir()) / "chroma-trainer-gpu-kit").resolve()),
    }  # fmt: skip
    seconds = 60 * arguments.minutes

    def run(items: list[Item]) -> None:
        run_all(
            items, runner, results, context, seconds, stamp, expected=expected_of(arguments.rehearse),
            slowness=SLOWNESS if arguments.rehearse else 1.0,
        )  # fmt: skip

    run([THE_DEVICE])
    found = results.items[THE_DEVICE.name]
    if found["status"] != "ok":
        print("nothing can be measured: see above; --rehearse runs the kit without a GPU", file=sys.stderr)
        return 2
    results.header.clear()
    results.header.update({**found["header"], **stamp, "is_rehearsal": arguments.rehearse})
    context["limit_flops"] = found["header"]["bf16_flops"]
    seconds -= found["seconds"]
    run(arguments.items)
    results.write()
    print("\n" + table(results, [item.name for item in (THE_DEVICE, *arguments.items)]))
    print(f"all of it: {results.path}")
    return 0


def expected_of(is_rehearsal: bool) -> Any:
    """From an item to the seconds that it is thought to take."""
    return (lambda item: min(item.seconds, REHEARSED)) if is_rehearsal else (lambda item: item.seconds)


def environment_of_children(links: Path, is_rehearsal: bool) -> dict[str, str]:
    """In which this checkout, and no other, is imported as the package, installed or not."""
    spec = importlib.util.find_spec(PACKAGE)
    paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if spec is None or not spec.origin or Path(spec.origin).resolve().parent != PROJECT:
        (links / PACKAGE).symlink_to(PROJECT, target_is_directory=True)
        paths.insert(0, str(links))
    own = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **({"OMP_NUM_THREADS": "1"} if is_rehearsal else {})}
    return {**os.environ, **own, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def commit() -> str | None:
    """Of this checkout, with a + where files differ from it; None where there is no git."""
    try:
        rev, changed = (
            subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return rev + ("+" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
