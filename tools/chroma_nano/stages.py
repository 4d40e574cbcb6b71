"""The order of things: pictures, VAE, latents, base, assets. Each stage leaves a file that the next ones find."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from torch import Tensor

from . import autoencoder, base, character, dataset, pictures, styles
from .neon import neon
from .publish import publish
from .text import save_tokenizer, train_tokenizer
from .training import Budget, Checkpoint, say


@dataclass(frozen=True)
class Pictures:
    """all: what the VAE sees; taught: what the transformer sees; sources, others: held out of both."""

    all: list[pictures.Emoji]
    taught: list[pictures.Emoji]
    sources: list[pictures.Emoji]
    others: list[pictures.Emoji]


def run(options: Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    every = pictures.load_emoji(pictures.fetch_package(options.work))
    training, sources, others = pictures.split(every)
    drawn = Pictures(training, [e for e in training if pictures.is_taught(e)], sources, others)
    tokenizer = _tokenizer(drawn, options.work)
    if options.untrained or options.stage == "all":
        dataset.write(others, drawn.taught, options.assets / "neon-emoji")
        dataset.write_plain(drawn.taught, options.assets / "plain-emoji")
        character.write(every, options.assets / "zibbo")
    if options.untrained:
        vae = AutoencoderKL(**autoencoder.CONFIG, shift_factor=0.0, scaling_factor=1.0)
        say(publish(base.Nano(tokenizer.get_vocab_size()), vae, tokenizer, options.assets / "chroma-nano"))
        return
    if options.stage in ("all", "vae"):
        _vae(drawn, options)
    if options.stage in ("all", "decoder"):
        _decoder(drawn, options)
    if options.stage in ("all", "base"):
        _base(drawn, tokenizer, options)
    if options.stage in ("all", "publish"):
        _publish(drawn, tokenizer, options)


def _tokenizer(drawn: Pictures, work: Path) -> Tokenizer:
    file = work / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        save_tokenizer(train_tokenizer(drawn.taught), file.parent)
    return Tokenizer.from_file(str(file))


def _vae(drawn: Pictures, options: Namespace) -> None:
    if not (options.work / "vae" / "config.json").is_file():
        vae = autoencoder.train(
            drawn.all,
            drawn.sources + drawn.others,
            options.work,
            Budget(options.vae_minutes, options.steps),
            options.start,
        )
        vae.save_pretrained(options.work / "vae")


def _decoder(drawn: Pictures, options: Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(options.work / "vae")
    if not (options.work / "vae-final" / "config.json").is_file():
        autoencoder.refine_decoder_(
            vae, drawn.all, drawn.sources + drawn.others, options.work, Budget(options.decoder_minutes, options.steps)
        )
        vae.save_pretrained(options.work / "vae-final")


def _latents(vae: AutoencoderKL, emoji: list[pictures.Emoji]) -> Tensor:
    return autoencoder.encode(vae, autoencoder.plain(emoji))


def _styled_latents(vae: AutoencoderKL, emoji: list[pictures.Emoji]) -> dict[str, Tensor]:
    return {style: autoencoder.encode(vae, styles.render(style, emoji)) for style in styles.STYLES}


def _base(drawn: Pictures, tokenizer: Tokenizer, options: Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(options.work / "vae").requires_grad_(False)
    base.train(
        drawn.taught, _styled_latents(vae, drawn.taught), drawn.others, _latents(vae, drawn.others),
        tokenizer, vae, options.work, Budget(options.minutes, options.steps), options.start,
    )  # fmt: skip


def _publish(drawn: Pictures, tokenizer: Tokenizer, options: Namespace) -> None:
    """Weights of the newest state (a training that still runs is published as it stands), sample grid, log."""
    work, folder = options.work, options.assets / "chroma-nano"
    final = work / "vae-final"
    vae = AutoencoderKL.from_pretrained(final if final.is_dir() else work / "vae").requires_grad_(False)
    nano = base.Nano(tokenizer.get_vocab_size())
    checkpoint = Checkpoint.opened(work / "base.safetensors", nano)
    step, seconds, rows = checkpoint.load()
    nano.load_state_dict(checkpoint.average.values, strict=False)
    sizes = publish(nano, vae, tokenizer, folder)
    latents = base.draw(nano, tokenizer, base.PROMPTS)
    autoencoder.sheet(autoencoder.decode(vae, latents), 10, scale=2).save(folder / "samples.png")
    held_out = drawn.sources + drawn.others
    psnr = {
        "plain": autoencoder.reconstruction_psnr(vae, autoencoder.plain(held_out)),
        "neon": autoencoder.reconstruction_psnr(vae, np.stack([neon(e.rgba) for e in held_out])),
    }
    ends = {
        name: json.loads((work / f"{name}.log.json").read_text(encoding="utf-8"))[-1]
        for name in ("vae", "decoder")
        if (work / f"{name}.log.json").is_file()
    }
    log = {
        "bytes": sizes,
        "parameters": {
            n: sum(p.numel() for p in m.parameters()) for n, m in {**dict(nano.named_children()), "vae": vae}.items()
        },
        "pictures": {
            "vae": len(drawn.all),
            "transformer": len(drawn.taught),
            "neon": len(dataset.NEON),
            "held_out": len(drawn.others),
        },
        "steps": {"base": step, **{name: rows["step"] for name, rows in ends.items()}},
        "seconds": {"base": round(seconds), **{name: rows["seconds"] for name, rows in ends.items()}},
        "batch": base.BATCH,
        "held_out_psnr_db": {k: round(v, 2) for k, v in psnr.items()},
        "sampled_prompts": base.PROMPTS,
        "base": rows,
    }
    (folder / "training-log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    say(f"published: step {step}, {sum(sizes.values())} bytes, {log['held_out_psnr_db']}")
