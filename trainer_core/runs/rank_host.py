"""The hosts of a run that several ranks train. Rank 0 talks to the user; what others have to say comes through it.

Every other rank writes its events as lines of RUN/ranks/rank-N.log, and nothing else of the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ..console import Console
from ..distributed.ranks import Ranks
from ..host import Event, Host, Notice, RunOpened
from . import layout
from .run_host import ForwardingHost, RunHost


@dataclass(frozen=True)
class RankHost(ForwardingHost):
    """The environment of one of several ranks."""

    ranks: Ranks

    @property
    def waits_when_paused(self) -> bool:
        """All processes end when the run is paused, so that their memory is free."""
        return False


@dataclass(frozen=True)
class MainHost(RankHost):
    """The host of rank 0. It remembers the warnings that the user has seen, which other ranks meet too."""

    shown: set[str] = field(default_factory=set)

    def emit(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.shown.add(event.text)
        self.host.emit(event)


@dataclass(frozen=True)
class PeerHost(RankHost):
    """The host of any other rank: it logs events to the rank's own file, and lets rank 0 show its warnings."""

    log: PeerLog

    def emit(self, event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            self.ranks.warnings.append(event.text)
        self.log(event)

    def begin(self, step: int, num_steps: int, losses: Sequence[float]) -> None:
        """As RunHost.begin. There is nothing to record: rank 0 does."""


class PeerLog:
    """Writes events as lines to RUN/ranks/rank-N.log. Those from before the folder is known are held until then."""

    def __init__(self, rank: int):
        self.rank, self.waiting = rank, list[Event]()
        self._console: Console | None = None
        self._closed = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self._open(event.folder)
        if self._console is None:
            if not self._closed:
                self.waiting.append(event)
            return
        with suppress(OSError, ValueError):  # a full disk does not end the run
            self._console(event)

    def _open(self, folder: Path) -> None:
        self._closed = True
        with suppress(OSError):
            path = layout.rank_log(folder, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            stream: TextIO = path.open("a", encoding="utf-8")
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            self._console = Console(stream)
            waiting, self.waiting = self.waiting, []
            for event in waiting:
                self._console(event)


def host_of_rank(host: Host, ranks: Ranks) -> Host:
    """Return the host of this rank; the host itself where there is one process."""
    if ranks.size == 1:
        return host
    return MainHost(host, ranks) if ranks.is_main else PeerHost(host, ranks, PeerLog(ranks.rank))


def show_warnings(host: RunHost, ranks: Ranks) -> None:
    """Show what other ranks warned of since the last call, unless rank 0 has met the same.

    Args:
        host: the host of the run on rank 0, whose event log gets the warnings too.
    """
    texts, ranks.received[:] = list(ranks.received), []
    shown = host.host.shown if isinstance(host.host, MainHost) else ()
    for name, text in texts:
        if text not in shown:
            host.emit(Notice(f"{name}: {text}", "warning"))
