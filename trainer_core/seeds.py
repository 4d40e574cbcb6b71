"""Stateless random numbers: one generator per (run seed, purpose, step, sample ...).

A run therefore does not depend on resuming or on the number of workers.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, *ids: int | str) -> int:
    """Return a 63-bit seed that depends on all arguments."""
    text = "\x1f".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *ids: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator, seeded from all arguments.

    Args:
        seed: seed of the run.
        purpose: what the random numbers are for.
        ids: further numbers or names, such as the step.
        device: the CPU gives the same numbers on every machine. Use another device only where the CPU is too slow. The
            meta device gets a CPU generator, because it needs no values.
    """
    device = torch.device(device)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed_of(seed, purpose, *ids))
