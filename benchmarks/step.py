"""What each idea is worth, and how cost grows. `python benchmarks/step.py` (CPU, tiny model)

ideas: CPU seconds of a step with one thing changed, against the step as it is (text trimmed, no mask, all activations stored,
fused AdamW, torch's choice of attention); in turns, in one process. Above 1 is slower than ours. `--compile` adds compiled blocks.
growth: CPU seconds of a step by edge, batch and rank; drawn into docs/images, beside what data.py measured of folders.
products: a step on quantised bases with exact and with rounded products, of the tiny and the medium model, against the unquantised one.
"torch": int8 by torch's integer product instead of ours, which gives the same numbers.
checkpointing: a step of both models with all activations stored, with every block computed again whole (torch's own way), and with what
no gradient reads left out, as a run does (memory/activation_checkpointing.py); CPU seconds, and bytes that the forward pass keeps.
routing: a step with a share of the picture's tokens skipping the blocks from the second to the last but one (models/token_routing.py).

`--only` measures some of these; the rest of the file stays, each with what it was measured on.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_, set_attention_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.latent_packing import batch_text, image_ids, pack
from chroma_trainer.trainer_core.plots.canvas import BLUE, PAPER, RULE, SOFT_INK, text_width, write
from chroma_trainer.trainer_core.plots.loss_chart import nice_ticks
from chroma_trainer.trainer_core.quant.low_precision_matmul import Int8Product, choose_products_
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.step.token_drop import draw_route
from models import PROJECT, RESULTS, model_folder, request, surroundings
from overhead import compared, in_turns
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAMILY = ChromaFamily()
EDGE, TOKENS, PADDED, RANK = 128, 24, 512, 16
SECTIONS = ("ideas", "growth", "checkpointing", "products", "routing")
IMAGES = PROJECT / "docs" / "images"


def adapted(base: nn.Module, rank: int = RANK) -> tuple[Any, list[nn.Parameter]]:
    """A copy of the model with a LoRA on all its layers."""
    transformer = copy.deepcopy(base)
    layers = inject_(
        transformer,
        resolve_targets(transformer, FAMILY, "all+ffs"),
        rank,
        rank,
        generator=torch.Generator().manual_seed(0),
    )
    return transformer, [parameter for _, parameter in trainable_parameters(layers)]


def stepper(
    transformer: Any,
    parameters: list[nn.Parameter],
    *,
    edge: int = EDGE,
    batch: int = 1,
    padded: int = 0,
    masked: bool = False,
    routed: float = 0.0,
    **optimizer_settings: Any,
) -> Callable[[], None]:
    """One step. padded: text is filled up to so many tokens, and masked; masked: a mask that hides nothing;
    routed: share of the picture's tokens that skip the middle blocks."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, **(optimizer_settings or {"fused": True}))
    side = edge // 8
    text = torch.randn(batch, TOKENS, transformer.context_embedder.in_features)
    image_tokens = (side // 2) ** 2
    positions = transformer.pos_embed(torch.cat([torch.zeros(padded or TOKENS, 3), image_ids(side, side)]))
    mask = None
    if padded:
        text = torch.cat([text, torch.zeros(batch, padded - TOKENS, text.shape[2])], dim=1)
    if padded or masked:
        mask = torch.ones(batch, text.shape[1] + image_tokens, dtype=torch.bool)
        mask[:, TOKENS : text.shape[1]] = False
    x0 = torch.randn(batch, 16, side, side)
    assert batch_text(list(text), image_tokens)[1] is None
    config, num_blocks, micros = (
        TrainingConfig(routed_share=routed, route_first=1),
        len(FAMILY.blocks(transformer)),
        count(),
    )

    def step() -> None:
        noise, sigma = torch.randn_like(x0), torch.rand(batch)
        x_sigma, velocity = interpolate(x0, noise, sigma)
        prediction = transformer(
            hidden_states=pack(x_sigma), encoder_hidden_states=text, timestep=sigma, attention_mask=mask,
            image_rotary_emb=positions, return_dict=False, route=draw_route(config, num_blocks, x0, None, next(micros)),
        )[0]  # fmt: skip
        velocity_loss(prediction[:, :, :, None], pack(velocity)[:, :, :, None]).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def with_diffusers(folder: Path) -> Callable[[], None]:
    """The step of a plain script: diffusers' model, peft's LoRA, text padded to 512 tokens under a mask, foreach AdamW."""
    from diffusers import ChromaTransformer2DModel
    from peft import LoraConfig

    transformer: Any = ChromaTransformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    names = resolve_targets(FAMILY.load_transformer(request(folder, folder, EDGE).model), FAMILY, "all+ffs")
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    step = stepper_of_diffusers(transformer, parameters)
    return step


def stepper_of_diffusers(transformer: Any, parameters: list[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    side = EDGE // 8
    text, x0 = torch.randn(1, PADDED, transformer.config.joint_attention_dim), torch.randn(1, 16, side, side)
    mask = torch.ones(1, PADDED + (side // 2) ** 2, dtype=torch.bool)
    mask[:, TOKENS:PADDED] = False

    def step() -> None:
        noise, sigma = torch.randn_like(x0), torch.rand(1)
        x_sigma, velocity = interpolate(x0, noise, sigma)
        prediction = transformer(
            hidden_states=pack(x_sigma), encoder_hidden_states=text, timestep=sigma, img_ids=image_ids(side, side),
            txt_ids=torch.zeros(PADDED, 3), attention_mask=mask, return_dict=False,
        )[0]  # fmt: skip
        (prediction - pack(velocity)).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_ideas(rounds: int, compiled: bool) -> dict[str, Any]:
    """CPU seconds of a step, and their ratio to ours."""
    folder = model_folder("tiny")
    base = FAMILY.load_transformer(request(folder, folder, EDGE).model)

    def changed(change: Callable[[Any], Any] = lambda _: None, **settings: Any) -> Callable[[], None]:
        transformer, parameters = adapted(base)
        change(transformer)
        return stepper(transformer, parameters, **settings)

    steps = {
        "ours": changed(),
        "text padded to 512 tokens, masked": changed(padded=PADDED),
        "trimmed, with a mask": changed(masked=True),
        "every block checkpointed": changed(lambda t: checkpoint_blocks_(FAMILY.blocks(t))),
        "every second block checkpointed": changed(lambda t: checkpoint_blocks_(FAMILY.blocks(t), 2)),
        "foreach AdamW": changed(foreach=True),
        "attention: math": changed(lambda t: set_attention_(t, "math")),
        "diffusers and peft, padded, masked, foreach": with_diffusers(folder),
    }
    if compiled:
        steps["compiled blocks"] = changed(lambda t: compile_blocks_(FAMILY.blocks(t)))
    return compared(in_turns(steps, rounds, warmup=3), "ours")


class TorchInt8(Int8Product):
    """By torch._int_mm on the CPU too."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return torch._int_mm(a, b)


def measure_products(size: str, edge: int, rounds: int, with_torch: bool) -> dict[str, Any]:
    """CPU seconds of a step (fp32), their ratio to that on the unquantised base, and of single products of the model's widest layer."""
    folder = model_folder(size)
    kinds = [
        ("none", "exact"),
        ("int8-quanto", "exact"),
        ("int8-quanto", "int8"),
        ("fp8-native", "exact"),
        ("fp8-native", "fp8"),
    ]
    steps = {}
    for level, products in [*kinds, ("int8-quanto", "torch")] if with_torch else kinds:
        base = FAMILY.load_transformer(request(folder, folder, edge).model)
        base = load("quantization", level)().quantize_(base, FAMILY.full_precision)
        choose_products_(base, "int8" if products == "torch" else products)
        if products == "torch":
            for layer in base.modules():
                if isinstance(layer, QuantizedLinear):
                    layer.product = TorchInt8()
        steps[f"{level}, {products}"] = stepper(*adapted(base), edge=edge)
    return {
        "edge": edge,
        "rounds": rounds,
        "steps": compared(in_turns(steps, rounds, warmup=1), "none, exact"),
        "single": _single_products(base, TOKENS + (edge // 16) ** 2),
    }


def _single_products(base: nn.Module, rows: int) -> dict[str, float]:
    """CPU milliseconds of (rows, in) x (in, out) for the widest layer: fp32's product, and torch's of int8."""
    out, width = max((m.out_features, m.in_features) for m in base.modules() if isinstance(m, QuantizedLinear))
    a = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    b = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    x, y = a.float(), b.float()
    seconds = in_turns({"fp32": lambda: x @ y.t(), "int8": lambda: torch._int_mm(a, b.t())}, 3, warmup=1)
    return {
        "rows": rows,
        "in": width,
        "out": out,
        **{f"{name}_ms": round(1e3 * median(values), 2) for name, values in seconds.items()},
    }


def measure_growth(rounds: int) -> dict[str, list[list[float]]]:
    """[value, CPU seconds a step] by edge in pixels, batch and rank."""
    folder = model_folder("tiny")
    base = FAMILY.load_transformer(request(folder, folder, EDGE).model)
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    for edge in (64, 128, 192, 256, 320):
        steps["edge", edge] = stepper(*adapted(base), edge=edge)
    for batch in (1, 2, 4, 8):
        steps["batch", batch] = stepper(*adapted(base), batch=batch)
    for rank in (4, 16, 64, 128):
        steps["rank", rank] = stepper(*adapted(base, rank))
    seconds = in_turns({f"{kind} {value}": step for (kind, value), step in steps.items()}, rounds, warmup=2)
    found: dict[str, list[list[float]]] = {}
    for kind, value in steps:
        found.setdefault(kind, []).append([value, round(median(seconds[f"{kind} {value}"]), 4)])
    return found


def scan_growth() -> dict[str, list[list[float]]]:
    """[images, CPU seconds] cold and warm, as data.py measured them; empty where it has not."""
    found = RESULTS / "data.json"
    return json.loads(found.read_text("utf-8")).get("scan_growth", {}) if found.is_file() else {}


PANEL, ROW = 420, 340  # pixels
LABELS = {
    "edge": "CPU seconds a step by edge, pixels",
    "batch": "CPU seconds a step by batch",
    "rank": "CPU seconds a step by rank",
    "cold": "CPU seconds to scan so many new images",
    "warm": "CPU seconds to scan known images",
}


def draw_growth(growth: dict[str, list[list[float]]], path: Path) -> None:
    """One panel for each kind, side by side, from 0."""
    page = Image.new("RGB", (PANEL * min(3, len(growth)), ROW * -(-len(growth) // 3)), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (kind, points) in enumerate(growth.items()):
        left, top = PANEL * (i % 3), ROW * (i // 3)
        _panel(draw, (left + 64, top + 56, left + 400, top + 280), points, LABELS.get(kind, kind))
    page.save(path, optimize=True)


def _panel(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], points: Sequence[Sequence[float]], label: str
) -> None:
    left, top, right, bottom = box
    ticks = nice_ticks(0, max(y for _, y in points), 5)
    widest = max(x for x, _ in points)
    place = [(left + (right - left) * x / widest, bottom - (bottom - top) * y / ticks[-1]) for x, y in points]
    for tick in ticks:
        y = bottom - (bottom - top) * tick / ticks[-1]
        draw.line((left, y, right, y), fill=RULE)
        text = f"{tick:g}"
        write(draw, (left - 8 - text_width(text, 15), y - 9), text, 15, SOFT_INK)
    draw.line(place, fill=BLUE, width=3)
    for (x, y), (value, _) in zip(place, points, strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=BLUE)
        text = f"{value:g}"
        write(draw, (x - text_width(text, 15) / 2, bottom + 8), text, 15, SOFT_INK)
    write(draw, (left, top - 34), label, 17, SOFT_INK)


def measure_checkpointing(size: str, edge: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of a step, their ratio to that with everything stored, and MiB that autograd keeps."""
    folder = model_folder(size)
    base = FAMILY.load_transformer(request(folder, folder, edge).model)
    steps: dict[str, Callable[[], None]] = {}
    ways: dict[str, Callable[[list[nn.Module]], None]] = {
        "stored": lambda _: None, "computed again whole": whole_again_, "computed again": checkpoint_blocks_,
        "every second block computed again": lambda blocks: checkpoint_blocks_(blocks, 2),
    }  # fmt: skip
    for name, change in ways.items():
        transformer, parameters = adapted(base)
        change(FAMILY.blocks(transformer))
        steps[name] = stepper(transformer, parameters, edge=edge)
    kept = {name: _kept_bytes(step) for name, step in steps.items()}
    found = compared(in_turns(steps, rounds, warmup=1), "stored", 3)
    return {name: {**figures, "kept_mib": round(kept[name] / 2**20, 1)} for name, figures in found.items()}


def measure_routing(size: str, edge: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of a step by routed share, and their ratio to that with none; the model has so many blocks, of which all but two are routed."""
    folder = model_folder(size)
    base = FAMILY.load_transformer(request(folder, folder, edge).model)
    steps = {f"{share:g}": stepper(*adapted(base), edge=edge, routed=share) for share in (0.0, 0.25, 0.5)}
    found = compared(in_turns(steps, rounds, warmup=1), "0", 3)
    return {"edge": edge, "blocks": len(FAMILY.blocks(base)), "rounds": rounds, "steps": found}


def whole_again_(blocks: Sequence[nn.Module]) -> None:
    """Checkpoint every block as torch does, and nothing is left out."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _kept_bytes(step: Callable[[], None]) -> int:
    """Of different storages that autograd holds when the forward pass ends, weights not among them."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    path = RESULTS / "step.json"
    few = max(3, arguments.rounds // 5)
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "ideas": lambda: measure_ideas(arguments.rounds, arguments.compile),
        "growth": lambda: measure_growth(max(3, arguments.rounds // 3)),
        "checkpointing": lambda: {
            "tiny": measure_checkpointing("tiny", EDGE, arguments.rounds),
            "medium": measure_checkpointing("medium", 256, few),
        },
        "products": lambda: {
            "tiny": measure_products("tiny", EDGE, arguments.rounds, with_torch=True),
            "medium": measure_products("medium", 256, few, with_torch=False),
        },
        "routing": lambda: {
            "tiny": measure_routing("tiny", 512, arguments.rounds),
            "medium": measure_routing("medium", 256, few),
        },
    }
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in arguments.only:
        torch.manual_seed(0)
        result[name] = measured[name]()
        result.setdefault("measured_on", {})[name] = surroundings()
        print(json.dumps({name: result[name]}, indent=2), flush=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_growth({**result["growth"], **scan_growth()}, IMAGES / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
