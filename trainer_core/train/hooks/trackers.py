"""Trackers of a run: TensorBoard and W&B, where the request selects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ...devices import memory_in_use
from ...errors import Cancelled
from ...host import Paths
from ...runs.run_host import RunHost
from ...trackers.dispatch import LAST_SECONDS, TrackerSink, parse_trackers
from ...trackers.tracker import Opening
from ..prepare import RunPlan
from ..results.metadata import make_record

HURRIED_SECONDS = 1.0  # how long to wait for trackers after a second Ctrl-C


@contextmanager
def track_run(plan: RunPlan, prompt: Mapping[str, Any], host: RunHost) -> Iterator[RunHost]:
    """Yield a host that also sends events to the run's trackers. They are closed however the run ends."""
    names = parse_trackers(plan.request.training.trackers)
    if not names:
        yield host
        return
    sink = TrackerSink(names, opening_of(plan, prompt, host.paths), lambda: memory_in_use(plan.device))
    failed, seconds = False, LAST_SECONDS
    try:
        yield replace(host, trackers=sink)
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, Cancelled) and not host.event_log.ended_by_user
        seconds = HURRIED_SECONDS if isinstance(error, KeyboardInterrupt) else seconds
        raise
    finally:
        sink.close(failed, seconds)
        replace(host, trackers=sink).emit_tracker_notices()


def opening_of(plan: RunPlan, prompt: Mapping[str, Any], paths: Paths) -> Opening:
    """Return what trackers show of a run from its start.

    Its settings are the request with the versions, the trigger and the number of images.
    """
    record = make_record(plan, prompt, paths)
    settings = {
        **record["request"],
        "versions": record["versions"],
        "trigger": record["trigger"],
        "images": record["dataset"]["images"],
    }
    validation = plan.request.validation
    prompts = tuple(validation.library().values()) if validation else ()
    return Opening(plan.folder, plan.request.training.name, settings, prompts=prompts)
