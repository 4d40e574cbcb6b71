"""Sample latents from noise with the Euler method, like ComfyUI's euler sampler for flow models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..flow.adaptive_guidance import AdaptiveGuidance
from ..flow.sigmas import sampling_sigmas, shift_as_comfyui
from ..models.family import Family

OnStep = Callable[[int, int, Tensor], None]


def starting_noise(width: int, height: int, *, seed: int, channels: int, factor: int) -> Tensor:
    """Return the noise that ComfyUI uses for one image with this seed.

    Args:
        width: Image width in pixels, a multiple of factor.
        height: Image height in pixels, a multiple of factor.
        seed: The seed.
        channels: Latent channels.
        factor: Pixels per latent cell along each edge.
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
    """Sample the latents of one image.

    Each step: denoised = x - sigma v,   d = (x - denoised) / sigma,   x += d (sigma_next - sigma).
    CFG combines the denoised latents of two forward passes; at cfg 1.0 there is only one pass.

    Args:
        family: The model family.
        transformer: The model, on its device. Its mode (train or eval) is not changed.
        text_pos: Prompt embedding, (tokens, width).
        text_neg: Negative prompt embedding, (tokens, width). May be None only at cfg 1.0.
        width: Image width in pixels.
        height: Image height in pixels.
        steps: Sampling steps.
        cfg: CFG scale. Ignored if `guidance` is given, which has its own.
        seed: Seed of the starting noise, which is generated on the CPU.
        channels: Latent channels, see ImageCodec.
        factor: Pixels per latent cell along each edge, see ImageCodec.
        scheduler: See flow/sigmas.py.
        shift: See flow/sigmas.py.
        guidance: Adaptive guidance. None: CFG at every step.
        on_step: Called after each step with (steps done, total steps, denoised latents (1, C, h, w) on the device).
            May raise to stop sampling.
        reference: Reference latents, (1, channels, h, w), for models that take them.
    Returns:
        (1, channels, height / factor, width / factor), fp32, on the device, for ImageCodec.decode.
    """
    num_levels = family.num_noise_levels(transformer)
    sigmas = sampling_sigmas(scheduler, steps, shift, num_levels)
    adaptive = guidance or AdaptiveGuidance(cfg=cfg, threshold=1.0)
    starts_at = shift_as_comfyui(torch.tensor(1 - adaptive.cfg_start_pct), shift, num_levels)
    run = adaptive.start(sigmas.tolist(), float(starts_at))
    device = next(transformer.parameters()).device
    extra_inputs: dict[str, Any] = {} if reference is None else {"reference": reference}
    noise = starting_noise(width, height, seed=seed, channels=channels, factor=factor)
    x = (sigmas[0] * noise).to(device)
    num_steps = len(sigmas) - 1
    with family.drawing(transformer):
        for i in range(num_steps):
            sigma, sigma_next = sigmas[i].to(device), sigmas[i + 1].to(device)

            def predict(with_negative: bool, x: Tensor = x, sigma: Tensor = sigma) -> tuple[Tensor, Tensor | None]:
                def denoise(text: Tensor) -> Tensor:
                    return x - family.predict(transformer, x, sigma.expand(1), [text], **extra_inputs).float() * sigma

                assert text_neg is not None or not with_negative, "CFG needs the negative prompt's embedding"
                return denoise(text_pos), denoise(text_neg) if with_negative and text_neg is not None else None

            denoised = run.denoise(float(sigmas[i]), predict)
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
            if on_step is not None:
                on_step(i + 1, num_steps, denoised)
    return x
