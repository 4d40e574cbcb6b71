"""The command `chroma-trainer worker`, which trainer_core/launch starts."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from ..command_line.interrupts import Interrupts
from ..errors import Cancelled
from ..host import SinkHost
from ..runs.lock import RunLock


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the command."""
    parser.add_argument("folder")


def work(arguments: argparse.Namespace) -> int:
    """Train in a process that trainer_core/launch started, alone or as one of several."""
    folder, is_first = Path(arguments.folder), os.environ.get("LOCAL_RANK", "0") == "0"
    with RunLock(folder) if is_first else nullcontext():  # by which others see that the run goes on
        _train_job(folder, is_first)
    return 0


def _train_job(folder: Path, is_first: bool) -> None:
    from ..devices import measure_memory
    from ..distributed.device_list import device_of_rank
    from ..distributed.process_group import leave
    from ..launch.job import FINISHED, STOP, Job, Result
    from ..launch.process import EventFile, on_end_of_input, reporting
    from ..train.run import run as train

    interrupts = Interrupts()
    job = Job.read(folder)
    if not job.is_detached:
        on_end_of_input(interrupts.stop)
    device = device_of_rank()
    sinks = (EventFile(folder, lambda: measure_memory(device)),) if is_first else ()

    def is_over() -> bool:
        return interrupts() or os.path.exists(folder / STOP)

    host = SinkHost(job.paths, sinks, is_over, str(device), waits_when_paused=False)
    with reporting(folder, is_first):
        try:
            result = train(job.request, host, job.prompt)
        except Cancelled:
            leave()
            raise
        if is_first:
            lora = result.lora
            Result(FINISHED, (lora.path, lora.name, lora.sha256, lora.folder), result.losses, result.report).write(
                folder
            )
    leave()
