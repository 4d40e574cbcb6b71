"""The host of a command: its folders, its device and the machines that train with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..console import Console
from ..errors import Problem, UserError
from ..host import Machines, SinkHost
from ..paths import local_paths
from .interrupts import Interrupts


def make_host(arguments: argparse.Namespace, sinks: tuple = (), interrupts: Any = lambda: False) -> SinkHost:
    """Return the host of a command with the options of a workflow.

    Args:
        arguments: the command's.
        sinks: what sees its events.
        interrupts: whether the user has canceled it.
    """
    config = Path(arguments.model_config) if arguments.model_config else None
    paths = local_paths(
        [Path(p) for p in arguments.models],
        Path(arguments.output or "output"),
        [Path(p) for p in arguments.datasets],
        config,
        getattr(arguments, "allow_url", ()),
    )
    machines, device = machines_of(arguments), getattr(arguments, "device", "") or _device_of_rank()
    return SinkHost(paths=paths, sinks=sinks, is_cancelled=interrupts, device=device, machines=machines)


def tool_host(arguments: argparse.Namespace) -> SinkHost:
    """Return the host of a tool that reports progress and can be canceled."""
    defaults = {"models": [], "datasets": [], "model_config": None, "output": None}
    return make_host(argparse.Namespace(**{**defaults, **vars(arguments)}), (Console(),), Interrupts())


def quiet_host(arguments: argparse.Namespace) -> SinkHost:
    """Return the host of a tool that writes no output folder and can't be canceled in order."""
    return make_host(argparse.Namespace(**{**vars(arguments), "output": None}), (Console(),))


def machines_of(arguments: argparse.Namespace) -> Machines:
    """Return the machines that train together: --nodes, --node and --meet."""
    count, number, meeting = (getattr(arguments, name, None) for name in ("nodes", "node", "meet"))
    if count is None and number is None and not meeting:
        return Machines()
    host, colon, port = (meeting or "").rpartition(":")
    problems = []
    if not count or count < 2:
        problems.append(Problem("--nodes", f"is {count}; give the number of machines, at least 2"))
    if number is None or not 0 <= number < (count or number + 1):
        problems.append(Problem("--node", f"is {number}; give the number of this machine, 0 to {(count or 1) - 1}"))
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        text = (
            f"is {meeting!r}; give the name or address of machine 0 and a free port of it, such as 192.168.1.10:29500"
        )
        problems.append(Problem("--meet", text))
    if problems:
        raise UserError(problems)
    assert count and number is not None and meeting
    return Machines(count, number, meeting)


def _device_of_rank() -> str:
    """Return the device of this process where a launcher started several; "" where it runs by itself."""
    from ..distributed.device_list import device_of_rank, num_launched

    return str(device_of_rank()) if num_launched() else ""
