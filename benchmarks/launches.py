"""How many kernels a training step launches, counted without a GPU: `python benchmarks/launches.py`

A model with the true number of blocks (19 double, 38 single) and narrow layers takes one step of a LoRA on a CPU, and every operator
that computes or copies is counted once as it is dispatched. Views and empty tensors launch nothing and are left out. A GPU launches a few
more (one operator can be two kernels) and fewer where torch has a fused one there (RMSNorm); so read ratios, not milliseconds.

Cases: every block recomputed and none; bf16 with fp32 masters of the LoRA; eager, and with --compiled compiled blocks: the kernels
that the generated code of one block calls (takes 3 minutes). Result: benchmarks/results/launches.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from operator_counter import OperatorCounter
from torch import nn

RESULT = Path(__file__).resolve().parent / "results" / "launches.json"
NARROW = {
    "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
    "approximator_hidden_dim": 64, "approximator_layers": 2,
}  # fmt: skip
RANK, TEXT_TOKENS, CELLS = 16, 9, 8


def build(num_double: int, num_single: int, recompute: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A narrow Chroma in bf16 with a LoRA on every linear layer of its blocks."""
    from chroma_trainer.trainer_core.adapters.inject import inject_
    from chroma_trainer.trainer_core.adapters.targets import resolve_targets
    from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
    from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
    from chroma_trainer.trainer_core.registry import load

    family = load("family", "chroma")()
    transformer = ChromaTransformer(num_layers=num_double, num_single_layers=num_single, **NARROW)
    transformer = transformer.to(torch.bfloat16).requires_grad_(False).eval()
    names = resolve_targets(transformer, family, "all+ffs")
    layers = inject_(transformer, names, RANK, RANK, generator=torch.Generator().manual_seed(0))
    if recompute:
        checkpoint_blocks_(family.blocks(transformer), spare_last=False)
    return transformer, layers


def count_step(num_double: int, num_single: int, recompute: bool) -> Counter[str]:
    """Operators of a forward and a backward pass of one sample, with what the training step does around them."""
    from chroma_trainer.trainer_core.models.projections import projection_groups
    from chroma_trainer.trainer_core.registry import load
    from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies

    transformer, layers = build(num_double, num_single, recompute)
    family = load("family", "chroma")()
    text, x = [torch.randn(TEXT_TOKENS, 64)], torch.randn(1, 16, CELLS, CELLS)
    counter = OperatorCounter()
    copies = WorkingCopies(layers, projection_groups(family.blocks(transformer)), joins_bases=True)
    with counter, copies.active():
        loss = family.predict(transformer, x, torch.tensor([0.4]), text).float().square().mean()
        loss.backward()
        copies.collect_()
    return counter.counts


def per_block(recompute: bool) -> dict[str, float]:
    """What one more double and one more single block cost."""
    one = count_step(1, 1, recompute).total()
    return {
        "double": count_step(2, 1, recompute).total() - one,
        "single": count_step(1, 2, recompute).total() - one,
    }


CALL = re.compile(r"(extern_kernels\.\w+|(?:cpp|triton)_\w*fused\w*|torch\.ops\.aten\.\w+)(?:\.default|\.run)?[(,]")


def kernels_in(code: str) -> Counter[str]:
    """Kernels that a graph compiled by inductor launches, from its generated code."""
    body = code[code.index("def call(") :]
    names = [match.group(1) for match in CALL.finditer(body)]
    counts = Counter("fused" if "fused" in name else name.rpartition(".")[2] for name in names)
    return counts


def compiled_per_block(recompute: bool) -> dict[str, float]:
    """What a double and a single block launch forward and backward with compiled blocks, the checkpoint inside."""
    from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_
    from chroma_trainer.trainer_core.models.projections import projection_groups
    from chroma_trainer.trainer_core.registry import load
    from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    transformer, layers = build(2, 2, recompute)
    family = load("family", "chroma")()
    blocks = family.blocks(transformer)
    compile_blocks_(blocks)
    copies = WorkingCopies(layers, projection_groups(blocks), joins_bases=True)
    text, x = [torch.randn(TEXT_TOKENS, 64)], torch.randn(1, 16, CELLS, CELLS)

    def step() -> None:
        with copies.active():
            family.predict(transformer, x, torch.tensor([0.4]), text).float().square().mean().backward()

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    # Graphs in pairs of forward and backward: the first double block (its text needs no gradient), double, single.
    double, single = (sum(kernels_in(code).total() for code in pair) for pair in (codes[2:4], codes[4:6]))
    return {"double": double, "single": single, "mean of 19 and 38": round((19 * double + 38 * single) / 57, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--compiled", action="store_true", help="count compiled blocks as well")
    arguments = parser.parse_args()
    out: Path = arguments.out
    result: dict[str, Any] = {"torch": torch.__version__, "rank": RANK, "targets": "all+ffs", "dtype": "bf16"}
    cases: dict[str, Callable[[], Counter[str]]] = {
        "every block recomputed": lambda: count_step(19, 38, True),
        "nothing recomputed": lambda: count_step(19, 38, False),
    }
    for name, count in cases.items():
        counts = count()
        blocks = per_block(name == "every block recomputed")
        result[name] = {"step": counts.total(), "a_block": blocks, "by_operator": dict(counts.most_common(20))}
        print(f"{name}: {counts.total()} a step, {counts.total() / 57:.0f} a block; {blocks}")
        print("   ", ", ".join(f"{operator} {number}" for operator, number in counts.most_common(14)))
        if arguments.compiled:
            result[name]["a_compiled_block"] = compiled_per_block(name == "every block recomputed")
            print("    compiled:", result[name]["a_compiled_block"])
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
