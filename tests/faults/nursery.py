"""A process that has imported everything and forks one job for each line it reads: real processes, without seconds of import each.

A line is {"arguments", "folder", "kill_at", "full_at", "within", "count", "console"}: `chroma-trainer ARGUMENTS` in a folder, whose
file operations on paths with a name of `within` in them are counted. kill_at n > 0: the job gets SIGKILL at its n-th.
full_at n > 0: from the n-th on, the disk takes nothing more. count: a file for the number of operations. console: a fifo or terminal to print to; "": log.txt.
Answers a line {"pid"} at once; and to another line, {"status"} (as of os.waitpid) when the job is over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import termios
import traceback
from contextlib import suppress
from pathlib import Path

import chroma_trainer.trainer_core.train.run
import torch
from chroma_trainer import cli
from chroma_trainer.trainer_core.registry import PARTS, load
from chroma_trainer.trainer_core.train.hooks import checkpoint
from diffusers import AutoencoderKL, ChromaTransformer2DModel  # noqa: F401
from transformers import T5EncoderModel  # noqa: F401

GROWING = frozenset({"open", "os.mkdir", "save", "fsync"})  # what a full disk refuses
OPERATIONS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Operations:
    """Counts what happens to files, before it happens; from a given number on it kills the process, or refuses."""

    def __init__(self, job: dict):
        self.kill_at, self.full_at, self.within, self.count = job["kill_at"], job["full_at"], job["within"], 0
        save_file = checkpoint.save_file

        def counted_fsync(handle: int) -> None:
            self.step("fsync", "")  # without the wait for the disk: a process is killed, not the system

        def counted_save(tensors: dict, path: Path) -> None:  # safetensors writes by itself
            self.step("save", str(path))
            save_file(tensors, path)

        os.fsync, checkpoint.save_file = counted_fsync, counted_save
        sys.addaudithook(self.hook)

    def hook(self, event: str, values: tuple) -> None:
        if event not in OPERATIONS or not isinstance(values[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITING):
            return
        path = os.fspath(values[0])
        if isinstance(path, str) and any(name in path for name in self.within):
            self.step(event, path)

    def step(self, event: str, path: str) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full_at and self.count >= self.full_at and event in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path or None)


def open_console(path: str) -> int:
    """Open a fifo or a terminal, which becomes the one whose closing sends SIGHUP. The first byte says so."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    handle = os.open(path, os.O_WRONLY)
    if os.isatty(handle):
        fcntl.ioctl(handle, termios.TIOCSCTTY, 0)
    os.write(handle, b"\n")
    return handle


def work(job: dict) -> int:
    os.chdir(job["folder"])
    with open("log.txt", "a", encoding="utf-8") as log:
        console = open_console(job["console"]) if job["console"] else log.fileno()
        os.dup2(console, 1)
        os.dup2(console, 2)
        sys.stdout, sys.stderr = (open(handle, "w", encoding="utf-8", closefd=False) for handle in (1, 2))  # noqa: SIM115
        operations = Operations(job)
        try:
            status = cli.main(job["arguments"])
        except BaseException:
            traceback.print_exc(file=log)
            raise
        with suppress(OSError):  # the console may be gone
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
        sys.stdin.readline()  # until then a job that is over stays a zombie, and its number its own
        print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)


if __name__ == "__main__":
    assert chroma_trainer
    main()
