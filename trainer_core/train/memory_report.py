"""Compare the predicted memory of a run with the measured one, and explain out-of-memory errors."""

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
    """Turn out of memory into a UserError that names the phase, the planned and measured memory, and what would fit."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        name = phases.current
        planned = next((phase for phase in plan.phases if phase.name == name), None) if plan else None
        prediction = (
            f"planned {gb(planned.device)} on the device and {gb(planned.ram)} of RAM" if planned else "not in the plan"
        )
        measured = peak_vram_bytes(device) or peak_ram_bytes()
        fallback = "Reduce the batch size or the resolution, or turn on an offload in MemorySettings"
        raise UserError.at(
            "memory",
            f"out of memory in the phase {name!r} ({prediction}, measured {gb(measured)} so far): {reason_of(error)}. "
            f"{plan.suggestion() if plan else fallback}. "
            "Caches and checkpoints written so far are intact; another program on the device may use memory as well",
        ) from error


def memory_report(plan: MemoryPlan | None, device: torch.device) -> dict[str, Any]:
    """Return predicted and measured memory for report.json.

    On a device the memory of tensors is measured, in RAM the resident memory of the whole process.
    """
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
    """Return predicted and measured peaks in one line."""
    measured, predicted = report["measured"], report["predicted"]
    parts = (("device_peak_bytes", "tensors on the device"), ("ram_peak_bytes", "RAM"))
    texts = []
    for name, words in parts:
        if measured[name]:
            prediction = f"predicted {gb(predicted[name])}, " if predicted else ""
            texts.append(f"{words} {prediction}measured {gb(measured[name])}")
    return "peak memory: " + "; ".join(texts)
