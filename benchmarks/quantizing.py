"""Peak memory and time of quantizing one layer, beside the same formula written plainly: `python benchmarks/quantizing.py`

Prints JSON: for each level the bytes of temporaries per weight and the seconds, of ours and of the plain formula, and
their ratios. The codes of both must be equal. Ratios of one run mean something on any machine; seconds do not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from chroma_trainer.trainer_core.quant.native import FP8, FP8_MAX, Fp8Native
from chroma_trainer.trainer_core.quant.quanto import Int4Quanto, Int8Quanto, group_size
from chroma_trainer.trainer_core.quant.rowwise import TINY
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

INT8_MAX = 127
SHAPE = (3072, 12288)  # a feed-forward layer of Chroma


def plain_int8(weight: Tensor) -> dict[str, Tensor]:
    exact = weight.float()
    scale = (exact.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=TINY)
    return {"codes": (exact / scale).round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8), "scale": scale}


def plain_fp8(weight: Tensor) -> dict[str, Tensor]:
    exact = weight.float()
    scale = (exact.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=TINY)
    return {"codes": (exact / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), "scale": scale}


def plain_int4(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.float().reshape(-1, group_size(weight.shape[1]))
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    offset = low.to(weight.dtype)
    codes = ((groups - offset.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    return {"packed": Int4Quanto()._pack(codes), "scale": scale, "offset": offset}


CASES: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], Callable[[Tensor], dict[str, Tensor]]]] = {
    "int8-quanto": (Int8Quanto().encode, plain_int8),
    "fp8": (Fp8Native().encode, plain_fp8),
    "int4-quanto": (Int4Quanto().encode, plain_int4),
}


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that torch held at one time during a call, with its result."""
    return with_peak_bytes(call)[1]


def with_peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return a call's result, and the most bytes that torch held at one time during the call, with the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    assert profiled.profiler and profiled.profiler.kineto_results
    held = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def measure(repeats: int) -> dict[str, Any]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    results: dict[str, Any] = {}
    for level, calls in CASES.items():
        ours, plain = (call(weight) for call in calls)
        assert all(torch.equal(ours[name].view(torch.uint8), plain[name].view(torch.uint8)) for name in plain), level
        peaks = [peak_bytes(lambda call=call: call(weight)) for call in calls]
        seconds = [float("inf")] * 2
        for _ in range(repeats):  # in turns, so that other programs slow both down
            for i, call in enumerate(calls):
                start = time.process_time()
                call(weight)
                seconds[i] = min(seconds[i], time.process_time() - start)
        results[level] = {
            "peak_bytes_a_weight": [round(peak / weight.numel(), 2) for peak in peaks],
            "cpu_seconds": [round(value, 3) for value in seconds],
            "peak_ratio": round(peaks[0] / peaks[1], 3),
            "time_ratio": round(seconds[0] / seconds[1], 3),
        }
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().repeats), indent=2))
