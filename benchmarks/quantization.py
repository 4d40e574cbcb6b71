"""What each level of quantisation, and its rounded products, cost in error, and save in memory. `python benchmarks/quantization.py`

A Chroma of 8 heads x 64, 4 double and 8 single blocks, random normal weights in fp32 (with --bf16 in bf16 as well); 16 picture
tokens at two noise levels, text of 8 and 16 tokens. Errors are relative (norm of the difference over the norm) to the same model in fp32: of the
velocity, and of the gradient of a rank-16 LoRA on all layers of the blocks. bytes: of the blocks' Linear weights, as a share of the same in
bf16. Seconds of a step (forward and backward, median) compare the levels on this machine alone: on a CPU decoding weighs far more
than on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.model import PRODUCTS, QuantizationConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.quant.low_precision_matmul import choose_products_
from chroma_trainer.trainer_core.registry import load, names
from models import surroundings
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "quantization.json"
FAMILY = ChromaFamily()
CONFIG = {
    "in_channels": 64, "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 64, "num_attention_heads": 8,
    "joint_attention_dim": 128, "axes_dims_rope": (16, 24, 24), "approximator_num_channels": 64,
    "approximator_hidden_dim": 256, "approximator_layers": 3,
}  # fmt: skip


def transformer(dtype: torch.dtype) -> nn.Module:
    """The model, from a seed; weights of bf16 are those of fp32, rounded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChromaTransformer.from_config(CONFIG)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=(3 * layer.in_features) ** -0.5)
    return model.to(dtype).requires_grad_(False).eval()


def inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(length, 128, generator=generator) for length in (8, 16)]
    return torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.3, 0.8]), text


def step(model: nn.Module, layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Velocity, and the LoRA's gradient in one vector."""
    velocity = FAMILY.predict(model, *inputs())
    found = torch.autograd.grad(velocity.square().mean(), [p for _, p in trainable_parameters(layers)])
    return velocity.detach(), torch.cat([grad.flatten() for grad in found])


def adapted(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    layers = inject_(model, resolve_targets(model, FAMILY, "all+ffs"), 16, 16, generator=generator)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.01, generator=generator)
    return layers


def num_bytes(model: nn.Module) -> int:
    """Of the blocks' Linear weights, without biases."""
    linears = [m for block in FAMILY.blocks(model) for m in block.modules() if isinstance(m, nn.Linear)]
    weights = [p for m in linears for name, p in m.named_parameters() if name != "bias"]
    return sum(p.numel() * p.element_size() for p in weights)


def relative(a: Tensor, b: Tensor) -> float:
    return float(f"{((a - b).norm() / b.norm()).item():.3g}")


def measure(
    level: str, products: str, dtype: torch.dtype, repeats: int, exact: tuple[Tensor, Tensor], bf16_bytes: int
) -> dict[str, Any]:
    model = transformer(dtype)
    began = time.perf_counter()
    load("quantization", level)().quantize_(model, FAMILY.full_precision)
    choose_products_(model, products)
    quantised = time.perf_counter() - began
    share = num_bytes(model) / bf16_bytes
    layers = adapted(model)
    velocity, gradient = step(model, layers)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step(model, layers)
        seconds.append(time.perf_counter() - began)
    return {
        "level": level,
        "products": products,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": round(share, 3),
        "output_error": relative(velocity, exact[0]),
        "gradient_error": relative(gradient, exact[1]),
        "seconds_per_step": round(statistics.median(seconds), 3) if seconds else None,
        "seconds_to_quantise": round(quantised, 2),
    }


def outliers() -> dict[str, dict[str, float]]:
    """Error of rounded products by how much larger one of 3,072 inputs is than the others, relative to what the others give."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 3072, generator=generator), torch.randn(128, 3072, generator=generator)
    found: dict[str, dict[str, float]] = {}
    for name in names("products"):
        for times in (1, 10, 50, 200):
            uneven, others = x.clone(), x.clone()
            uneven[:, 7] *= times
            others[:, 7] = 0
            codes, scale = load("products", name)().round_rows(uneven)
            error = (codes.float() * scale - uneven) @ weight.t()
            found.setdefault(name, {})[str(times)] = float(
                f"{(error.norm() / (others @ weight.t()).norm()).item():.3g}"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each level, in fp32")
    parser.add_argument("--bf16", action="store_true", help="measure errors of bf16 models too: slow on a CPU")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    model = transformer(torch.float32)
    bf16_bytes = num_bytes(model) // 2
    exact = step(model, adapted(model))
    results = []
    for dtype in (torch.float32, torch.bfloat16) if arguments.bf16 else (torch.float32,):
        for level in names("quantization"):
            missing = load("quantization", level)().missing()
            if missing:
                print(f"{level}: {missing}")
                continue
            for products in (p for p in PRODUCTS if not QuantizationConfig(level, products=p).problems()):
                timed = repeats if dtype == torch.float32 else 0
                results.append(measure(level, products, dtype, timed, exact, bf16_bytes))
                print(json.dumps(results[-1]), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    report = {"date": time.strftime("%Y-%m-%d"), **surroundings(), "runs": results, "outliers": outliers()}
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
