"""Estimate what a request takes before it runs, choose its memory settings in mode auto, and suggest what would fit."""

from __future__ import annotations

from dataclasses import replace

from ..config.request import TrainRequest
from ..distributed.device_list import devices_for, num_launched
from ..errors import UserError
from ..host import Host, Notice
from ..planner.auto_tune import advice, choose_memory, explain_choice
from ..planner.estimator import make_estimator
from ..planner.memory_plan import Machine, MemoryPlan, this_machine, with_memory
from .prepare import RunPlan, check_run, device_of


def machine_of(request: TrainRequest, host: Host) -> Machine:
    """Return this machine with the memory and the speed of the device that trains."""
    return this_machine(device_of(request, host), request.model.dtype)


def plan_request(
    request: TrainRequest, host: Host, machine: Machine | None = None
) -> tuple[MemoryPlan, str, TrainRequest]:
    """Estimate a request without running it.

    Args:
        machine: estimate for this machine; None: the one that this process runs on.
    Returns:
        The memory estimate, a suggestion that would make the request fit ('' where it fits), and the request as it
        would be run.
    Raises:
        UserError: all problems of the request.
    """
    count = max(1, len(devices_for(request.training)))
    whole = machine or machine_of(request, host)
    room = whole.shared_by(count)
    checked = check_run(request, host, {}, room if machine or count > 1 else None, needs_weights=False)
    request = checked.request
    estimator = make_estimator(request, checked.family, checked.index, room, host.paths.cache, count)
    choice = ""
    if request.memory.mode == "auto":
        memory = choose_memory(estimator, request)
        choice = explain_choice(estimator, request, memory)
        request = replace(request, memory=memory)
    plan = replace(estimator.plan(request), choice=choice)
    fix = advice(estimator, request, plan, checked.request) if plan.unfit() else ""
    if count > 1:
        plan = plan.on_devices(count, request.training.accumulation, whole, request.training.is_sharded)
    return plan, fix, request


def plan_for(request: TrainRequest, host: Host, vram_gb: float = 0.0, ram_gb: float = 0.0) -> tuple[MemoryPlan, str]:
    """Estimate a request for a machine that may be another one.

    Args:
        request: what would be trained.
        host: environment of the run.
        vram_gb: accelerator memory to plan for, in GB. 0: the free memory of this machine.
        ram_gb: RAM to plan for, in GB. 0: the free RAM of this machine.
    Returns:
        The estimate, and advice that makes the run fit ("" if it fits).
    """
    plan, fix, _ = plan_request(request, host, with_memory(machine_of(request, host), vram_gb, ram_gb))
    return plan, fix


def plan_text(plan: MemoryPlan, fix: str) -> str:
    """Return an estimate and its advice as text."""
    return plan.text() + (f"\n  {fix}" if fix else "")


def resolve_memory(plan: RunPlan, host: Host) -> tuple[RunPlan, MemoryPlan | None]:
    """Choose the memory settings in mode auto, and log the first line of the memory estimate.

    Returns:
        The plan with its memory settings, and the estimate. The estimate is None where something can't be counted, such
        as a package's own kernel: a run does not fail because the estimate does.
    """
    try:
        return _resolve_memory(plan, host)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        consequence = ", so mode auto uses the settings as they are" if plan.request.memory.mode == "auto" else ""
        host.emit(Notice(f"no memory estimate{consequence}: {type(error).__name__} {reason}", "warning"))
        return plan, None


def _resolve_memory(plan: RunPlan, host: Host) -> tuple[RunPlan, MemoryPlan]:
    machine = plan.machine or this_machine(plan.device, plan.request.model.dtype)
    count = num_launched() or 1
    estimator = make_estimator(plan.request, plan.family, plan.index, machine, host.paths.cache, count)
    if plan.request.memory.mode == "auto":
        plan = replace(plan, memory=choose_memory(estimator, plan.request))
    request = replace(plan.request, memory=plan.memory or plan.request.memory)
    estimate = estimator.plan(request)
    host.emit(Notice(estimate.first_line()))
    if plan.memory:
        host.emit(Notice(f"memory auto: {estimate.settings}"))
        estimate = replace(estimate, choice=explain_choice(estimator, plan.request, plan.memory))
        if estimate.choice:
            host.emit(Notice(estimate.choice))
    if estimate.unfit():
        host.emit(Notice(f"the plan does not fit; {advice(estimator, request, estimate, plan.request)}", "warning"))
    return plan, replace(estimate, suggestion=lambda: advice(estimator, request, _shrink(estimate), plan.request))


def _shrink(plan: MemoryPlan) -> MemoryPlan:
    """Return the plan on a smaller machine where its largest phase does not fit.

    For a run that was out of memory although the estimate said that it fits.
    """
    room = plan.machine
    return replace(
        plan,
        machine=replace(
            room,
            device_bytes=min(room.device_bytes, plan.device_peak),
            ram_bytes=min(room.ram_bytes, plan.ram_peak - 1),
        ),
    )
