"""Save the LoRA of a run and the LoRA of its best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapters.files.export import ExportedLora, export_lora
from ...config.request import TrainedLora
from ...devices import DTYPES
from ...host import Host, LoraSaved, Notice
from ...runs import layout
from ...runs.saved_loras import keep_other_lora
from ..hooks.checkpoint import weights_of
from ..hooks.eval_loss import best_step
from ..hooks.eval_weights import final_weights
from ..prepare import RunPlan
from ..step.state import TrainState
from .metadata import lora_metadata
from .report import draw_chart
from .save_model import save_best_model, save_model


def _export(plan: RunPlan, state: TrainState, path: Path, metadata: Mapping[str, str], host: Host) -> ExportedLora:
    """Write the LoRA in the requested precision, or in fp32 where rounding would change what the LoRA does.

    fp16 has no values below 6e-8.
    """
    config = plan.request.adapter

    def write(precision: str) -> ExportedLora:
        dtype = DTYPES[precision]
        return export_lora(state.layers, state.transformer, path, metadata, dtype, config.format, staging=plan.folder)

    try:
        return write(config.precision)
    except RuntimeError as error:
        if config.precision == "fp32":
            raise
        host.emit(
            Notice(f"{path.name} is saved in fp32, because {config.precision} would change it ({error})", "warning")
        )
        return write("fp32")


def save_lora(plan: RunPlan, state: TrainState, record: Mapping[str, Any], host: Host) -> TrainedLora:
    """Save the LoRA of the current step, or the model of a full-rank run, and draw the loss chart."""
    saved = save_model(plan, state, record, host) if state.is_full else _save_adapter(plan, state, record, host)
    draw_chart(plan, state, record)
    return saved


def _save_adapter(plan: RunPlan, state: TrainState, record: Mapping[str, Any], host: Host) -> TrainedLora:
    path = layout.lora_path(host.paths.output, state.config.name)
    with final_weights(state), keep_other_lora(path, plan.folder, host):
        saved = _export(plan, state, path, lora_metadata(plan, state, record), host)
    host.emit(LoraSaved(path, saved.sha256, saved.applied, saved.num_keys))
    listed = layout.listed_name(path, host.paths.output)
    return TrainedLora(str(path), listed, saved.sha256, plan.request.model, str(plan.folder))


def save_best_lora(
    plan: RunPlan, state: TrainState, checkpoints: Path, record: Mapping[str, Any], host: Host
) -> dict[str, Any] | None:
    """Save the LoRA of the checkpoint with the lowest loss on held-out images as NAME-best.

    Returns:
        The values of `best` in report.json; None where no images are held out.
    """
    step = best_step(state)
    if step is None:
        return None
    mean, error = state.eval_losses[step]
    best = {"step": step, "eval_loss": mean, "standard_error": error}
    path, checkpoint = (
        layout.lora_path(host.paths.output, state.config.name, best=True),
        checkpoints / layout.step_name(step),
    )
    host.emit(Notice(f"step {step} has the lowest loss on held-out images; it is saved as {path.name}"))
    if state.is_full:
        path, sha256 = save_best_model(plan, state, checkpoint, record, host)
        return {**best, "lora": str(path), "sha256": sha256}
    with weights_of(state, checkpoint), keep_other_lora(path, plan.folder, host):
        metadata = {**lora_metadata(plan, state, record), "ss_steps": str(step)}
        saved = _export(plan, state, path, metadata, host)
    host.emit(LoraSaved(path, saved.sha256, saved.applied, saved.num_keys))
    return {**best, "lora": str(path), "sha256": saved.sha256}
