"""Writes docs/memory.md, and the tables of cards in docs/flux.md and docs/first-lora.md: what the plan says of full-size Chroma and Flux.

    python tools/memory_page.py [--check]

Nothing is measured here: the pages say so. Weights are not needed, only the released models' shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.flux import FluxOptions
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.loading.locate import Part, load_shipped_config
from chroma_trainer.trainer_core.models.text.t5 import without_numbers
from chroma_trainer.trainer_core.planner.auto_tune import SHARE, with_memory
from chroma_trainer.trainer_core.planner.cost_model import ModelCost, OptimizerCost, Shape, step_flops
from chroma_trainer.trainer_core.planner.memory_plan import GB, SOLD_GB, bytes_to_reserve
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.planner.step_peak import blocks_to_recompute, training_peak
from chroma_trainer.trainer_core.planner.workload import encoder_cost
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.wizard.choices import CHARACTER, GOOD, STYLE, SUBJECT
from chroma_trainer.trainer_core.wizard.model_offers import Offer
from chroma_trainer.trainer_core.wizard.recipes import recipe_of

ROOT = Path(__file__).resolve().parent.parent
PAGE, TEMPLATE, FLUX_PAGE = ROOT / "docs" / "memory.md", ROOT / "tools" / "memory_page.md", ROOT / "docs" / "flux.md"
FIRST_PAGE = ROOT / "docs" / "first-lora.md"
BEGIN, END = "<!-- begin: tools/memory_page.py -->\n", "<!-- end -->\n"
FIRST_CARDS = (8, 12, 16, 24)
FIRST_IMAGES = {STYLE: 40, SUBJECT: 20, CHARACTER: 30}  # within docs/first-lora.md's 20 to 60
CARDS = (8, 12, 16, 24, 48, 80)
EDGES = (512, 1024)
TEXT_TOKENS, FLUX_TEXT_TOKENS = 80, 512  # Flux attends its pads
TABLE_HEAD = "| GPU memory | Image | Quantization | Memory settings | Estimated need | TFLOP per step |"
LEVELS = ("none", "int8-quanto", "int4-quanto")
GUIDES = {"none": 28, "int8-quanto": 16, "int4-quanto": 11}  # rank 16, 512 px, as users' guides give them
INTERVALS = (64, 8, 4, 3, 2, 1)
OFFLOADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("activation_offload", {"activation_offload": True}),
    (
        "group_offload block, offload_share 0.25",
        {"activation_offload": True, "group_offload": "block", "offload_share": 0.25},
    ),
    (
        "group_offload block, offload_share 0.5",
        {"activation_offload": True, "group_offload": "block", "offload_share": 0.5},
    ),
    ("group_offload block", {"activation_offload": True, "group_offload": "block"}),
    ("group_offload leaf", {"activation_offload": True, "group_offload": "leaf"}),
)


class Released(ChromaFamily):
    """The released Chroma's shapes, without its files."""

    def describe_transformer(self, model: ModelConfig) -> Part:
        return Part((), load_shipped_config("chroma_transformer"))

    def empty_text_encoder(self, model: ModelConfig, convert: Any = None) -> Any:
        return without_numbers(load_shipped_config("t5_xxl"), model, convert)


class ReleasedFlux(FluxFamily):
    """The released Flux's shapes, without its files."""

    def describe_transformer(self, model: ModelConfig) -> Part:
        return Part((), load_shipped_config("flux_transformer"))


def request(level: str, family: str = "chroma", flavour: str = "hd") -> TrainRequest:
    """Rank 16 on `all`, batch 1, bf16: the trainer's defaults."""
    model = ModelConfig(family, flavour, "", dtype="bf16", quantization=QuantizationConfig(level))
    if family == "flux":
        model = replace(model, flux=FluxOptions())
    return TrainRequest(model, DatasetConfig((FolderConfig(),), ("",)), TrainingConfig(), memory=MemoryConfig())


def ways(base: TrainRequest) -> list[tuple[str, TrainRequest]]:
    """From the fastest to the smallest."""
    off = replace(base, training=replace(base.training, gradient_checkpointing=False))
    found = [("no checkpointing", off)]
    found += [(f"checkpointing_interval {n}", with_memory(base, checkpointing_interval=n)) for n in INTERVALS]
    return found + [(words, with_memory(base, **values)) for words, values in OFFLOADS]


def counted(family: Any, asked: Callable[[str], TrainRequest], text_tokens: int) -> dict[tuple[str, int], ModelCost]:
    """Of every level and edge. What learns is the same in all, so that its optimizer cost is counted once."""
    once: list[OptimizerCost] = []

    def kept(count: Callable[[], OptimizerCost]) -> OptimizerCost:
        if not once:
            once.append(count())
        return once[0]

    skeletons = {level: MetaModel(family, asked(level), kept=kept) for level in LEVELS}
    return {
        (level, edge): skeletons[level].cost(Shape(edge, edge, 1, text_tokens)) for level in LEVELS for edge in EDGES
    }


def main() -> int:
    costs = counted(Released(), request, TEXT_TOKENS)
    flux = counted(ReleasedFlux(), lambda level: request(level, "flux", "dev"), FLUX_TEXT_TOKENS)
    page = TEMPLATE.read_text("utf-8").replace("CARDS", cards(costs)).replace("GUIDES", guides(costs))
    page = page.replace("SETTINGS", settings(costs)).replace("LEARNING", learning()).replace("ENCODER", encoders())
    before, _, rest = FLUX_PAGE.read_text("utf-8").partition(TABLE_HEAD)
    pages = {PAGE: page, FLUX_PAGE: before + cards(flux) + rest[rest.index("\n\n") :]}
    start, _, rest = FIRST_PAGE.read_text("utf-8").partition(BEGIN)
    pages[FIRST_PAGE] = start + BEGIN + first_loras(costs) + "\n" + END + rest.partition(END)[2]
    if "--check" in sys.argv:
        stale = [path.relative_to(ROOT).as_posix() for path, text in pages.items() if text != path.read_text("utf-8")]
        if stale:
            print(f"{', '.join(stale)}: not what the plan says now; run python tools/memory_page.py")
        return len(stale)
    for path, text in pages.items():
        path.write_text(text, "utf-8", newline="\n")
    return 0


def cards(costs: dict[tuple[str, int], ModelCost]) -> str:
    """The fastest way that fits each card, of the level that rounds least."""
    lines = [TABLE_HEAD, "|---|---|---|---|---|---|"]
    for card in CARDS:
        for edge in EDGES:
            lines.append(_card(card, edge, costs))
    return "\n".join(lines)


def first_loras(costs: dict[tuple[str, int], ModelCost]) -> str:
    """What QuickLora and `new` choose for each card, quality good, and what a training step needs with it."""
    lines = [
        "| GPU memory | To learn | Images | `resolution` | `steps` | `rank` | `learning_rate` | Base model | Memory settings | A step needs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for card in FIRST_CARDS:
        for learn, num_images in FIRST_IMAGES.items():
            recipe = recipe_of(Offer("hd", "chroma", "hd", ""), learn, GOOD, num_images, max(EDGES), card)
            steps, rank, rate = (recipe.training[name].value for name in ("steps", "rank", "learning_rate"))
            assert rank == TrainingConfig().rank, "the costs are counted with the default rank"
            edge = recipe.resolution.value
            _, _, level, words, need, _ = [cell.strip() for cell in _card(card, edge, costs).strip("|").split("|")]
            lines.append(
                f"| {card} GB | {learn} | {num_images} | {edge} | {steps} | {rank} | {rate:g} | {level} | {words} | {need} |"
            )
    return "\n".join(lines)


def _card(card: int, edge: int, costs: dict[tuple[str, int], ModelCost]) -> str:
    for in_memory in (True, False):  # weights that stay on the card first: offload costs more than rounding to int8
        for level in LEVELS:
            cost = costs[level, edge]
            for words, asked in ways(request(level)):
                if (asked.memory.group_offload == "none") != in_memory:
                    continue
                need = bytes_to_reserve(training_peak(cost, asked)[0])
                if need <= card * SOLD_GB * SHARE:
                    flops = step_flops(cost, blocks_to_recompute(asked, len(cost.blocks))) / 1e12
                    return f"| {card} GB | {edge} px | {level} | {words} | {need / GB:.1f} GB | {flops:.0f} |"
    return f"| {card} GB | {edge} px | - | nothing fits | | |"


def guides(costs: dict[tuple[str, int], ModelCost]) -> str:
    lines = [
        "| Quantization | Guides | Estimated tensors | Estimated need | Share of the guides' figure |",
        "|---|---|---|---|---|",
    ]
    for level, figure in GUIDES.items():
        peak, _ = training_peak(costs[level, 512], request(level))
        lines.append(
            f"| {level} | {figure} GB | {peak / GB:.1f} GB | {bytes_to_reserve(peak) / GB:.1f} GB | {bytes_to_reserve(peak) / GB / figure:.0%} |"
        )
    return "\n".join(lines)


def settings(costs: dict[tuple[str, int], ModelCost]) -> str:
    lines = ["| int8-quanto, 1024 px | Tensors on the GPU | Activations in RAM | TFLOP per step |", "|---|---|---|---|"]
    cost = costs["int8-quanto", 1024]
    for words, asked in ways(request("int8-quanto")):
        peak, host = training_peak(cost, asked)
        flops = step_flops(cost, blocks_to_recompute(asked, len(cost.blocks))) / 1e12
        lines.append(f"| {words} | {peak / GB:.1f} GB | {host / GB:.1f} GB | {flops:.0f} |")
    return "\n".join(lines)


def learning() -> str:
    """One choice after another changed; those of optional packages are left out, for the page is checked without them."""
    base = request("int8-quanto")
    kinds = [replace(base, adapter=AdapterConfig(kind=kind)) for kind in names("adapter")]
    optimizers = [name for name in names("optimizer") if not load("optimizer", name).extra]
    asked = {
        **{f"{one.adapter.kind}, adamw": one for one in kinds},
        **{f"lora, {name}": replace(base, optimizer=OptimizerConfig(optimizer=name)) for name in optimizers[1:]},
        "lora, adamw, init pissa": replace(base, training=replace(base.training, init="pissa")),
        "lora, adamw, ema_decay 0.99": replace(base, adapter=AdapterConfig(ema_decay=0.99)),
    }
    lines = [
        "| Choice | Trainable parameters | Other state | During the optimizer step | Peak of a step |",
        "|---|---|---|---|---|",
    ]
    for words, one in asked.items():
        cost = MetaModel(Released(), one).cost(Shape(512, 512, 1, TEXT_TOKENS))
        optimizer_cost = cost.optimizer_cost
        beside = optimizer_cost.states + optimizer_cost.average + optimizer_cost.start
        figures = " | ".join(
            f"{size / 1e6:.0f} MB" for size in (optimizer_cost.adapter, beside, optimizer_cost.step_peak)
        )
        lines.append(f"| {words} | {figures} | {training_peak(cost, one)[0] / GB:.2f} GB |")
    return "\n".join(lines)


def encoders() -> str:
    lines = ["| Text encoder | On the device | Block by block |", "|---|---|---|"]
    for level in LEVELS:
        base = request("none")
        model = replace(base.model, quantization=QuantizationConfig("none", text_encoder=level))
        cost = encoder_cost(replace(base, model=model), Released())
        blockwise = cost.weights - cost.blocks + cost.largest_block
        lines.append(f"| {level} | {(cost.weights + cost.work) / GB:.1f} GB | {(blockwise + cost.work) / GB:.1f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
