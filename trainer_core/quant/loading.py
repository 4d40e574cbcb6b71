"""Load and quantize the base model and the text encoder, with only one full-precision layer in memory at a time."""

from __future__ import annotations

import copy
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
from ..storage.gguf.blocks import unpack_
from ..storage.packed.packed_header import is_packed
from .packages import missing_packages
from .quantizer import Quantizer, is_kept
from .weight_cache import CachedBase, base_key, forget_old

Convert = Callable[[str, nn.Linear], nn.Module]


class Source(Protocol):
    """The part of a model family that loading needs. See models/family.py."""

    name: str

    @property
    def full_precision(self) -> tuple[str, ...]: ...

    def identity(self, model: ModelConfig, part: str) -> str: ...

    def shared_transformer(self, model: ModelConfig) -> nn.Module: ...

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module: ...

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None: ...


def quantization_problems(config: QuantizationConfig, device: torch.device) -> list[Problem]:
    """Return a problem for each level that this machine can't use: a package or a kernel is missing.

    Imports packages, but loads no model.
    """
    problems = missing_packages(config)
    for field in ("level", "text_encoder"):
        if getattr(config, field) == AUTO:  # chosen later, among levels without requirements
            continue
        quantizer = _load_quantizer(getattr(config, field))
        reason = "" if quantizer.missing() else quantizer.unfit(device, _encoder_device(config, device))
        if reason:
            problems.append(Problem(field, f"{getattr(config, field)} {reason}"))
    return problems


def load_base(
    family: Source, model: ModelConfig, host: Host, device: torch.device, resident: bool = False
) -> nn.Module:
    """Return the frozen transformer for training and sampling. See load_quantized and Family.prepare_."""
    base = load_quantized(family, model, host, device, resident)
    family.prepare_(base, model)
    return base


def load_quantized(
    family: Source, model: ModelConfig, host: Host, device: torch.device, resident: bool = False
) -> nn.Module:
    """Return the frozen transformer, quantized as configured, from the cache if possible.

    Args:
        family: Family of the model.
        model: The model and its quantization.
        host: Receives progress; provides the cache folder.
        device: The run's device. With quantize_via "accelerator" layers are moved there one by one to be encoded.
        resident: The model goes to the device next: move each layer there when it is read, so that RAM never holds the
            whole model. False: the result is on the CPU. Small tensors, and a cached model, are on the CPU in any case.
    Raises:
        UserError: Files are missing or do not fit.
        Cancelled: Between two layers. The cache then contains shards without an index, which are written again.
    """
    config = model.quantization
    quantizer = _load_quantizer(config.level)
    if quantizer.is_plain:
        host.emit(PhaseStarted("load"))
        move = _mover(host, device) if resident else None
        if is_packed(model.transformer_file or model.repo):
            return family.load_transformer(model, _keep_blocks(quantizer, family.full_precision, move))
        return family.load_transformer(model, move)
    encoder = _encoder_device(config, device)
    keep = family.full_precision
    identity = sha256_text(family.name, family.identity(model, "transformer"))
    key = base_key(identity, config.level, quantizer, model.dtype, keep, encoder.type)
    root = Path(host.paths.cache) / "quantized"
    cached = CachedBase(root / key[:32], quantizer, lambda text: host.emit(Notice(text, "warning")))
    shared = family.shared_transformer(model)
    names = [name for name, m in shared.named_modules() if isinstance(m, nn.Linear) and not is_kept(name, keep)]
    host.emit(PhaseStarted("load", len(names), "layers"))
    if config.cached_bases and cached.is_there:
        base = copy.deepcopy(shared)
        if cached.fill_(base):
            return base
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
        return layer.to(device) if resident else layer

    base = family.load_transformer(model, convert)
    if writer:
        writer.finish(base)
    forget_old(root, config.cached_bases)
    return base


def _keep_blocks(quantizer: Quantizer, keep: tuple[str, ...], move: Convert | None) -> Convert:
    """Return a converter that leaves weights as a GGUF or quantized file stores them, except for layers in full precision."""

    def convert(name: str, linear: nn.Linear) -> nn.Module:
        layer = unpack_(linear) if is_kept(name, keep) else quantizer.layer(linear)
        return move(name, layer) if move else layer

    return convert


def text_converter(config: QuantizationConfig, device: torch.device, file: str = "") -> Convert | None:
    """Return the function that quantizes the text encoder's layers while they are loaded.

    None if the text encoder keeps the model's precision, and its file does not store weights in fewer bits.

    Args:
        config: The quantization.
        device: The run's device.
        file: The text encoder's single file, "" if there is none.
    """
    quantizer = _load_quantizer(config.text_encoder)
    if quantizer.is_plain and not is_packed(file):
        return None
    return lambda name, linear: quantizer.layer(linear, _encoder_device(config, device))


def interruptible(convert: Convert | None, host: Host, device: torch.device, resident: bool) -> Convert | None:
    """Return a converter that checks between two layers whether the user has canceled.

    Args:
        convert: Quantizes a layer; None: it keeps its precision.
        host: Raises Cancelled.
        device: The run's device.
        resident: See load_quantized.
    """
    move = _mover(host, device) if resident else None
    if convert is None:
        return move

    def convert_and_move(name: str, linear: nn.Linear) -> nn.Module:
        host.check_cancelled()
        layer = convert(name, linear)
        return layer.to(device) if resident else layer

    return convert_and_move


def _mover(host: Host, device: torch.device) -> Convert | None:
    """Return the function that moves each layer to the device when it is read. None on a CPU: nothing has to move."""
    if device.type == "cpu":
        return None

    def move(name: str, linear: nn.Linear) -> nn.Module:
        host.check_cancelled()
        return linear.to(device)

    return move


def text_identity(family: Source, model: ModelConfig) -> str:
    """Return the identity of everything that determines an embedding: the text encoder and its quantization."""
    identity, level = family.identity(model, "text_encoder"), model.quantization.text_encoder
    quantizer = _load_quantizer(level)
    return identity if quantizer.is_plain else sha256_text(identity, level, quantizer.version)


def _load_quantizer(level: str) -> Quantizer:
    return load("quantization", level)()


def _encoder_device(config: QuantizationConfig, device: torch.device) -> torch.device:
    return device if config.quantize_via == "accelerator" else torch.device("cpu")
