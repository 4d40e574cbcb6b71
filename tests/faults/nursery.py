"""A process that has imported everything and forks one job for each line it reads: real processes, without seconds of import each.

A line is {"arguments", "folder", "kill_at", "count"}: `chroma-trainer ARGUMENTS` in a folder. kill_at n > 0: the job gets
SIGKILL at its n-th file operation inside a save. count: a file for the number of those operations.
Answers a line {"pid"} at once, and {"status"} (as of os.waitpid) when the job is over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import chroma_trainer.trainer_core.train.run
import torch
from chroma_trainer import cli
from chroma_trainer.trainer_core.registry import PARTS, load
from diffusers import AutoencoderKL, ChromaTransformer2DModel  # noqa: F401
from transformers import T5EncoderModel  # noqa: F401

OPERATIONS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
SAVES = ("checkpoints", "loras")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Operations:
    """Counts what happens to files of checkpoints and LoRAs, before it happens; kills the process at number kill_at."""

    def __init__(self, kill_at: int):
        self.kill_at, self.count = kill_at, 0
        fsync = os.fsync

        def counted(handle: int) -> None:
            self.step()
            fsync(handle)

        os.fsync = counted
        sys.addaudithook(self.hook)

    def hook(self, event: str, values: tuple) -> None:
        if event not in OPERATIONS or not isinstance(values[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITING):
            return
        if any(name in os.fspath(values[0]) for name in SAVES):
            self.step()

    def step(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(job: dict) -> int:
    os.chdir(job["folder"])
    with open("log.txt", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        operations = Operations(job["kill_at"])
        status = cli.main(job["arguments"])
        sys.stdout.flush()
    if job["count"]:
        Path(job["count"]).write_text(str(operations.count))
    return status


def main() -> None:
    torch.set_num_threads(1)
    for kind in PARTS:
        for name in ("chroma", "folder", "none", "adamw"):
            if name in PARTS[kind]:
                load(kind, name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = work(job)
            finally:
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)


if __name__ == "__main__":
    assert chroma_trainer
    main()
