"""ComfyUI guider with adaptive guidance: a CFGGuider that stops running the negative prompt once it has no effect.

This module is imported when the node runs, not when ComfyUI starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.samplers
from torch import Tensor

from ...trainer_core.flow.adaptive_guidance import AdaptiveGuidance, GuidanceRun

CORRECTING = ("sample_heun", "sample_heunpp2", "sample_exp_heun_2_x0", "sample_exp_heun_2_x0_sde")
NEVER = 1.0  # threshold


class AdaptiveGuider(comfy.samplers.CFGGuider):
    """CFGGuider with the adaptive guidance of ValidateSampler (flow/adaptive_guidance.py).

    Model patches that run before, after or instead of CFG are called as CFGGuider calls them.

    Args:
        model: ComfyUI model patcher.
        guidance: adaptive guidance settings.
        compare: after each run, sample again with CFG at every step, and report the difference.
        show: called with one line of text after each run.
    """

    def __init__(self, model: Any, guidance: AdaptiveGuidance, compare: bool, show: Callable[[str], None]):
        super().__init__(model)
        self.set_cfg(guidance.cfg)
        self.guidance, self.compare, self.show = guidance, compare, show
        self.guidance_run: GuidanceRun | None = None

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **keywords: Any
    ) -> Tensor:
        """Sample, without state from earlier runs."""
        run = self._start(self.guidance, sampler, sigmas)
        latents = super().sample(noise, latent_image, sampler, sigmas, *args, **keywords)
        difference = None
        if self.compare and sigmas.shape[-1] > 0:
            self._start(replace(self.guidance, threshold=NEVER), sampler, sigmas)
            full = super().sample(noise, latent_image, sampler, sigmas, *args, **keywords)
            difference = relative_difference(latents, full)
        self.show(summary(run, difference))
        return latents

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """Return the guided denoised latents of one evaluation. Called by ComfyUI's samplers."""
        assert self.guidance_run is not None, "sample() starts a run"
        options = model_options or {}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        model = self.inner_model

        def predict(with_negative: bool) -> tuple[Tensor, Tensor | None]:
            if not with_negative:
                alone = comfy.samplers.sampling_function(model, x, timestep, None, positive, 1.0, options, seed)
                return alone, None
            conds = [positive, negative]
            arguments = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": options}
            batch = options.get("sampler_calc_cond_batch_function")
            out = batch(arguments) if batch else comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
            for patch in options.get("sampler_pre_cfg_function", []):
                out = patch({**arguments, "conds_out": out, "cond_scale": self.cfg, "timestep": timestep})
            return out[0], out[1]

        def combine(cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
            return comfy.samplers.cfg_function(
                model, cond, uncond, cfg, x, timestep, model_options=options, cond=positive, uncond=negative
            )

        return self.guidance_run.denoise(float(timestep.max()), predict, combine)

    def _start(self, guidance: AdaptiveGuidance, sampler: Any, sigmas: Tensor) -> GuidanceRun:
        start_sigma = self.model_patcher.get_model_object("model_sampling").percent_to_sigma(guidance.cfg_start_pct)
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        run = guidance.start(sigmas.tolist(), float(start_sigma), corrects=name in CORRECTING)
        self.guidance_run = run
        return run


def relative_difference(latents: Tensor, full: Tensor) -> float:
    """Return |a - b| / |b| over all elements, with a the latents and b the latents of full CFG."""
    return float((latents.float() - full.float()).norm() / full.float().norm().clamp(min=1e-12))


def summary(run: GuidanceRun, difference: float | None) -> str:
    """Return the line that is shown under the node."""
    all_passes = run.alone + run.both
    settled = "" if run.settled_step is None else f", positive prompt only after step {run.settled_step + 1}"
    compared = "" if difference is None else f"; latents differ by {difference:.2%} from CFG at every step"
    return f"{run.alone} of {all_passes} negative passes skipped ({run.share_skipped:.0%}){settled}{compared}"
