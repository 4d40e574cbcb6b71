"""Write checkpoints of shared-out weights while the training continues, as background_save.py those of whole ones.

The ranks agree on who writes which rows and copy them to RAM together, between two steps. Then a thread of each rank
writes its file. Threads exchange nothing: once a step the ranks compare whether all of them have finished, and only then
rank 0 renames the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....distributed.ranks import Ranks
from ....errors import one_line
from ....full_rank.shard_files import ShardWriter
from ....host import Host
from ...step.state import TrainState
from ..background_save import BackgroundSave
from ..checkpoint import report_saved, staged, unwritable
from .sharded_checkpoint import find_saved_together, finish_together, shares_of


class ShardedBackgroundSave(BackgroundSave):
    """At most one checkpoint that the ranks write. All ranks call each method together.

    Args:
        host: Receives the reports, in the thread of the training.
        ranks: The processes that train together.
    """

    def __init__(self, host: Host, ranks: Ranks):
        super().__init__(host)
        self.ranks, self._staging = ranks, Path()

    def start(self, folder: Path, state: TrainState, then: Callable[[Path], None]) -> bool:
        assert self._thread is None, "wait() comes first"
        if find_saved_together(folder, state):
            return False
        contents = shares_of(state, folder)
        needed = contents.own_bytes * self.ranks.local_size  # the ranks of a machine share its RAM
        if not all(self.ranks.together(lambda: self._has_room(needed))):
            return False
        saved, step, num_bytes = json.loads(json.dumps(contents.saved)), state.step, contents.num_bytes
        with staged(folder, step, num_bytes, self.ranks) as staging:
            writer = contents.give(ShardWriter(staging, self.ranks.rank, copies=True))

        def finish() -> None:
            with unwritable(staging, self.ranks):
                target = finish_together(staging, saved, writer, self.ranks)
            if self.ranks.is_main:
                report_saved(target, step, self.host)
            then(target)

        self._staging = staging
        # A rank that ends alone does not wait for its file: nobody would rename the folder.
        self._begin(writer.write, finish, daemon=True)
        return True

    def poll(self) -> None:
        if (thread := self._thread) is not None and all(self.ranks.together(lambda: not thread.is_alive())):
            self.wait()

    def _end(self, error: BaseException | None, finish: Callable[[], None]) -> None:
        errors = self.ranks.together(lambda: _as_json(error))
        first = next((values for values in errors if values), None)
        if first is None:
            finish()
        elif first[0] is None:
            raise RuntimeError(f"a checkpoint can't be written: {first[1]}") from error
        else:
            with unwritable(self._staging, self.ranks):
                raise OSError(*first) from error


def _as_json(error: BaseException | None) -> list[Any] | None:
    """Return the number and the text of an error; the number is None if it is not of the disk."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return [error.errno or 0, error.strerror or one_line(error)]
    return [None, one_line(error)]
