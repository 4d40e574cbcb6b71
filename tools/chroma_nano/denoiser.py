"""Text encoder and transformer, trained together from nothing by flow matching.

    x_sigma = (1 - sigma) x0 + sigma noise,   loss = |v_hat(x_sigma, sigma, text) - (noise - x0)|^2,   sigma ~ density "chroma"

Path, density, loss, sampling levels and the model's call are trainer_core's own; here are the two models' sizes, the batches
and the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from chroma_trainer.trainer_core.families.chroma import ChromaFamily
from chroma_trainer.trainer_core.families.chroma_transformer import ChromaTransformer2DModel
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.flow.schedule import sampling_sigmas
from chroma_trainer.trainer_core.flow.timesteps import density
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from .pictures import Emoji, caption
from .training import Average, Budget, Checkpoint, generator, say

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "axes_dims_rope": [4, 14, 14],
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 128,
    "approximator_layers": 2,
}
TEXT = {
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 3,
    "d_ff": 256,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BATCH = 64
LEARNING_RATE = 1.5e-3
AVERAGE = 0.998
CAPTION_DROPOUT = 0.1
MAX_TOKENS = 24
WEIGHTS = {  # how often a category is drawn: flags and people are many and alike, things are what prompts ask for
    "flags": 0.5,
    "people & body": 0.6,
    "symbols": 0.8,
    "animals & nature": 1.6,
    "food & drink": 1.6,
    "smileys & emotion": 1.5,
}
NUM_EVALUATED = 240
REPORT_EVERY_S = 180.0
FAMILY = ChromaFamily()


class Denoiser(nn.Module):
    """The text encoder and the transformer, with the batching that lies between them."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = T5EncoderModel(T5Config(vocab_size=tokenizer.get_vocab_size(), **TEXT))
        self.transformer = ChromaTransformer2DModel(**TRANSFORMER)
        # Gates and the final projection start at zero: every block begins as the identity (Peebles & Xie 2023).
        for layer in (self.transformer.distilled_guidance_layer.out_proj, self.transformer.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """(k + 1, width) each: the real tokens and one pad, of which the encoder masks the pad."""
        ids = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        ids = [i if len(i) <= MAX_TOKENS else [*i[: MAX_TOKENS - 1], 1] for i in ids]
        longest = max(map(len, ids)) + 1
        table = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, i in enumerate(ids):
            table[row, : len(i)] = torch.tensor(i)
            mask[row, : len(i)] = 1
        hidden = self.text_encoder(input_ids=table, attention_mask=mask)[0]
        return [hidden[row, : len(i) + 1] for row, i in enumerate(ids)]

    def forward(self, x_sigma: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        return FAMILY.predict(self.transformer, x_sigma, sigma, self.encode(prompts))


Reporter = Callable[[Denoiser, dict], None]


def train(
    emoji: list[Emoji],
    latents: Tensor,
    held_out: tuple[list[Emoji], Tensor],
    tokenizer: Tokenizer,
    work: Path,
    budget: Budget,
    report: Reporter,
    seed: int = 2,
) -> tuple[Denoiser, list[dict]]:
    """The trained pair (averaged weights) and its log.

    Args:
        latents: normalised, (N, 16, 8, 8), one a picture of `emoji`.
        held_out: pictures that are only evaluated, with their latents.
        report: called every REPORT_EVERY_S with the averaged model and the log's newest row.
    """
    torch.manual_seed(seed)
    model = Denoiser(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(model, AVERAGE)
    checkpoint = Checkpoint(work / "denoiser.safetensors", model, average, optimizer)
    step, budget.spent_s, log = checkpoint.load()
    weights = torch.tensor([WEIGHTS.get(e.group, 1.0) for e in emoji])
    running, reported_at = 0.0, budget.seconds()
    seen = slice(None, None, max(1, len(emoji) // NUM_EVALUATED))

    def row() -> dict:
        evaluated = {"train": (emoji[seen], latents[seen]), "held_out": held_out}
        losses = with_average(model, average, lambda m: {k: evaluate(m, *v) for k, v in evaluated.items()})
        return {"step": step, "seconds": round(budget.seconds()), "loss": round(running, 4), **losses}

    while budget.fraction(step) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * budget.rate(step)
        g = generator(seed, "denoiser", step)
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=g)
        u = torch.rand(BATCH, 3, generator=g)
        prompts = ["" if c < CAPTION_DROPOUT else caption(emoji[r], a, b) for r, (a, b, c) in zip(rows.tolist(), u.tolist(), strict=True)]
        strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=g, dtype=torch.float64)) / BATCH
        sigma = density("chroma").quantile(strata).float()  # one draw in each 64th of the distribution: less noise in the mean
        x0 = latents[rows]
        x, v = interpolate(x0, torch.randn(x0.shape, generator=g), sigma)
        loss = velocity_loss(model(x, sigma, prompts), v).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_(step)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            say(f"denoiser step {step} loss {running:.4f} {budget.fraction(step):.1%} {budget.seconds() / step:.3f} s/step")
        if budget.seconds() - reported_at > REPORT_EVERY_S:
            log.append(row())
            say(str(log[-1]))
            with_average(model, average, lambda m: report(m, log[-1]))
            reported_at = budget.seconds()
        if checkpoint.due():
            checkpoint.save(step, budget.seconds(), log)
    log.append(row())
    checkpoint.save(step, budget.seconds(), log)
    model.load_state_dict(average.values, strict=False)
    return model.eval().requires_grad_(False), log


def with_average(model: Denoiser, average: Average, act: Callable):
    """act(model) while it holds the averaged weights."""
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(average.values, strict=False)
    try:
        with torch.no_grad():
            return act(model)
    finally:
        model.load_state_dict(live, strict=False)


@torch.no_grad()
def evaluate(model: Denoiser, emoji: Sequence[Emoji], latents: Tensor) -> float:
    """Loss by name captions at noise and sigmas that never change: comparable between any two evaluations."""
    g = generator(0, "evaluation")
    noise = torch.randn(latents.shape, generator=g)
    sigma = density("chroma").quantile((torch.arange(len(latents), dtype=torch.float64) + 0.5) / len(latents)).float()
    sigma = sigma[torch.randperm(len(sigma), generator=g)]
    x, v = interpolate(latents, noise, sigma)
    losses = [
        velocity_loss(model(x[i : i + 60], sigma[i : i + 60], [e.name for e in emoji[i : i + 60]]), v[i : i + 60])
        for i in range(0, len(emoji), 60)
    ]
    return round(torch.cat(losses).mean().item(), 4)


@torch.no_grad()
def sample(model: Denoiser, prompts: Sequence[str], *, steps: int = 26, cfg: float = 3.5, seed: int = 0) -> Tensor:
    """Normalised latents of many prompts at once; ComfyUI's convention: `beta` levels, shift 1, euler, real CFG."""
    noise = torch.randn(len(prompts), 16, 8, 8, generator=generator(seed, "samples"))
    sigmas = sampling_sigmas("beta", steps)
    texts, empty = model.encode(prompts), model.encode([""]) * len(prompts)
    x = sigmas[0] * noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        s = sigma.expand(len(prompts))
        v = FAMILY.predict(model.transformer, x, s, texts)
        if cfg != 1:
            unconditional = FAMILY.predict(model.transformer, x, s, empty)
            v = unconditional + cfg * (v - unconditional)
        x = x + (following - sigma) * v
    return x


