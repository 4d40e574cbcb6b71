"""Full-size Chroma and Flux on a GPU: seconds a step, share of the limit, and memory. `python benchmarks/gpu.py` (under 8 minutes)

The model has the true size and random weights, made on the device: they cost the same as real ones. Measured are
precisions, rounded products, 512 and 1024 px, checkpointing intervals, compiled blocks and attention kernels; text of 80 tokens, batch 1, rank 16
on "all+ffs", fused AdamW. Each case takes `--steps` steps after two to warm up (compiled: four), and is left out when `--minutes` are
over; a case that fails (out of memory, a package that is missing) says so and the next one begins.

The limit, per step: FLOPs = tokens * 2 * linear weights + attention (4 T^2 width a block), backward the same for linear layers (frozen:
no gradients of weights) and 2.5 times for attention, one forward more for each block that is checkpointed; divided by --tflops, or by
what a large matrix product reaches here.

`--tiny` runs the same on a CPU with a tiny model, to prove this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.devices import pick_device
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models.attention_backends import (
    attention_fault,
    compile_blocks_,
    compiler_fault,
    set_attention_,
)
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.flux.transformer import FluxTransformer
from chroma_trainer.trainer_core.quant.low_precision_matmul import choose_products_
from chroma_trainer.trainer_core.registry import PARTS, load
from torch import nn

MODELS: dict[str, Any] = {"chroma": ChromaTransformer, "flux": FluxTransformer}
RESULT = Path(__file__).resolve().parent / "results" / "gpu.json"
TINY = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
TINY_PARTS: dict[str, dict[str, int]] = {
    "chroma": {"approximator_hidden_dim": 64, "approximator_layers": 2},
    "flux": {"pooled_projection_dim": 32},
}
TEXT_TOKENS, RANK = {"chroma": 80, "flux": 512}, 16  # Flux's pads are attended


@dataclass(frozen=True)
class Case:
    """interval: every so many-th block is checkpointed, 0 none."""

    level: str = "none"
    edge: int = 512
    interval: int = 1
    compiled: bool = False
    attention: str = "native"
    products: str = "exact"
    family: str = "chroma"


def cases() -> list[Case]:
    """Most telling first: time may run out."""
    levels = [
        name
        for name in ("none", "int8-quanto", "nf4-bnb", "int4-quanto", "fp8-quanto")
        if name in PARTS["quantization"]
    ]
    found = [Case(edge=edge) for edge in (512, 1024)]
    found += [Case(edge=1024, compiled=True), Case(edge=512, compiled=True)]
    found += [Case(level=level) for level in levels[1:]]
    rounded = [Case(level="int8-quanto", products="int8"), Case(level="fp8-native", products="fp8")]
    found += [replace(case, compiled=True) for case in rounded] + rounded
    found += [replace(case, compiled=True, edge=1024) for case in rounded]
    found += [Case(edge=edge, interval=interval) for edge in (512, 1024) for interval in (0, 2, 4)]
    found += [Case(edge=1024, interval=0, compiled=True), Case(level="int8-quanto", compiled=True)]
    found += [Case(edge=1024, attention=name) for name in ("flash", "cudnn", "efficient")]
    found += [Case(level=level, edge=1024) for level in levels[1:]]
    found[6:6] = [Case(family="flux", level=level, edge=edge) for level, edge in (("int8-quanto", 512), ("none", 1024))]
    return list(dict.fromkeys(found))


def build(case: Case, device: torch.device, is_tiny: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model with random weights on the device, quantised, adapted, checkpointed and compiled as the case says."""
    dtype, family = torch.float32 if is_tiny else torch.bfloat16, load("family", case.family)()
    with torch.device("meta"):
        transformer = MODELS[case.family](**({**TINY, **TINY_PARTS[case.family]} if is_tiny else {}))
    transformer = transformer.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    transformer.restore_buffers_()
    transformer.requires_grad_(False).eval().to(device)
    transformer.guidance = 1.0  # as a Flux is told
    transformer = load("quantization", case.level)().quantize_(transformer, family.full_precision)
    choose_products_(transformer, case.products)
    names = resolve_targets(transformer, family, "all+ffs")
    layers = inject_(transformer, names, RANK, RANK, generator=torch.Generator().manual_seed(0))
    set_attention_(transformer, case.attention)
    if case.compiled:
        torch._dynamo.reset()
        compile_blocks_(family.blocks(transformer), backend="aot_eager" if is_tiny else "inductor")
    if case.interval:
        checkpoint_blocks_(family.blocks(transformer), case.interval)
    return transformer.to(device), [parameter for _, parameter in trainable_parameters(layers)]


def stepper(transformer: Any, parameters: list[nn.Parameter], case: Case, device: torch.device) -> Callable[[], float]:
    """One training step; returns the loss, which waits for the device."""
    edge, family = case.edge, load("family", case.family)()
    rows = TEXT_TOKENS[case.family] + (case.family == "flux")  # one for the pooled text
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type in ("cuda", "cpu"))
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(1, 16, edge // 8, edge // 8, generator=generator).to(device)
    text = [torch.randn(rows, transformer.context_embedder.in_features, generator=generator).to(device)]

    def step() -> float:
        noise, sigma = torch.randn_like(x0), torch.rand(1, device=device)
        x_sigma, velocity = interpolate(x0, noise, sigma)
        loss = velocity_loss(family.predict(transformer, x_sigma, sigma, text), velocity).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def flops(transformer: Any, case: Case) -> float:
    """Of one step, see the module."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    tokens = TEXT_TOKENS[case.family] + (case.edge // 16) ** 2
    width = transformer.inner_dim
    num_double, num_single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    # A token goes through one stream of a double block (4 + 8 width^2), and all of a single one (3 + 4 + 5 width^2).
    linear = 2 * 12 * width**2 * (num_double + num_single) * tokens
    attention = 4 * tokens**2 * width * len(blocks)
    again = len(blocks[:: case.interval]) / len(blocks) if case.interval else 0.0
    return linear * (2 + again) + attention * (3.5 + again)


def matmul_flops(device: torch.device, dtype: torch.dtype, edge: int) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(edge, edge, device=device).to(dtype)
    for _ in range(3):
        a @ a
    _wait(device)
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    _wait(device)
    return 10 * 2 * edge**3 / (time.perf_counter() - began)


def measure(case: Case, device: torch.device, steps: int, limit: float, is_tiny: bool) -> dict[str, Any]:
    """Seconds a step (median), share of the limit, peak memory; or why not."""
    if case.compiled and (fault := compiler_fault(device)):
        return {"skipped": fault}
    if fault := attention_fault(case.attention, device, torch.float32 if is_tiny else torch.bfloat16):
        return {"skipped": fault}
    if fault := load("quantization", case.level)().missing():
        return {"skipped": fault}
    if case.products != "exact" and (fault := load("products", case.products)().unfit(device)):
        return {"skipped": fault}
    began = time.perf_counter()
    transformer, parameters = build(case, device, is_tiny)
    built = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = stepper(transformer, parameters, case, device)
    warm = time.perf_counter()
    for _ in range(4 if case.compiled else 2):
        step()
    warm = time.perf_counter() - warm
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    work = flops(transformer, case)
    return {
        "seconds_a_step": round(median(seconds), 4),
        "tflop_a_step": round(work / 1e12, 3),
        "share_of_limit": round(work / limit / median(seconds), 3),
        "peak_vram_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
        "build_seconds": round(built, 1),
        "warmup_seconds": round(warm, 1),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU at 64 and 128 px; proves this file"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--tflops", type=float, help="of the device, dense bf16; measured where it is not said")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cpu") if arguments.tiny else pick_device()
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    limit = (
        1e12 * arguments.tflops if arguments.tflops else matmul_flops(device, dtype, 256 if arguments.tiny else 8192)
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "limit_tflops": round(limit / 1e12, 3),
        "cases": [],
    }
    for case in cases():
        if time.perf_counter() - began > 60 * arguments.minutes:
            result["left_out"] = "time was over"
            break
        shown = Case(**{**asdict(case), "edge": case.edge // 8}) if arguments.tiny else case
        try:
            found = measure(shown, device, arguments.steps, limit, arguments.tiny)
        except (RuntimeError, ImportError) as error:  # out of memory, or a kernel that this device lacks
            found = {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
        result["cases"].append({**asdict(shown), **found})
        print(json.dumps(result["cases"][-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not arguments.tiny:  # after each case: what was measured stays if the machine goes
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
