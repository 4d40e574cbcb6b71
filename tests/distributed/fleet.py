"""A process that has imported everything, and forks the ranks of a job: they talk over gloo, and need not import again.

A line of its input is the path of a pickled Job. It answers with a line: the exit status of every rank.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANGS_SECONDS = 180


@dataclass
class Job:
    """A function that every rank calls.

    Args:
        size: number of ranks; 1: without a launcher.
        call: name of a function in jobs.py. It takes the rank and `values`, and returns what can be pickled.
        values: its keyword arguments.
        folder: where results and output go.
        nodes: number of machines that the ranks pretend to be on.
    """

    size: int
    call: str
    values: dict[str, Any]
    folder: Path
    nodes: int = 1
    port: int = field(default_factory=lambda: free_port())

    def result(self, rank: int) -> Any:
        return pickle.loads((self.folder / f"result-{rank}").read_bytes())

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text("utf-8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Fleet:
    """Runs jobs. Use as a context."""

    def __enter__(self) -> Fleet:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        root = Path(__file__).resolve().parents[2]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fleet"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        assert self._read() == "ready"
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, job: Job) -> list[int]:
        """Return the exit status of every rank, negative for a signal."""
        job.folder.mkdir(parents=True, exist_ok=True)
        path = job.folder / "job"
        path.write_bytes(pickle.dumps(job))
        assert self.process.stdin
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], HANGS_SECONDS)[0], "the job hangs"
        line = self.process.stdout.readline()
        assert line, "the fleet's process died"
        return line.strip()


def main() -> None:
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401
    from chroma_trainer import cli  # noqa: F401
    from chroma_trainer.trainer_core.train import run  # noqa: F401
    from diffusers import AutoencoderKL, ChromaTransformer2DModel  # noqa: F401
    from transformers import T5EncoderModel  # noqa: F401

    from tests.distributed import jobs

    print("ready", flush=True)
    for line in sys.stdin:
        job: Job = pickle.loads(Path(line.strip()).read_bytes())
        pids = [start(rank, job, getattr(jobs, job.call)) for rank in range(job.size)]
        statuses = wait_for(pids)
        print(json.dumps(statuses), flush=True)


def wait_for(pids: list[int]) -> list[int]:
    statuses: dict[int, int] = {}
    end = time.monotonic() + HANGS_SECONDS - 30
    while len(statuses) < len(pids):
        for pid in [pid for pid in pids if pid not in statuses]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
        if time.monotonic() > end:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def start(rank: int, job: Job, call: Callable[..., Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(job.folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job.size > 1:
            local_size = job.size // job.nodes
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(job.size), "LOCAL_RANK": str(rank % local_size),
                "LOCAL_WORLD_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port),
                "CHROMA_TRAINER_DEVICES": ",".join(["cpu"] * local_size),
            }  # fmt: skip
        result = call(rank, **job.values)
        (job.folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    from tests.distributed import fleet

    sys.exit(fleet.main())  # by its name in the package, as jobs are pickled
