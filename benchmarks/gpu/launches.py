"""How many kernels a step launches, and how long the device waits for the next one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from context import Context
from machine import wait
from operator_counter import OperatorCounter
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Event = tuple[str, int, int]  # name, start and length in nanoseconds
COPIES = ("Memcpy", "Memset")
# What the host calls. A graph of many kernels is one call.
CALLS = ("LaunchKernel", "LaunchKernelExC", "LaunchKernelEx", "LaunchCooperativeKernel", "GraphLaunch")
GRAPH_CALL = "GraphLaunch"
SHOWN = 12


def launches_of(step: Callable[[], Any], context: Context) -> dict[str, Any]:
    """Of one step: kernels and copies, seconds in which any of them runs, and the share of the step in which none does.

    Without CUDA operations are counted as they are dispatched, views and allocations left out; seconds mean nothing.
    """
    if not context.is_cuda:
        return _dispatched(step)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        wait(context.device)
        began = time.perf_counter()
        step()
        wait(context.device)
        seconds = time.perf_counter() - began
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    all_events = list(results.events())
    events = [
        (e.name(), e.start_ns(), e.duration_ns())
        for e in all_events
        if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()
    ]
    return figures_of(events, seconds) | calls_of(e.name() for e in all_events if e.device_type() != DeviceType.CUDA)


def calls_of(names: Iterable[str]) -> dict[str, int]:
    """How often the host launched something, of the names of what it called; of these, graphs."""
    words = [name.removeprefix("cuda").removeprefix("cu") for name in names if name.startswith("cu")]
    called = [word for word in words if word.partition("_")[0] in CALLS]
    return {"host_calls": len(called), "graph_calls": sum(word.startswith(GRAPH_CALL) for word in called)}


def figures_of(events: list[Event], seconds: float) -> dict[str, Any]:
    """Of what ran on the device in a step that took so many seconds."""
    kernels = [event for event in events if not event[0].startswith(COPIES)]
    busy = busy_seconds((start, start + length) for _, start, length in kernels)
    return {
        "count": len(kernels), "copies": len(events) - len(kernels), "seconds": round(seconds, 4),
        "busy_seconds": round(busy, 4), "kernel_seconds": round(sum(length for _, _, length in kernels) / 1e9, 4),
        "idle_share": round(max(0.0, 1 - busy / seconds), 3), "longest": _longest(kernels),
    }  # fmt: skip


def write_trace(step: Callable[[], Any], context: Context, path: Path) -> None:
    """One step as a chrome trace, host and device."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.is_cuda else [])]
    with profile(activities=activities) as profiled:
        step()
        wait(context.device)
    profiled.export_chrome_trace(str(path))


def busy_seconds(spans: Iterable[tuple[int, int]]) -> float:
    """Of spans in nanoseconds, which may overlap."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e9


def _longest(kernels: list[Event]) -> list[dict[str, Any]]:
    seconds: Counter[str] = Counter()
    counts = Counter(name for name, _, _ in kernels)
    for name, _, length in kernels:
        seconds[name] += length
    return [
        {"kernel": name[:100], "count": counts[name], "seconds": round(length / 1e9, 5)}
        for name, length in seconds.most_common(SHOWN)
    ]


def _dispatched(step: Callable[[], Any]) -> dict[str, Any]:
    with OperatorCounter() as counter:
        step()
    return {
        "count": sum(counter.counts.values()),
        "idle_share": None,
        "counted": "operations",
        "most": dict(counter.counts.most_common(SHOWN)),
    }
