"""What a request will take, told before it runs: with its memory settings chosen where it says auto, and what fits where it does not."""

from __future__ import annotations

from dataclasses import replace

from ..config.request import TrainRequest
from ..errors import UserError
from ..host import Host, Notice
from ..planner.auto_tune import choose_memory, describe, suggestion
from ..planner.estimator import make_estimator
from ..planner.memory_plan import Machine, MemoryPlan, this_machine
from .prepare import RunPlan, check_run


def plan_request(
    request: TrainRequest, host: Host, machine: Machine | None = None
) -> tuple[MemoryPlan, str, TrainRequest]:
    """The forecast of a request, what would make it fit ('' where it does), and the request as it would be run.

    Args:
        machine: another than this one.
    Raises:
        UserError: every problem of the request.
    """
    checked = check_run(request, host, {}, machine)
    request = checked.request
    estimator = make_estimator(
        request,
        checked.family,
        checked.index,
        machine or this_machine(checked.device, request.model.dtype),
        host.paths.cache,
    )
    if request.memory.mode == "auto":
        request = replace(request, memory=choose_memory(estimator, request))
    plan = estimator.plan(request)
    return plan, describe(suggestion(estimator, request, plan)) if plan.unfit() else "", request


def resolve_memory(plan: RunPlan, host: Host) -> tuple[RunPlan, MemoryPlan | None]:
    """The plan with its memory settings chosen, where mode is auto, and its forecast, whose first line is told.

    None where something can't be counted, such as a package's own kernel: a run does not fail for want of a forecast.
    """
    try:
        return _resolve_memory(plan, host)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        left = ", so that mode auto takes the settings as they are" if plan.request.memory.mode == "auto" else ""
        host.emit(Notice(f"no forecast of memory{left}: {type(error).__name__} {reason}", "warning"))
        return plan, None


def _resolve_memory(plan: RunPlan, host: Host) -> tuple[RunPlan, MemoryPlan]:
    estimator = make_estimator(
        plan.request, plan.family, plan.index, this_machine(plan.device, plan.request.model.dtype), host.paths.cache
    )
    if plan.request.memory.mode == "auto":
        plan = replace(plan, memory=choose_memory(estimator, plan.request))
    request = replace(plan.request, memory=plan.memory or plan.request.memory)
    found = estimator.plan(request)
    host.emit(Notice(found.first_line()))
    if plan.memory:
        host.emit(Notice(f"memory auto: {found.settings}"))
    if found.unfit():
        host.emit(Notice(f"the plan does not fit; {describe(suggestion(estimator, request, found))}", "warning"))
    return plan, replace(found, suggestion=lambda: describe(suggestion(estimator, request, _smaller(found))))


def _smaller(plan: MemoryPlan) -> MemoryPlan:
    """As if no phase fitted: memory ran out although the plan said it would not."""
    room = plan.machine
    return replace(
        plan,
        machine=replace(
            room,
            device_bytes=min(room.device_bytes, plan.device_peak),
            ram_bytes=min(room.ram_bytes, plan.ram_peak - 1),
        ),
    )
