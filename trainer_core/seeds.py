"""Randomness without state: a generator for each (run seed, purpose, step, sample ...), so that neither resume nor the number of workers can change a run."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, *ids: int | str) -> int:
    """63 bits that depend on every argument."""
    text = "\x1f".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *ids: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator. Drawing on the CPU gives the same numbers on every device; another device is for draws too many for that.

    Shapes alone (the meta device) need no numbers, and any generator does.
    """
    device = torch.device(device)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed_of(seed, purpose, *ids))
