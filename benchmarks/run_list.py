"""CPU time of the run panel's routes: 200 runs, an events.jsonl of 1 GB, and 1,000 simultaneous requests.

    python benchmarks/run_list.py [--gigabytes 1.0] [--requests 1000] [--write]

The CPU time is that of the server and of its clients, which share this process. --write replaces benchmarks/results/run_list.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from chroma_trainer.nodes.comfyui.http_routes import add_routes
from chroma_trainer.nodes.comfyui.run_history import Backlog
from chroma_trainer.trainer_core.runs.control import Status, write_status

RESULT = Path(__file__).with_name("results") / "run_list.json"
NUM_RUNS = 200
NUM_STEPS = 2000  # of each run


LINE = (
    '{"time": 1.0, "kind": "StepReport", "step": %d, "total": 10000000, "loss": 0.5, "learning_rate": 0.0001, '
    '"grad_norm": 0.1, "seconds": 1.0}\n'
)


def lines(start: int, end: int) -> str:
    return "".join([LINE % step for step in range(start, end)])


def make_runs(output: Path, size: int) -> Path:
    """Write 200 runs, and one whose events.jsonl has this many bytes. Return the folder of the large one."""
    record = {"request": {"training": {"name": "cat", "rank": 4}}, "workflow": {}}
    history = lines(1, NUM_STEPS + 1)
    for number in range(NUM_RUNS):
        folder = output / "chroma_trainer" / f"cat-{number:08}"
        (folder / "validation").mkdir(parents=True)
        write_status(folder, Status("finished", NUM_STEPS, NUM_STEPS, "save", 0, float(number)))
        (folder / "request.json").write_text(json.dumps(record), "utf-8")
        (folder / "events.jsonl").write_text(history, "utf-8")
        for step in range(0, NUM_STEPS, 500):
            (folder / "validation" / f"step-{step:06}-64x64.png").write_bytes(b"png")
    large = output / "chroma_trainer" / "large-12345678"
    large.mkdir()
    write_status(large, Status("finished", 1, 1))
    (large / "request.json").write_text(json.dumps(record), "utf-8")
    with (large / "events.jsonl").open("w", encoding="utf-8") as file:
        step = 1
        while file.tell() < size:
            file.write(lines(step, step + 10_000))
            step += 10_000
    return large


def timed(call: Callable[[], Any]) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return {"seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}


def ask(output: Path, path: str, number: int) -> None:
    """Send the same request this many times at once."""

    async def call() -> None:
        routes, app = web.RouteTableDef(), web.Application()
        add_routes(routes, lambda: output)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:

            async def one() -> None:
                async with client.get(path) as answer:
                    assert answer.status == 200
                    await answer.read()

            await asyncio.gather(*(one() for _ in range(number)))

    asyncio.run(call())


def measure(gigabytes: float, num_requests: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        large = make_runs(output, int(gigabytes * 1e9))
        backlog = Backlog(output)
        return {
            "events_bytes": (large / "events.jsonl").stat().st_size,
            "open_large_history": timed(lambda: backlog.story(large)),
            "read_large_history_again": timed(lambda: backlog.story(large, 10**9)),
            "list_of_201_runs": timed(backlog.runs),
            "requests": num_requests,
            "simultaneous_lists": timed(lambda: ask(output, "/chroma_trainer/runs", num_requests)),
            "simultaneous_histories": timed(lambda: ask(output, "/chroma_trainer/runs/cat-00000000", num_requests)),
        }


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    result = {
        "commit": commit(),
        "python": platform.python_version(),
        **measure(arguments.gigabytes, arguments.requests),
    }
    print(json.dumps(result, indent=2))
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
