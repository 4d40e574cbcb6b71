"""Everything that the kit shows, in the order in which it is shown: most telling first, for time may run out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from cases import GRADIENTS, STEPS

DEVICE, CORRECTNESS, FIGURES = "device", "correctness", "figures"
PARTS = (CORRECTNESS, FIGURES)
# Seconds that a compiler takes of a first step; that it takes where much of it is known from the correctness part; and
# that weights take to be pinned.
COMPILING, COMPILING_AGAIN, PINNING = 45.0, 15.0, 20.0
# When an item that runs beside the others has to be over.
BEFORE_FIGURES, AT_THE_END = "before figures", "at the end"


@dataclass(frozen=True)
class Item:
    """Args:
    shows: in a line. seconds: expected on an H200.
    call: "module:function" of this folder, called in the item's process with a Context and the settings.
    group: items of one group share a process for as long as they succeed.
    beside: "" or when it has to be over, for an item that runs beside the others: BEFORE_FIGURES one that would disturb
        what is timed, AT_THE_END one that takes nothing of the device.
    """

    name: str
    part: str
    shows: str
    call: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 8.0
    group: str = ""
    beside: str = ""

    @property
    def patience(self) -> float:
        """Seconds after which it is ended."""
        return 30 + 3 * self.seconds


def check(
    name: str, shows: str, call: str, seconds: float = 8.0, group: str = "", beside: str = "", **settings: Any
) -> Item:
    """An item of correctness."""
    return Item(name, CORRECTNESS, shows, call, settings, seconds, group, beside)


def attention(kernel: str, seconds: float) -> Item:
    shows = f"outputs and gradients of the {kernel} kernel at real shapes"
    return check(f"attention-{kernel}", shows, "attention:show_kernel", seconds, kernel=kernel)


def gradients(name: str) -> Item:
    shows, called = "LoRA gradients against fp32's, and bytes of placements", "gradients:compare"
    if GRADIENTS[name].compiled:
        return check(f"gradients-{name}", shows, called, COMPILING, beside=BEFORE_FIGURES, which=name)
    return check(f"gradients-{name}", shows, called, 3.0, "gradients", which=name)


def product(name: str, shows: str, seconds: float, **settings: Any) -> Item:
    return Item(f"product-{name}", FIGURES, f"{shows}, beside its plan", "product:train", settings, seconds)


def steps() -> list[Item]:
    shows = "a step of the full-size model: seconds, share of the limit, launches, memory"
    return [
        Item(f"step-{case.name}", FIGURES, shows, "steps:measure", asdict(case),
             12 + COMPILING_AGAIN * case.compiled + PINNING * (case.offload != "none") + 6 * case.is_full)
        for case in STEPS
    ]  # fmt: skip


NUM_FIRST = 6  # step cases that come before the product's second run
THE_DEVICE = Item("device", DEVICE, "device, versions, and what it reaches", "machine:describe", seconds=20)
WAITS, OUT_OF_MEMORY = "loop_checks:look_for_waits", "loop_checks:run_out_of_memory"
ITEMS: tuple[Item, ...] = (
    *(attention(kernel, 4) for kernel in ("flash", "efficient", "cudnn")),
    attention("math", 8),
    *(gradients(name) for name, case in GRADIENTS.items() if not case.compiled),
    check("nano", "chroma-nano: losses in bf16 and fp32, repeated and resumed runs", "nano:train", 60,
          beside=BEFORE_FIGURES),
    check("waits", "how often the host waits for the device in a step", WAITS),
    check("waits-offload", "the same with weights that come ahead of their block", WAITS, offload="block", stream=True),
    check("memory-runs-out", "a step that runs out of memory goes on to the same bytes", OUT_OF_MEMORY, 10),
    check("sampling", "a picture drawn twice in bf16", "nano:draw"),
    check("full-rank", "kind full: repeated, and with its weights in RAM", "loop_checks:train_whole", 10),
    *(gradients(name) for name, case in GRADIENTS.items() if case.compiled),
    check("graphs", "compiled blocks as CUDA graphs, against the same without", "gradients:compare_graphs", COMPILING,
          beside=BEFORE_FIGURES),
    Item("product-files", FIGURES, "files of true size with random weights", "product:write", seconds=25,
         beside=BEFORE_FIGURES),
    product("int8-512-cold", "the product from nothing cached", 75, level="int8-quanto", edge=512, is_cold=True),
    *steps()[:NUM_FIRST],
    product("bf16-1024-auto", "the product with memory mode auto", 45, level="none", edge=1024, mode="auto"),
    *steps()[NUM_FIRST:],
    product("int8-512-warm", "the same with everything cached", 40, level="int8-quanto", edge=512),
    check("attention-old-slice", "gradients whose rows are five widths apart", "attention:show_old_slice", 4),
    Item("forecasts", FIGURES, "the plan's peak of every step case", "steps:forecast", seconds=60, beside=AT_THE_END),
)  # fmt: skip


def chosen(words: Sequence[str]) -> list[Item]:
    """Items by names, by patterns of names or by part; all where nothing is said.

    Raises:
        ValueError: a word fits no item.
    """
    for word in words:
        if not any(fits(item, word) for item in ITEMS):
            raise ValueError(f"{word!r} is no item and no part ({', '.join(PARTS)}); --list names them")
    return [item for item in ITEMS if not words or any(fits(item, word) for word in words)]


def fits(item: Item, word: str) -> bool:
    return word == item.part or fnmatchcase(item.name, word)
