"""Text encoder and transformer together, by flow matching on latents that are computed once.

    x_sigma = (1 - sigma) x0 + sigma noise,   loss = mean((v(x_sigma, sigma, text) - (noise - x0))^2),   sigma ~ density "chroma"

Density, path, loss, packing and the transformer's forward are the trainer's own. Captions are drawn anew at every step,
one in ten is empty, so that sampling can be guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.flow.sigma_density import density
from chroma_trainer.trainer_core.flow.sigmas import sampling_sigmas
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5EncoderModel

from .autoencoder import decode, sheet
from .pictures import Emoji, caption, is_thing
from .styles import PLAIN, made_up_style, style_at, styled_caption
from .subjects import subjects
from .text import batch_ids, embed, new_encoder
from .training import Average, Budget, Checkpoint, generator, say

CONFIG = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "axes_dims_rope": [8, 12, 12],
    "approximator_num_channels": 128,
    "approximator_hidden_dim": 128,
    "approximator_layers": 2,
}
BATCH = 32
SORTED_BATCHES = 4  # captions are batched by length within so many batches: less padding
LEARNING_RATE = 1.5e-3
DROPOUT = 0.1
MADE_UP = 0.4  # of the plain captions: with a style's name that means nothing
AVERAGE = 0.999
SUBJECT_SHARE = 0.75  # of a batch: the 200 subjects; the rest are all things, see is_thing
EVALUATE_EVERY_S, SAMPLE_EVERY_S = 120.0, 480.0
PROMPTS = (
    "cat face", "red apple", "automobile", "grinning face", "pizza", "dog", "sunflower", "house building",
    "heart", "tree", "banana", "fish", "bird", "airplane", "clock face three oclock", "soccer ball",
    "smiling face with sunglasses", "strawberry", "blue heart", "guitar",
    "tiger", "rocket", "winking face", "carrot", "grey heart", "mushroom", "goat", "green heart", "purple apple", "blue car",
)  # fmt: skip


class Nano(nn.Module):
    """What is trained together."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = new_encoder(vocabulary)
        self.transformer = ChromaTransformer(**CONFIG)
        nn.init.zeros_(self.transformer.proj_out.weight)
        self._rope: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x_sigma: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """As ChromaFamily.predict, batched without a list and with the gradient of the text: (B, 16, 8, 8)."""
        height, width = x_sigma.shape[-2:]
        num_text, num_image = ids.shape[1], height * width // 4
        attended = torch.arange(num_text)[None] <= lengths[:, None]  # k real tokens and one pad
        mask = torch.cat([attended, attended.new_ones(len(ids), num_image)], dim=1)
        if num_text not in self._rope:
            self._rope[num_text] = self.transformer.pos_embed(
                torch.cat([torch.zeros(num_text, 3), image_ids(height, width)])
            )
        tokens = self.transformer(
            hidden_states=pack(x_sigma),
            encoder_hidden_states=embed(self.text_encoder, ids, lengths),
            timestep=sigma,
            attention_mask=None if attended.all() else mask,
            image_rotary_emb=self._rope[num_text],
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def load(folder: Path, tokenizer: Tokenizer) -> Nano:
    """A published pair, in fp32."""
    nano = Nano(tokenizer.get_vocab_size())
    nano.transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    nano.text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").float()
    return nano.eval().requires_grad_(False)


def train(
    emoji: list[Emoji], latents: dict[str, Tensor], held_out: list[Emoji], held_out_latents: Tensor,
    tokenizer: Tokenizer, vae: AutoencoderKL, work: Path, budget: Budget, start: Path | None = None, seed: int = 2,
) -> tuple[Nano, list[dict]]:  # fmt: skip
    """The trained pair (averaged weights) and its log.

    Args:
        latents: of the emoji in each style, (N, 16, 8, 8).
        start: a published pair that this training continues from.
    """
    torch.manual_seed(seed)
    nano = load(start, tokenizer).train().requires_grad_(True) if start else Nano(tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(nano.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = Average(nano, AVERAGE)
    checkpoint = Checkpoint(work / "base.safetensors", nano, average, optimizer)
    step, budget.spent_s, log = checkpoint.load()
    batches = Batches(emoji, latents, tokenizer, seed)
    places = {id(e): i for i, e in enumerate(emoji)}
    taught = [places[id(e)] for e in subjects(emoji)]
    tests = {
        "subjects": Test([emoji[i] for i in taught], latents[PLAIN][taught], tokenizer),
        "held_out": Test(held_out, held_out_latents, tokenizer),
    }
    if step == 0:
        _assert_same_as_family(nano, batches.draw(0))
    sigmas = density("chroma")
    evaluated_at = sampled_at = budget.seconds()
    running, began_at = 0.0, step
    while budget.fraction(step) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * budget.rate(step)
        x0, ids, lengths = batches.draw(step)
        g = generator(seed, "noise", step)
        sigma = sigmas.sample(len(x0), g).float()
        x_sigma, target = interpolate(x0, torch.randn(x0.shape, generator=g), sigma)
        loss = velocity_loss(nano(x_sigma, sigma, ids, lengths), target).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(nano.parameters(), 1.0)
        optimizer.step()
        average.update_(step)
        step += 1
        running += loss.item()
        seconds = budget.seconds()
        if seconds - evaluated_at > EVALUATE_EVERY_S or budget.fraction(step) >= 1:
            with Averaged(nano, average):
                row = {"step": step, "seconds": round(seconds), "loss": round(running / (step - began_at), 4)}
                row |= {name: round(test.loss(nano), 4) for name, test in tests.items()}
                log.append(row)
                say(f"base {row} {budget.fraction(step):.0%}")
                if seconds - sampled_at > SAMPLE_EVERY_S:
                    sheet(decode(vae, draw(nano, tokenizer, PROMPTS)), 10).save(work / f"samples-{step:06d}.png")
                    sampled_at = budget.seconds()
            running, began_at, evaluated_at = 0.0, step, budget.seconds()
        if checkpoint.due():
            checkpoint.save(step, budget.seconds(), log)
    checkpoint.save(step, budget.seconds(), log)
    Averaged(nano, average).__enter__()
    nano.eval().requires_grad_(False)
    return nano, log


class Batches:
    """Batch of a step: a function of (seed, step) alone. Emoji are sampled by SUBJECT_SHARE."""

    def __init__(self, emoji: Sequence[Emoji], latents: dict[str, Tensor], tokenizer: Tokenizer, seed: int):
        self.emoji, self.latents, self.tokenizer, self.seed = emoji, latents, tokenizer, seed
        often = {id(e) for e in subjects(emoji)}
        shares = torch.tensor([[id(e) in often, is_thing(e)] for e in emoji]).double()
        self.weights = (shares / shares.sum(0)) @ torch.tensor([SUBJECT_SHARE, 1 - SUBJECT_SHARE]).double()
        self.ids: dict[str, list[int]] = {}

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, 16, 8, 8), ids (B, longest + 1), lengths (B,)."""
        group, turn = divmod(step, SORTED_BATCHES)
        g = generator(self.seed, "batch", group)
        n = BATCH * SORTED_BATCHES
        rows = torch.multinomial(self.weights, n, replacement=True, generator=g).tolist()
        choices = torch.rand(n, 5, generator=g).tolist()
        drawn = [
            (self._ids(self._caption(row, *choice)), row, style_at(choice[3]))
            for row, choice in zip(rows, choices, strict=True)
        ]
        order = torch.randperm(SORTED_BATCHES, generator=g).tolist()
        start = order[turn] * BATCH
        part = sorted(drawn, key=lambda sample: len(sample[0]))[start : start + BATCH]
        ids, lengths = batch_ids([ids for ids, _, _ in part])
        return torch.stack([self.latents[style][row] for _, row, style in part]), ids, lengths

    def _caption(self, row: int, u: float, v: float, dropped: float, style: float, word: float) -> str:
        if dropped < DROPOUT:
            return ""
        name = style_at(style)
        if name != PLAIN:
            return styled_caption(self.emoji[row], name, u)
        if word < MADE_UP:
            return f"{made_up_style(word / MADE_UP)} style, {self.emoji[row].name}"
        return caption(self.emoji[row], u, v)

    def _ids(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer.encode(text).ids
        return self.ids[text]


class Test:
    """Loss at fixed noise and sigma, evenly spread over the density's quantiles, with the plain names as captions."""

    def __init__(self, emoji: Sequence[Emoji], latents: Tensor, tokenizer: Tokenizer):
        self.x0, n = latents, len(latents)
        self.noise = torch.randn(latents.shape, generator=generator(0, "test"))
        u = (torch.arange(n) * 0.6180339887 + 0.5) % 1
        self.sigma = density("chroma").quantile(u.double()).float()
        self.ids, self.lengths = batch_ids([tokenizer.encode(e.name).ids for e in emoji])

    @torch.no_grad()
    def loss(self, nano: Nano) -> float:
        x_sigma, target = interpolate(self.x0, self.noise, self.sigma)
        return velocity_loss(nano(x_sigma, self.sigma, self.ids, self.lengths), target).mean().item()


class Averaged:
    """The average in the model's place, as a context."""

    def __init__(self, nano: Nano, average: Average):
        self.nano, self.average = nano, average

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.nano.named_parameters():
            p.data, self.average.values[name] = self.average.values[name], p.data

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()


@torch.no_grad()
def draw(
    nano: Nano, tokenizer: Tokenizer, prompts: Sequence[str], steps: int = 20, cfg: float = 3.0, seed: int = 0
) -> Tensor:
    """Latents of the prompts, by Euler with classifier-free guidance against the empty caption."""
    x = torch.randn(len(prompts), 16, 8, 8, generator=generator(seed, "draw"))
    wanted = batch_ids([tokenizer.encode(p).ids for p in prompts])
    empty = batch_ids([tokenizer.encode("").ids] * len(prompts))
    sigmas = sampling_sigmas("beta", steps)
    for now, then in pairwise(sigmas):
        sigma = now.expand(len(x))
        v_empty = nano(x, sigma, *empty)
        x = x + (then - now) * (v_empty + cfg * (nano(x, sigma, *wanted) - v_empty))
    return x


@torch.no_grad()
def _assert_same_as_family(nano: Nano, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Training must see what the trainer's LoRA runs and samplers will compute."""
    x0, ids, lengths = batch
    sigma = torch.linspace(0, 1, len(x0))
    text = embed(nano.text_encoder, ids, lengths)
    trimmed = [row[: k + 1] for row, k in zip(text, lengths.tolist(), strict=True)]
    trained = nano.transformer.proj_out.weight.clone()
    nn.init.normal_(nano.transformer.proj_out.weight)  # zeros at the start, which would hide any difference
    difference = (
        (nano(x0, sigma, ids, lengths) - ChromaFamily().predict(nano.transformer, x0, sigma, trimmed)).abs().max()
    )
    nano.transformer.proj_out.weight.copy_(trained)
    assert difference < 1e-3, difference
