"""The base and the text encoder, quantised while they are read: of the full weights one layer is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..config.model import AUTO, ModelConfig, QuantizationConfig
from ..errors import Problem
from ..host import Host, Notice, PhaseProgress, PhaseStarted
from ..registry import load
from ..storage.atomic import sha256_text
from .packages import missing_packages
from .quantizer import Quantizer, is_kept
from .weight_cache import CachedBase, base_key, forget_old

Convert = Callable[[str, nn.Linear], nn.Module]


class Source(Protocol):
    """The part of a family that loading asks. See models/family.py."""

    name: str

    @property
    def full_precision(self) -> tuple[str, ...]: ...

    def identity(self, model: ModelConfig, part: str) -> str: ...

    def empty_transformer(self, model: ModelConfig) -> nn.Module: ...

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module: ...

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None: ...


def quantization_problems(config: QuantizationConfig, device: torch.device) -> list[Problem]:
    """Levels that this machine can't do: a package is missing, or the device has no kernel for it. Loads packages, no model."""
    found = missing_packages(config)
    for field in ("level", "text_encoder"):
        if getattr(config, field) == AUTO:  # chosen later, among those that need nothing
            continue
        quantizer = _quantizer(getattr(config, field))
        reason = "" if quantizer.missing() else quantizer.unfit(device, _encoder(config, device))
        if reason:
            found.append(Problem(field, f"{getattr(config, field)} {reason}"))
    return found


def load_base(family: Source, model: ModelConfig, host: Host, device: torch.device) -> nn.Module:
    """The frozen transformer as it is trained and drawn with, see load_quantized and Family.prepare_."""
    base = load_quantized(family, model, host, device)
    family.prepare_(base, model)
    return base


def load_quantized(family: Source, model: ModelConfig, host: Host, device: torch.device) -> nn.Module:
    """The frozen transformer on the CPU, quantised as the model asks, from the cache where it lies there.

    Args:
        device: the run's; with quantize_via "accelerator" layers visit it one by one to be encoded.
    Raises:
        UserError: files are missing or do not fit.
        Cancelled: between two layers; the cache then holds shards without an index, and they are written anew.
    """
    config = model.quantization
    quantizer = _quantizer(config.level)
    if quantizer.is_plain:
        host.emit(PhaseStarted("load"))
        return family.load_transformer(model)
    encoder = _encoder(config, device)
    keep = family.full_precision
    identity = sha256_text(family.name, family.identity(model, "transformer"))
    key = base_key(identity, config.level, quantizer, model.dtype, keep, encoder.type)
    root = Path(host.paths.cache) / "quantized"
    cached = CachedBase(root / key[:32], quantizer, lambda text: host.emit(Notice(text, "warning")))
    empty = family.empty_transformer(model)
    names = [name for name, m in empty.named_modules() if isinstance(m, nn.Linear) and not is_kept(name, keep)]
    host.emit(PhaseStarted("load", len(names), "layers"))
    if config.cached_bases and cached.fill_(empty):
        return empty
    writer = cached.writer() if config.cached_bases else None
    done = 0

    def convert(name: str, linear: nn.Linear) -> nn.Module:
        nonlocal done
        if is_kept(name, keep):
            return linear
        host.check_cancelled()
        layer = quantizer.layer(linear, encoder)
        if writer:
            writer.add(name, layer)
        done += 1
        host.emit(PhaseProgress("load", done, len(names)))
        return layer

    base = family.load_transformer(model, convert)
    if writer:
        writer.finish(base)
    forget_old(root, config.cached_bases)
    return base


def text_converter(config: QuantizationConfig, device: torch.device) -> Convert | None:
    """What quantises the text encoder's layers while they are read; None where it stays in the model's precision."""
    quantizer = _quantizer(config.text_encoder)
    if quantizer.is_plain:
        return None
    return lambda name, linear: quantizer.layer(linear, _encoder(config, device))


def text_identity(family: Source, model: ModelConfig) -> str:
    """Names what decides an embedding: the text encoder, and how it is quantised."""
    identity, level = family.identity(model, "text_encoder"), model.quantization.text_encoder
    quantizer = _quantizer(level)
    return identity if quantizer.is_plain else sha256_text(identity, level, quantizer.version)


def _quantizer(level: str) -> Quantizer:
    return load("quantization", level)()


def _encoder(config: QuantizationConfig, device: torch.device) -> torch.device:
    return device if config.quantize_via == "accelerator" else torch.device("cpu")
