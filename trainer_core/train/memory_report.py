"""What a run says of its memory when it is over, well or not: predicted beside measured, and what would have fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..devices import is_out_of_memory, peak_ram_bytes, peak_vram_bytes
from ..errors import UserError, reason_of
from ..planner.memory_plan import MemoryPlan, gb
from .phase_timer import PhaseTimer


@contextmanager
def explain_oom(plan: MemoryPlan | None, phases: PhaseTimer, device: torch.device) -> Iterator[None]:
    """Out of memory becomes a UserError that names the phase, what was planned and measured, and what would fit."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        name = phases.current
        planned = next((phase for phase in plan.phases if phase.name == name), None) if plan else None
        said = (
            f"planned {gb(planned.device)} on the device and {gb(planned.ram)} of RAM" if planned else "not in the plan"
        )
        taken = peak_vram_bytes(device) or peak_ram_bytes()
        raise UserError.at(
            "memory",
            f"ran out in the phase {name!r} ({said}, measured {gb(taken)} by then): {reason_of(error)}. {plan.suggestion() if plan else 'Try less: batch, resolution, an offload of MemorySettings'}. "
            "What was cached and saved so far is kept; another program on the device may hold memory as well",
        ) from error


def memory_report(plan: MemoryPlan | None, device: torch.device) -> dict[str, Any]:
    """Predicted beside measured, for report.json. measured on a device: of tensors; RAM: resident, of the whole process."""
    device_bytes, ram = peak_vram_bytes(device), peak_ram_bytes()
    measured = {"device_peak_bytes": device_bytes, "ram_peak_bytes": ram}
    if plan is None:
        return {"predicted": None, "measured": measured}
    return {
        "predicted": plan.as_json(),
        "measured": measured,
        "predicted_over_measured": round(plan.device_peak / device_bytes, 3)
        if device_bytes
        else round(plan.ram_peak / ram, 3),
    }


def comparison(report: dict[str, Any]) -> str:
    """Predicted and measured peaks in one line."""
    measured, predicted = report["measured"], report["predicted"]
    parts = (("device_peak_bytes", "tensors on the device"), ("ram_peak_bytes", "RAM"))
    told = []
    for name, words in parts:
        if measured[name]:
            foretold = f"predicted {gb(predicted[name])}, " if predicted else ""
            told.append(f"{words} {foretold}measured {gb(measured[name])}")
    return "memory, at its peak: " + "; ".join(told)
