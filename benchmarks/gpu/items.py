"""Everything that the kit shows, in the order in which it is shown: most telling first, for time may run out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from cases import GRADIENTS, STEPS

DEVICE, CORRECTNESS, FIGURES = "device", "correctness", "figures"
PARTS = (CORRECTNESS, FIGURES)
COMPILING, PINNING = 45.0, 20.0  # seconds that a compiler takes of the first step, and that weights take to be pinned


@dataclass(frozen=True)
class Item:
    """Args:
    shows: in a line. seconds: expected on an H200.
    call: "module:function" of this folder, called in the item's process with a Context and the settings.
    group: items of one group share a process for as long as they succeed.
    beside: runs beside all others, for it takes nothing of the device.
    """

    name: str
    part: str
    shows: str
    call: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 8.0
    group: str = ""
    beside: bool = False

    @property
    def patience(self) -> float:
        """Seconds after which it is ended."""
        return 30 + 3 * self.seconds


def check(name: str, shows: str, call: str, seconds: float = 8.0, group: str = "", **settings: Any) -> Item:
    """An item of correctness."""
    return Item(name, CORRECTNESS, shows, call, settings, seconds, group)


def attention(kernel: str, seconds: float) -> Item:
    shows = f"outputs and gradients of the {kernel} kernel at real shapes"
    return check(f"attention-{kernel}", shows, "attention:show_kernel", seconds, kernel=kernel)


def gradients(name: str) -> Item:
    shows, seconds = (
        "LoRA gradients against fp32's, and bytes of placements",
        COMPILING if GRADIENTS[name].compiled else 3.0,
    )
    return check(f"gradients-{name}", shows, "gradients:compare", seconds, "gradients", which=name)


def product(name: str, shows: str, seconds: float, **settings: Any) -> Item:
    return Item(f"product-{name}", FIGURES, f"{shows}, beside its plan", "product:train", settings, seconds)


def steps() -> list[Item]:
    shows = "a step of the full-size model: seconds, share of the limit, launches, memory"
    return [
        Item(f"step-{case.name}", FIGURES, shows, "steps:measure", asdict(case),
             12 + COMPILING * case.compiled + PINNING * (case.offload != "none"))
        for case in STEPS
    ]  # fmt: skip


THE_DEVICE = Item("device", DEVICE, "device, versions, and what it reaches", "machine:describe", seconds=20)
WAITS, OUT_OF_MEMORY = "loop_checks:look_for_waits", "loop_checks:run_out_of_memory"
ITEMS: tuple[Item, ...] = (
    *(attention(kernel, 4) for kernel in ("flash", "efficient", "cudnn")),
    attention("math", 8),
    *(gradients(name) for name, case in GRADIENTS.items() if not case.compiled),
    check("nano", "chroma-nano: losses in bf16 and fp32, repeated and resumed runs", "nano:train", 60),
    check("waits", "how often the host waits for the device in a step", WAITS),
    check("waits-offload", "the same with weights that come ahead of their block", WAITS, offload="block", stream=True),
    check("memory-runs-out", "a step that runs out of memory goes on to the same bytes", OUT_OF_MEMORY, 10),
    check("sampling", "a picture drawn twice in bf16", "nano:draw"),
    check("attention-old-slice", "gradients whose rows are five widths apart", "attention:show_old_slice", 4),
    *(gradients(name) for name, case in GRADIENTS.items() if case.compiled),
    Item("product-files", FIGURES, "files of true size with random weights", "product:write", seconds=25),
    product("int8-512-cold", "the product from nothing cached", 75, level="int8-quanto", edge=512, is_cold=True),
    product("int8-512-warm", "the same with everything cached", 40, level="int8-quanto", edge=512),
    product("bf16-1024-auto", "the product with memory mode auto", 45, level="none", edge=1024, mode="auto"),
    *steps(),
    Item("forecasts", FIGURES, "the plan's peak of every step case", "steps:forecast", seconds=60, beside=True),
)


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
