"""Check before a full-rank run that the disk holds its checkpoints: each is as large as the model and more."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import UserError
from ..planner.estimates.disk import num_checkpoints
from ..planner.memory_plan import MemoryPlan, gb
from ..runs.layout import CHECKPOINTS
from .build import plan_batches
from .prepare import RunPlan


def free_bytes_of(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be on."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def refuse_full_disk(plan: RunPlan, estimate: MemoryPlan | None) -> None:
    """Raise UserError if a full-rank run's checkpoints and its model don't fit on the disk.

    While a checkpoint is written, those that it replaces are still there.
    """
    if estimate is None or not plan.request.adapter.is_full:
        return
    num_steps = plan_batches(plan.request, plan.index)[3]
    count = num_checkpoints(plan.request, num_steps)
    each = estimate.disk["checkpoints"] // max(1, count)
    written = sum(file.stat().st_size for file in (plan.folder / CHECKPOINTS).glob("step-*/*") if file.is_file())
    needed = (
        (count + (num_steps > plan.request.training.checkpoint_every > 0)) * each + estimate.disk["model"] - written
    )
    free = free_bytes_of(plan.folder)
    if free >= needed:
        return
    raise UserError.at(
        "output",
        f"{gb(free)} are free, and this run writes {gb(needed)}: {count} checkpoints of {gb(each)}, another one while it "
        f"is written, and {gb(estimate.disk['model'])} of models; free disk space, set output to another disk, or use a "
        "lower keep_checkpoints, or checkpoint_every 0",
    )
