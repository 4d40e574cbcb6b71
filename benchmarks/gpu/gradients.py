"""LoRA gradients of a model of four blocks, at the width of the released one, against fp32's by the same weights.

What only places weights or activations elsewhere must give the bytes of the plain step. That is judged by the math
kernel: others may add in any order in their backward pass, which is told as well.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from cases import GRADIENTS, GRAPHS, PLAIN, Case
from chroma_trainer.trainer_core.devices import empty_cache
from chroma_trainer.trainer_core.models.attention_backends import set_attention_
from chroma_trainer.trainer_core.train.step.loop import micro_loss
from chroma_trainer.trainer_core.train.step.state import TrainState
from context import Context, Finding
from random_runs import faults_of, gradients_of, random_run, stir_
from torch import Tensor

SIZE = "medium"
Gradients = dict[str, Tensor]

# Most that all gradients together may be off, relative to their size. On a CPU, at 128 px, they are by 0.016 (none),
# 0.027 (int8), 0.25 (int4) and 0.067 (fp8); with rounded products by 0.037 and 0.082.
LIMITS = {"none": 0.05, "int8-quanto": 0.08, "int4-quanto": 0.5, "nf4-bnb": 0.5, "fp8-native": 0.15}
ROUNDED_LIMITS = {"int8": 0.1, "fp8": 0.2}
CLOSE = 0.03  # of computing again what is only rounded
# Passes: one that warms up, one that is recorded, and replays, with other weights and samples each time.
NUM_PASSES, FEW_PASSES, GROWTH, EVALUATED = 6, 2, 1.25, 3

_known: dict[str, Any] = {}  # in this process: what several items are compared with


def compare(context: Context, which: str) -> Finding:
    """One of GRADIENTS."""
    case = GRADIENTS[which]
    run = prepared(case, context)
    loss, gradients = gradients_of(run)
    found: dict[str, Any] = {"loss": loss, "attention": run.attention, "num_tensors": len(gradients)}
    faults = list(faults_of(run, loss, gradients))
    context.tell(found | {"faults": faults})
    told = [f"loss {loss:.5f}", judge_error(case, gradients, found, faults, context)]
    if case == PLAIN:
        found["is_repeatable"] = same(gradients, gradients_of(run)[1])
        told.append(f"{run.attention} {'gives' if found['is_repeatable'] else 'does not give'} the same bytes twice")
    if is_placement(case):
        told.append(judge_bytes(case, run, found, faults, context))
    return Finding(", ".join(told), found, faults)


def judge_error(case: Case, gradients: Gradients, found: dict[str, Any], faults: list[str], context: Context) -> str:
    """Against fp32."""
    found["error"], found["worst"] = distance(gradients, reference(context))
    limit = ROUNDED_LIMITS.get(case.products, LIMITS[case.level])
    if not found["error"] <= limit:
        faults.append(f"gradients are off by {found['error']:.2g} of their size, more than {limit}")
    return f"gradients off by {found['error']:.2g}"


def judge_bytes(case: Case, run: TrainState, found: dict[str, Any], faults: list[str], context: Context) -> str:
    """Against the plain step, with bases apart where they are offloaded: joined products add in another order.

    Blocks that are computed again are only promised to be close.
    """
    set_attention_(run.transformer, "math", "math")
    exact, plain = gradients_of(run)[1], plain_by_math(context, apart=case.offload != "none")
    found["has_bytes_of_plain"], found["off_plain"] = same(exact, plain), distance(exact, plain)[0]
    if found["has_bytes_of_plain"]:
        return "bytes of plain"
    told = f"off those of the plain step by {found['off_plain']:.2g}"
    if case.interval == 0 or not found["off_plain"] <= CLOSE:
        faults.append(f"gradients are {told}")
    return told


def compare_graphs(context: Context) -> Finding:
    """Losses and gradients of compiled blocks as CUDA graphs, against those of the same blocks without: to the bit.

    Weights grow in place between passes, as an optimizer moves them, and once the model is evaluated in between: what
    was recorded must not go on with old numbers.
    """
    plain, replayed = (passes_of(replace(GRAPHS, graphs=graphs), context) for graphs in (False, True))
    off = [distance(ours, exact)[0] for (_, ours), (_, exact) in zip(replayed, plain, strict=True)]
    found = {
        "losses": [loss for loss, _ in replayed], "losses_without": [loss for loss, _ in plain], "off": off,
        "has_bytes": [same(ours, exact) for (_, ours), (_, exact) in zip(replayed, plain, strict=True)],
    }  # fmt: skip
    faults = [f"pass {i} is off by {value:.2g}" for i, value in enumerate(off) if value != 0]
    if found["losses"] != found["losses_without"]:
        faults.append("the losses are not those without graphs")
    if plain[0][0] == plain[1][0]:
        faults.append("the passes do not differ, so that nothing is shown")
    told = "the bytes of compiled blocks" if all(found["has_bytes"]) else f"off by {max(off):.2g}"
    return Finding(f"{len(plain)} passes: {told}", found, faults)


def passes_of(case: Case, context: Context) -> list[tuple[float, Gradients]]:
    """Loss and gradients of passes in a row, whose weights differ."""
    run, results = prepared(case, context), []
    for micro in range(context.pick(NUM_PASSES, FEW_PASSES)):
        begin_pass(case, context)
        results.append(gradients_of(run, micro))
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.mul_(GROWTH)
            if micro == EVALUATED:
                begin_pass(case, context)
                micro_loss(run, micro)
    return results


def begin_pass(case: Case, context: Context) -> None:
    """Results of the pass before are not read any more: graphs may write over them."""
    if case.graphs and context.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()


def is_placement(case: Case) -> bool:
    """Whether nothing is rounded or fused otherwise than in the plain step."""
    return case.level == "none" and not case.compiled


def prepared(case: Case, context: Context, dtype: str = "bf16") -> TrainState:
    """Its adapter is not zero."""
    gc.collect()
    empty_cache(context.device)
    run = random_run(case, context, SIZE, dtype)
    stir_(run)
    return run


def reference(context: Context) -> Gradients:
    """In fp32, of the weights that bf16 holds, by the math kernel."""
    if "reference" not in _known:
        run = prepared(replace(PLAIN, attention="math"), context, "fp32")
        loss, gradients = gradients_of(run)
        assert not list(faults_of(run, loss, gradients)), "the reference itself is not finite"
        _known["reference"] = gradients
    return _known["reference"]


def plain_by_math(context: Context, apart: bool) -> Gradients:
    """Of the plain step in bf16, by the math kernel."""
    name = f"plain, {apart}"
    if name not in _known:
        run = prepared(replace(PLAIN, attention="math", apart=apart), context)
        _known[name] = gradients_of(run)[1]
    return _known[name]


def distance(ours: Gradients, exact: Gradients) -> tuple[float, dict[str, Any]]:
    """Of all tensors together, relative to their size; and the tensor that is furthest off."""
    squares = {
        name: (norm(ours[name].float() - tensor.float()), norm(tensor))
        for name, tensor in exact.items()
        if name in ours
    }
    total = sum(off**2 for off, _ in squares.values()) / sum(size**2 for _, size in squares.values())
    worst = max(squares, key=lambda name: _share(squares[name]))
    return total**0.5, {"tensor": worst, "error": _share(squares[worst])}


def _share(pair: tuple[float, float]) -> float:
    off, size = pair
    return float("inf") if off != off else off / max(size, 1e-30)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def same(first: Gradients, second: Gradients) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
