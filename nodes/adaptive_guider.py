"""AdaptiveGuider: for ComfyUI's samplers. What the node is stands here; what it does in ComfyUI, in comfyui/adaptive_guider.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ..trainer_core.config.guidance import THRESHOLD, CfgStart, DisabledSteps, Threshold, UncondZeroScale
from ..trainer_core.host import Host
from ..trainer_core.spec import Advanced, Doc, NodeSpec, Output, Range, Socket


@dataclass(frozen=True, kw_only=True)
class Inputs:
    model: Annotated[Any, Socket("MODEL"), Doc("The model to sample with, LoRAs and patches included.")]
    positive: Annotated[Any, Socket("CONDITIONING"), Doc("What to draw.")]
    negative: Annotated[Any, Socket("CONDITIONING"), Doc("What CFG steers away from.")]
    threshold: Threshold = THRESHOLD
    cfg: Annotated[float, Range(1.0, 30.0, 0.1), Doc("Strength of CFG while both prompts run.")] = 3.0
    uncond_zero_scale: UncondZeroScale = 0.0
    cfg_start_pct: CfgStart = 0.0
    initial_disabled_steps: DisabledSteps = 0
    compare: Annotated[
        bool,
        Doc(
            "Sample a second time with CFG at every step, and report how far apart the latents are. Takes twice as long."
        ),
        Advanced(),
    ] = False


def run(inputs: Inputs, host: Host) -> tuple[Any]:
    from ..trainer_core.flow.adaptive_guidance import AdaptiveGuidance
    from .comfyui.adaptive_guider import AdaptiveGuider  # ComfyUI's own classes: this node runs nowhere else

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
    description="CFG that stops running the negative prompt once that changes next to nothing, and tells how many of its "
    "passes were saved. For SamplerCustomAdvanced.",
    inputs=Inputs,
    outputs=(Output("guider", "GUIDER", "For SamplerCustomAdvanced."),),
    run=run,
    search_aliases=("guidance", "cfg", "adaptive guidance", "cfgguider", "guider"),
)
