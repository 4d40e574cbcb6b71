"""Imported full fine-tunes: make the values of a workflow fit kind full, and report what it can't have."""

from __future__ import annotations

from typing import Any

from ..config.adapter import FULL
from ..config.optimizer import STEP_BEFORE
from ..setup.full_rank_check import ADAPTER, TRAINING
from .option_table import LOAD

# The whole model, as those trainers train it. Chroma's approximator is frozen in OneTrainer.
WHOLE = {"chroma": "all+ffs, norms, embedders", "flux": "*"}
CLIPPING = 1.0  # max_grad_norm of LoRATrainer where no value is imported


def is_full(draft: Any) -> bool:
    return draft.nodes.get("AdapterSettings", {}).get("kind") == FULL


def settle_full_rank(draft: Any, report: Any) -> None:
    """Remove what has no meaning without an adapter, and replace what contradicts steps inside of the backward pass."""
    if not is_full(draft):
        return
    _move(report, "-> AdapterSettings.kind ", "is only for LoRAs")
    for kind, reasons in (("LoRATrainer", TRAINING), ("AdapterSettings", ADAPTER)):
        for name, reason in reasons.items():
            _drop(draft, report, kind, name, reason)
    if "targets" not in draft.nodes["LoRATrainer"]:
        targets = draft.nodes["LoRATrainer"]["targets"] = WHOLE[draft.family]
        report.taken.append(("targets", f"the whole model -> LoRATrainer.targets {targets!r}"))
    _settle_steps(draft, report)
    _settle_model(draft, report)


def _drop(draft: Any, report: Any, kind: str, name: str, reason: str, is_missing: bool = False) -> None:
    """Remove a value. Its line moves to those of options that need no setting, or that are not there."""
    if name in draft.nodes.get(kind, {}):
        del draft.nodes[kind][name]
        _move(report, f"-> {draft.type_of(kind)}.{name} ", reason, is_missing)


def _move(report: Any, sets: str, reason: str, is_missing: bool = False) -> None:
    """Move the lines of options that set a field to those that need no setting, or that are not there."""
    moved = [(option, line) for option, line in report.taken if sets in line and FULL not in line]
    report.taken[:] = [line for line in report.taken if line not in moved]
    lines = report.missing if is_missing else report.equal
    lines += [(option, f"{line.partition(' -> ')[0]}: {reason}") for option, line in moved]


def _settle_steps(draft: Any, report: Any) -> None:
    training = draft.nodes["LoRATrainer"]
    count = training.get("accumulation", 1)
    if count > 1:
        batch = count * training.get("batch_size", 1)
        reason = f"kind full can't add the gradients of several passes; a batch_size of {batch} trains as many images"
        _drop(draft, report, "LoRATrainer", "accumulation", reason, is_missing=True)
    if limit := training.get("max_grad_norm", CLIPPING):
        draft.nodes.setdefault("OptimizerSettings", {})["clip_by"] = STEP_BEFORE
        text = f"at {limit:g}, by the norm of the step before -> OptimizerSettings.clip_by {STEP_BEFORE!r}"
        report.taken.append(("gradient clipping", text))


def _settle_model(draft: Any, report: Any) -> None:
    reason = "quantized weights can't be trained; they are in bf16"
    _drop(draft, report, "QuantizeModel", "level", reason, is_missing=True)
    quantize = draft.nodes.pop("QuantizeModel", {})
    if quantize.get("text_encoder"):
        draft.nodes["QuantizeModel"] = {**quantize, "level": "none"}
    if draft.nodes[LOAD].get("dtype") == "fp16":
        _drop(draft, report, LOAD, "dtype", "loses small steps; bf16 is used", is_missing=True)
        draft.nodes[LOAD]["dtype"] = "bf16"
