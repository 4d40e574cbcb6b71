"""AdaptiveGuider: a guider for ComfyUI's samplers. comfyui/adaptive_guider.py has its implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ..trainer_core.config.guidance import THRESHOLD, CfgStart, DisabledSteps, Threshold, UncondZeroScale
from ..trainer_core.host import Host
from ..trainer_core.spec import Advanced, Doc, NodeSpec, Output, Range, Socket


@dataclass(frozen=True, kw_only=True)
class Inputs:
    model: Annotated[Any, Socket("MODEL"), Doc("The model to sample with, including LoRAs and patches.")]
    positive: Annotated[Any, Socket("CONDITIONING"), Doc("The positive prompt.")]
    negative: Annotated[Any, Socket("CONDITIONING"), Doc("The negative prompt: what CFG steers away from.")]
    threshold: Threshold = THRESHOLD
    cfg: Annotated[float, Range(1.0, 30.0, 0.1), Doc("Classifier-free guidance scale while both prompts run.")] = 3.0
    uncond_zero_scale: UncondZeroScale = 0.0
    cfg_start_pct: CfgStart = 0.0
    initial_disabled_steps: DisabledSteps = 0
    compare: Annotated[
        bool,
        Doc(
            "Sample a second time with CFG at every step, and report the difference of the latents. Takes twice as "
            "long."
        ),
        Advanced(),
    ] = False


def run(inputs: Inputs, host: Host) -> tuple[Any]:
    """Return a guider for ComfyUI."""
    from ..trainer_core.flow.adaptive_guidance import AdaptiveGuidance
    from .comfyui.adaptive_guider import AdaptiveGuider  # imports ComfyUI, so this node runs only there

    guidance = AdaptiveGuidance(
        cfg=inputs.cfg,
        threshold=inputs.threshold,
        uncond_zero_scale=inputs.uncond_zero_scale,
        cfg_start_pct=inputs.cfg_start_pct,
        initial_disabled_steps=inputs.initial_disabled_steps,
    )
    guider = AdaptiveGuider(inputs.model, guidance, inputs.compare, getattr(host, "show", print))
    guider.set_conds(inputs.positive, inputs.negative)
    return (guider,)


SPEC = NodeSpec(
    id="AdaptiveGuider",
    title="Adaptive Guider",
    category="ChromaTrainer/sampling",
    description="CFG that stops running the negative prompt once it has almost no effect, and reports how many forward "
    "passes were skipped. For SamplerCustomAdvanced.",
    inputs=Inputs,
    outputs=(Output("guider", "GUIDER", "The guider, for SamplerCustomAdvanced."),),
    run=run,
    search_aliases=("guidance", "cfg", "adaptive guidance", "cfgguider", "guider"),
)
