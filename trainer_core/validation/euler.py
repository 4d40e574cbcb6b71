"""From noise to latents, as ComfyUI's euler sampler does it on a flow model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..flow.adaptive_guidance import AdaptiveGuidance
from ..flow.sigma_density import shift_sigma
from ..flow.sigmas import sampling_sigmas
from ..models.family import Family

OnStep = Callable[[int, int, Tensor], None]


def starting_noise(width: int, height: int, *, seed: int, channels: int, factor: int) -> Tensor:
    """The noise that ComfyUI draws for one picture and this seed.

    Args:
        width, height: in pixels, multiples of factor.
        factor: pixels a latent cell, along an edge.
    Returns:
        (1, channels, height / factor, width / factor), fp32, on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, height // factor, width // factor, generator=generator, dtype=torch.float32)


@torch.no_grad()
def sample(
    family: Family,
    transformer: nn.Module,
    text_pos: Tensor,
    text_neg: Tensor | None,
    *,
    width: int,
    height: int,
    steps: int,
    cfg: float,
    seed: int,
    channels: int,
    factor: int,
    scheduler: str = "beta",
    shift: float = 1.0,
    guidance: AdaptiveGuidance | None = None,
    on_step: OnStep | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """One picture's latents.

    Each step: denoised = x - sigma v,   d = (x - denoised) / sigma,   x += d (sigma_next - sigma).
    With CFG the denoised latents of two real passes are combined; at cfg 1.0 a single pass runs.

    Args:
        transformer: the live model, on its device; its mode (train or eval) is left as it is.
        text_pos, text_neg: (tokens, width) each; text_neg may be None only at cfg 1.0.
        width, height: in pixels.
        cfg: strength of real CFG. Ignored where `guidance` is given: it has its own.
        seed: of the starting noise, which is drawn on the CPU.
        channels, factor: of the latents, as the ImageCodec says.
        scheduler, shift: see flow/sigmas.py.
        guidance: None: CFG at every step.
        on_step: called after each step with (steps done, steps in all, denoised latents (1, C, h, w) on the device).
            May raise to end the run.
        reference: latents that the picture starts from, (1, channels, h, w), for models that take them.
    Returns:
        (1, channels, height / factor, width / factor), fp32, on the device, as ImageCodec.decode takes them.
    """
    sigmas = sampling_sigmas(scheduler, steps, shift)
    plan = guidance or AdaptiveGuidance(cfg=cfg, threshold=1.0)
    run = plan.start(sigmas.tolist(), float(shift_sigma(torch.tensor(1 - plan.cfg_start_pct), shift)))
    device = next(transformer.parameters()).device
    beside: dict[str, Any] = {} if reference is None else {"reference": reference}
    noise = starting_noise(width, height, seed=seed, channels=channels, factor=factor)
    x = (sigmas[0] * noise).to(device)
    num_steps = len(sigmas) - 1
    with family.drawing(transformer):
        for i in range(num_steps):
            sigma, sigma_next = sigmas[i].to(device), sigmas[i + 1].to(device)

            def predict(with_negative: bool, x: Tensor = x, sigma: Tensor = sigma) -> tuple[Tensor, Tensor | None]:
                def denoise(text: Tensor) -> Tensor:
                    return x - family.predict(transformer, x, sigma.expand(1), [text], **beside).float() * sigma

                assert text_neg is not None or not with_negative, "CFG needs the negative prompt's embedding"
                return denoise(text_pos), denoise(text_neg) if with_negative and text_neg is not None else None

            denoised = run.denoise(float(sigmas[i]), predict)
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
            if on_step is not None:
                on_step(i + 1, num_steps, denoised)
    return x
