"""Identify the weights of a run by their bytes and rules, never by their paths.

The identities are part of the names of runs and caches.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..adapters.files.peft_config import config_file
from ..config.adapter import NO_LORA
from ..config.request import TrainRequest
from ..errors import UserError
from ..models.family import Family
from ..quant.loading import text_identity
from ..runs.layout import CHECKPOINT_MANIFEST
from ..storage.atomic import sha256_of, sha256_text
from ..storage.stored_names import key_text


def weight_identities(request: TrainRequest, family: Family) -> dict[str, str]:
    """Return hex digests by part: those of the model, and init_lora ('' for none).

    Their order matters, because a run's digest is computed from them.

    Raises:
        UserError: a file can't be read.
    """
    return {**model_identities(request, family), "init_lora": init_identity(request)}


def model_identities(request: TrainRequest, family: Family) -> dict[str, str]:
    """Return hex digests of the model's parts: transformer, text_encoder, codec.

    Raises:
        UserError: a file can't be read.
    """
    return {
        "transformer": family.identity(request.model, "transformer"),
        "text_encoder": text_identity(family, request.model),
        "codec": latent_identity(family, request),
    }


def latent_identity(family: Family, request: TrainRequest) -> str:
    """Return the digest of everything that decides a latent's bits: the codec, with its tiling and slicing."""
    identity, rules = family.identity(request.model, "codec"), request.memory.vae_rules()
    return sha256_text(identity, rules) if rules else identity


def init_identity(request: TrainRequest) -> str:
    """Return the SHA-256 of the LoRA file that the run starts from, '' for none.

    With that of peft's config if it has one, or of the checkpoint's files where its optimizer state is continued.

    Raises:
        UserError: the file can't be read.
    """
    path = request.adapter.init_lora
    if path == NO_LORA:
        return ""
    try:
        digest = sha256_of(Path(path))
        if checkpoint := request.adapter.checkpoint:
            return sha256_text(digest, sha256_of(Path(checkpoint) / CHECKPOINT_MANIFEST))
        return digest if (file := config_file(path)) is None else sha256_text(digest, sha256_of(file))
    except OSError as error:
        raise UserError.at("init_lora", f"{path} can't be read: {error.strerror}") from error


def base_identity(request: TrainRequest, family: Family) -> str:
    """Return the digest of the frozen weights after quantization, in 16 hex digits. It names their folder on disk."""
    model = request.model
    stored = replace(model.quantization, products="exact")
    return sha256_text(family.identity(model, "transformer"), model.dtype, key_text(stored))[:16]
