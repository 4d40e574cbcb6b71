"""Shows whether a refactoring changed any bytes: runs small trainings of many kinds and compares all that they leave.

python tools/golden.py --write FILE              run every request and record what came out
python tools/golden.py --check FILE              run them again: "N requests, all equal", or every difference and exit 1
python tools/golden.py --check FILE --only NAME  one of them; may be repeated. --list says their names
python tools/golden.py --check FILE --keep DIR   work in DIR, a new folder, and leave all there to be looked at

Record before a refactoring and check after it, on one machine and with the same packages: the last bits of a float
depend on both, so the file belongs in no repository. Each takes two minutes on two idle cores. What is run is the
chroma_trainer that Python imports; its folder is printed first.

Each request (golden_requests.py) is a workflow, most of them of tiny random models, and goes through `chroma-trainer
run` on the CPU, in one thread, with folders of its own. Of the package only cli.main is imported, so that all else may
move and change its name.

Recorded by request, as texts:
- the names of the run folders, which hold the digests
- SHA-256 of every file below the output folder, under its name: LoRAs, checkpoints, request.json, world.json, pictures,
  shards of the caches. Of LoRAs also that of the tensors alone, of pictures that of the pixels, of shards the keys
- losses, learning rates, gradient norms and eval losses, exactly; the order of events, a row of one kind as one
- report.json by field, with paths from the folder that all is in; what the cache remembers of each picture

Left out, because it holds times, memory or places of this machine:
- events.jsonl but for the above; status.json; run.lock; what is printed
- SQLite files but for their rows, without the stamps: their names are digests of absolute paths, as those of counts for
  the plan are where a run goes on from a LoRA
- seconds, seconds_per_step, memory, peak_ram_bytes and peak_vram_bytes of report.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from golden_requests import Call, draw_datasets, requests, write_models

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is loaded, in the workers too
JOBS = 2
CANCELLED = 130  # exit status
PACKAGES = ("torch", "diffusers", "transformers", "optimum-quanto", "safetensors", "numpy", "pillow")
LEFT_OUT = frozenset({"status.json", "run.lock"})
NAMED_BY_PLACE = {"init-lora": "/.cache/plan/"}  # request -> its files whose names are digests of absolute paths
UNSTEADY = frozenset({"seconds", "seconds_per_step", "memory", "peak_ram_bytes", "peak_vram_bytes"})  # of report.json
SHOWN = 100  # characters of a value in a difference
LOG_LINES = 12  # shown of a run that failed

Items = dict[str, str]


def make_record(names: Sequence[str], home: Path, jobs: int) -> dict[str, Any]:
    """Run requests of these names in a folder, `jobs` at a time."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        materials = pool.submit(make_materials, home).result()
        waiting = {name: pool.submit(run_request, name, home) for name in names}
        found = {}
        for number, (name, future) in enumerate(waiting.items(), 1):
            found[name] = future.result()
            print(f"  {number}/{len(names)} {name}", file=sys.stderr, flush=True)
    return {"surroundings": surroundings(), "materials": materials, "requests": found}


def surroundings() -> Items:
    """What last bits depend on besides the code."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "processor": _processor()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def make_materials(home: Path) -> Items:
    """Write models and datasets, in a worker. Returns the digest of each file."""
    with _printing_to(home / "logs" / "materials.log"):
        write_models(home / "models")
        draw_datasets(home / "datasets")
    files = [*_files_below(home / "models"), *_files_below(home / "datasets")]
    return {path.relative_to(home).as_posix(): _sha256(path.read_bytes()) for path in files}


def run_request(name: str, home: Path) -> Items:
    """Run a request, in a worker. Returns what it left, after each of its calls.

    One that does not end as it should has a single item, "failure".
    """
    calls, output, found = requests()[name], home / "output" / name, Items()
    for number, call in enumerate(calls, 1):
        log = home / "logs" / f"{name}-{number}.log"
        status = _run(call, home, output, log)
        if status != (CANCELLED if call.cancel_at else 0):
            lines = log.read_text("utf-8").splitlines()[-LOG_LINES:]
            return {"failure": f"call {number} ended with {status}:\n    " + "\n    ".join(lines)}
        found |= _prefixed("" if number == len(calls) else f"after call {number}: ", describe(output, home))
    return {item: text for item, text in found.items() if NAMED_BY_PLACE.get(name, "\n") not in item}


def _run(call: Call, home: Path, output: Path, log: Path) -> int | str:
    """Exit status, or an exception's name."""
    os.chdir(home)  # files of paths are looked for in the working folder
    with _printing_to(log):
        workflow = _workflow_file(call, log.with_suffix(".json"))
        folders = ["--models", "models", "--datasets", "datasets", "--output", str(output)]
        settings = [word for setting in call.settings for word in ("--set", setting)]
        if call.cancel_at:
            _cancel_at_checkpoint(call.cancel_at)
        try:
            from chroma_trainer.cli import main

            return main(["run", str(workflow), *folders, "--device", "cpu", *settings])
        except Exception as error:
            traceback.print_exc()
            return type(error).__name__


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        stream = held.enter_context(log.open("w", encoding="utf-8"))
        held.enter_context(contextlib.redirect_stdout(stream))
        held.enter_context(contextlib.redirect_stderr(stream))
        yield


def _workflow_file(call: Call, path: Path) -> Path:
    if isinstance(call.workflow, str):
        return package() / "workflows" / call.workflow
    path.write_text(json.dumps(call.workflow, indent=2), encoding="utf-8")
    return path


def package() -> Path:
    """The folder of the package that is run, found without loading it."""
    spec = importlib.util.find_spec("chroma_trainer")
    if spec is None or spec.origin is None:
        sys.exit("chroma_trainer can't be imported; install it (make .venv/.ready)")
    return Path(spec.origin).resolve().parent


def _cancel_at_checkpoint(step: int) -> None:
    """Let this process get a Ctrl-C in the moment in which the checkpoint of a step gets its name."""
    waiting = [f"step-{step:06}"]

    def hook(event: str, values: tuple[Any, ...]) -> None:  # can't be taken away: it does nothing a second time
        if waiting and event == "os.rename" and Path(values[1]).name in waiting:
            waiting.clear()
            signal.raise_signal(signal.SIGINT)

    sys.addaudithook(hook)


def describe(output: Path, home: Path) -> Items:
    """All below an output folder that is the same whenever a request is run. home: the folder that all is in."""
    runs = sorted(path.parent.name for path in (output / "chroma_trainer").glob("*/request.json"))
    found = {"run folders": " ".join(runs)}
    for path in _files_below(output):
        name = _without_digest(path.relative_to(output).as_posix())
        if path.name == "events.jsonl":
            found |= _prefixed(f"{name}: ", _describe_events(path))
        elif path.name == "report.json":
            found |= _prefixed(f"{name}: ", _describe_report(path, home))
        elif path.suffix == ".sqlite":
            found |= {f"{Path(name).parent.as_posix()}: {row}": "is known" for row in _rows(path)}
        elif path.name not in LEFT_OUT:
            found |= {name: _sha256(path.read_bytes()), **_prefixed(f"{name}: ", _describe_inside(path))}
    return found


def _without_digest(text: str) -> str:
    """So that a run whose digest is another one is still compared file by file."""
    return re.sub(r"(\bchroma_trainer/[^/.\"]+)-[0-9a-f]{8}\b", r"\1", text)


def _prefixed(prefix: str, items: Items) -> Items:
    return {f"{prefix}{item}": text for item, text in items.items()}


def _describe_events(path: Path) -> Items:
    """Histories, exactly, and the order of events."""
    events = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    of_kind = {
        kind: [event for event in events if event["kind"] == kind] for kind in ("StepReport", "EvalReport", "LoraSaved")
    }
    kinds = [":".join(filter(None, (event["kind"], event.get("phase")))) for event in events]
    changes = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    evals = [f"{event['step']}:{event['loss']!r}+-{event['standard_error']!r}" for event in of_kind["EvalReport"]]
    histories = {
        name: " ".join(repr(event[name]) for event in of_kind["StepReport"])
        for name in ("loss", "learning_rate", "grad_norm")
    }
    saved = [f"{event['sha256']} {event['applied']}/{event['num_keys']}" for event in of_kind["LoraSaved"]]
    return {"order": " ".join(changes), **histories, "eval_loss": " ".join(evals), "saved": " ".join(saved)}


def _describe_report(path: Path, home: Path) -> Items:
    report = json.loads(path.read_text("utf-8"))
    texts = {name: json.dumps(value, sort_keys=True) for name, value in report.items() if name not in UNSTEADY}
    place = json.dumps(str(home)).strip('"')
    steady = {name: _without_digest(text.replace(place, "HOME")) for name, text in texts.items()}
    return {**steady, "fields": " ".join(sorted(report)), "phases": " ".join(sorted(report["seconds"]))}


def _describe_inside(path: Path) -> Items:
    """Of a picture its pixels; of tensors these without their header; of a shard of a cache its keys."""
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return {"pixels": f"{image.mode} {image.width}x{image.height} {_sha256(image.tobytes())}"}
    if path.suffix != ".safetensors":
        return {}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    keys = " ".join(sorted(json.loads(raw[8:start])))
    return {"tensors": _sha256(raw[start:]), **({"keys": keys} if ".cache" in path.parts else {})}


def _rows(path: Path) -> list[str]:
    """What the cache remembers of pictures, without the stamps of their files."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = [row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [(table, dict(row)) for table in tables for row in connection.execute(f"SELECT * FROM {table}")]
    return [f"{table} " + " ".join(f"{k}={value}" for k, value in row.items() if k != "stamp") for table, row in rows]


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Print what differs. Returns the names of the requests that do; "materials" where models or pictures do."""
    for name, value in now["surroundings"].items():
        recorded = before["surroundings"].get(name)
        if recorded != value:
            print(f"note: recorded with {name} {recorded}, and this is {value}; bits may differ")
    found = {"materials": differences(before["materials"], now["materials"])}
    found |= {name: differences(before["requests"].get(name), items) for name, items in now["requests"].items()}
    for name, lines in found.items():
        for line in lines:
            print(f"{name}: {line}")
    return [name for name, lines in found.items() if lines]


def differences(before: Items | None, now: Items) -> list[str]:
    """One line for each item that is not what it was."""
    if "failure" in now:
        return [now["failure"]]
    if before is None:
        return ["is not in the file; record it"]
    changed = (item for item in sorted(before.keys() | now.keys()) if before.get(item) != now.get(item))
    return [f"{item}: {_difference(before.get(item), now.get(item))}" for item in changed]


def _difference(before: str | None, now: str | None) -> str:
    """In words: of the first word that is another."""
    if before is None or now is None:
        return "is new" if before is None else "is gone"
    old, new = before.split(" "), now.split(" ")
    longest = max(len(old), len(new))
    old, new = (words + ["nothing"] * (longest - len(words)) for words in (old, new))
    place = next(i for i in range(longest) if old[i] != new[i])
    where = f"word {place + 1} of {longest} " if longest > 1 else ""
    return f"{where}was {old[place][:SHOWN]}, is {new[place][:SHOWN]}"


def check(before: dict[str, Any], now: dict[str, Any]) -> int:
    """Say whether all is as it was. Returns the exit status."""
    differing = compare(before, now)
    result = f"not equal: {', '.join(differing)}" if differing else "all equal"
    print(f"{len(now['requests'])} requests, {result}")
    return 1 if differing else 0


def write(file: Path, now: dict[str, Any]) -> int:
    """Record, if every request ended as it should. Returns the exit status."""
    failures = [f"{name}: {items['failure']}" for name, items in now["requests"].items() if "failure" in items]
    if failures:
        print("\n".join([*failures, "nothing is recorded"]))
        return 1
    file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(now['requests'])} requests, recorded in {file}")
    return 0


def choose_names(only: Sequence[str]) -> list[str]:
    known = list(requests())
    if unknown := sorted(set(only) - set(known)):
        sys.exit(f"no request is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not only or name in only]


@contextlib.contextmanager
def open_folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        yield Path(folder).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--write", metavar="FILE", type=Path, help="run, and record into this file")
    wanted.add_argument("--check", metavar="FILE", type=Path, help="run, and compare with this file")
    wanted.add_argument("--list", action="store_true", help="say the names of the requests")
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="this request; may be repeated")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="a new folder to work in, which stays")
    parser.add_argument("--jobs", metavar="N", type=int, default=JOBS, help=f"run so many at a time (default: {JOBS})")
    arguments = parser.parse_args()
    names = choose_names(arguments.only)
    if arguments.list:
        print("\n".join(names))
        return 0
    before = json.loads(arguments.check.read_text("utf-8")) if arguments.check else None
    if arguments.write and not arguments.write.resolve().parent.is_dir():
        parser.error(f"there is no folder {arguments.write.parent}")
    print(f"running {package()}", flush=True)
    with open_folder(arguments.keep) as home:
        now = make_record(names, home, arguments.jobs)
    return check(before, now) if before else write(arguments.write, now)


if __name__ == "__main__":
    sys.exit(main())
