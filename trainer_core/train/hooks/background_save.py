"""Write checkpoints of a whole model while the training continues (kind full).

Weights and optimizer states are copied to RAM between two steps, which takes seconds; a thread writes the copy to the
disk, which takes minutes. The checkpoint appears by one rename, as always. A run that is killed meanwhile resumes from
the one before. Everything else happens in the thread of the training: the copy, the report, the deletion of older
checkpoints, and the error of a write that failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from ...devices import free_bytes
from ...host import Host, Notice
from ...planner.phase_estimate import SPARE_RAM
from ..step.state import TrainState
from .checkpoint import contents_of, find_saved, report_saved, write_checkpoint

CPU = torch.device("cpu")


class BackgroundSave:
    """At most one checkpoint that is being written.

    Args:
        host: Receives the reports, in the thread of the training.
    """

    def __init__(self, host: Host):
        self.host = host
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finish: Callable[[], None] = lambda: None
        self._has_warned = False

    def start(self, folder: Path, state: TrainState, then: Callable[[Path], None]) -> bool:
        """Copy the state, and begin to write it as a checkpoint.

        Args:
            folder: The run's folder of checkpoints.
            state: The run, between two steps.
            then: Called with the checkpoint's folder in the thread of the training, once it is written.
        Returns:
            False if there is too little RAM for a copy, or the checkpoint is there already. Nothing has begun then.
        Raises:
            UserError: A weight is not finite, or the disk has too little space.
        """
        assert self._thread is None, "wait() comes first"
        if find_saved(folder, state):
            return False
        contents = contents_of(state, folder)
        if not self._has_room(contents.num_bytes):
            return False
        contents = contents.copied()
        target, host = contents.target(folder), self.host

        def finish() -> None:
            report_saved(target, contents.step, host)
            then(target)

        self._begin(lambda: write_checkpoint(folder, contents), finish)
        return True

    def _begin(self, write: Callable[[], object], finish: Callable[[], None], daemon: bool = False) -> None:
        """Call `write` in a thread, and `finish` in the thread of the training once it has returned."""

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised by wait()
                self._error = error

        self._finish = finish
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=daemon)
        self._thread.start()

    def poll(self) -> None:
        """Finish the checkpoint if it is written. Called between two steps.

        Raises:
            UserError: It could not be written.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and finish it. Raises as poll does."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        finish, self._finish = self._finish, lambda: None  # it holds the copy
        self._end(error, finish)

    def _end(self, error: BaseException | None, finish: Callable[[], None]) -> None:
        if error is not None:
            raise error
        finish()

    def _has_room(self, num_bytes: int) -> bool:
        needed, available = num_bytes + SPARE_RAM, free_bytes(CPU)
        if needed > available and not self._has_warned:
            self._has_warned = True
            text = (
                f"the training waits while a checkpoint is written: a copy of it takes {num_bytes / 1e9:.1f} GB of "
                f"RAM, and {available / 1e9:.1f} GB are free"
            )
            self.host.emit(Notice(text))
        return needed <= available
