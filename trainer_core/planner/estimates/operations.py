"""Estimate the operations of each phase of a run, as if no cache held a text, a latent or a quantized base yet."""

from __future__ import annotations

from ...config.request import TrainRequest
from ...config.training import EVAL_SIGMAS, LEAK_PROBES, LEAK_SIGMAS
from ..cost_model import ModelCost, forward_flops, step_flops
from ..step_peak import blocks_to_recompute
from ..workload import MAX_TOKENS, RunFacts, rollout_passes

# Operations per pixel of the released VAE, counted on the meta device at 256, 512 and 1024 px: 4.16, 4.26 and 4.66
# million to encode, 9.50, 9.59 and 9.99 million to decode.
VAE_ENCODE_FLOPS, VAE_DECODE_FLOPS = 4_160_000, 9_500_000


def phase_flops(
    request: TrainRequest, facts: RunFacts, cost: ModelCost, sampled: ModelCost | None, whole: ModelCost | None
) -> dict[str, int]:
    """Return the operations by phase. For the arguments, see estimate_run."""
    training = request.training
    step = step_flops(cost, blocks_to_recompute(request, len(cost.blocks)))
    rollouts = rollout_passes(training, facts.prior)
    extra_passes = round(facts.prior.some * forward_flops(cost) + rollouts * forward_flops(whole or cost))
    if training.preservation:  # a pass of the base model, and a second one with its gradients
        extra_passes += forward_flops(cost) + step
    vae = facts.codec.width**2
    flops = {
        "text": facts.encoder.flops * facts.text_tokens // MAX_TOKENS,
        "latents": int(facts.encoded_pixels * VAE_ENCODE_FLOPS * vae),
        "eval": evaluations(request, facts) * _eval_flops(facts, whole or cost)
        + leak_passes(request, facts) * forward_flops(whole or cost) // facts.largest.batch,
        "train": (step + extra_passes) * training.accumulation * facts.num_steps,
    }
    if request.validation is not None and sampled is not None:
        passes = facts.validation_passes
        images = passes // (request.validation.steps * (2 if request.validation.cfg > 1 else 1))
        decoding = images * facts.validation_pixels * VAE_DECODE_FLOPS * vae
        flops["validate"] = int(passes * forward_flops(sampled) + decoding) + images * facts.score.flops
    return flops


def evaluations(request: TrainRequest, facts: RunFacts) -> int:
    """Return how often the loss is measured: before and after, and with held-out images at every checkpoint."""
    every = request.training.checkpoint_every
    return 2 + ((facts.num_steps - 1) // every if request.training.holdout and every else 0)


def leak_passes(request: TrainRequest, facts: RunFacts) -> int:
    """Return the forward passes of the leak meter: at the start, at every checkpoint and at the end."""
    training = request.training
    has_trigger = any(part.trigger.strip() and not part.prior_preservation for part in request.dataset.parts)
    if not has_trigger or not training.eval_images:
        return 0
    checkpoints = (facts.num_steps - 1) // training.checkpoint_every if training.checkpoint_every else 0
    sampling = LEAK_PROBES * (len(LEAK_SIGMAS) - 1) // 2  # by the base model, from noise
    return 2 * LEAK_PROBES * (2 + checkpoints) + sampling


def _eval_flops(facts: RunFacts, cost: ModelCost) -> int:
    return facts.eval_images * len(EVAL_SIGMAS) * forward_flops(cost) // facts.largest.batch
