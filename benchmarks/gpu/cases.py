"""Settings of a training step that is measured, as data. No torch here: the kit's own process reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Args:
    level, products: of the base, see QuantizationConfig. edge: pixels.
    interval: every so many-th block is computed again, 0 none.
    offload: of weights, see MemoryConfig.group_offload; stream: they are copied ahead. activations: those wait in RAM.
    attention: of MemoryConfig; native is the product's own choice.
    kind: of AdapterConfig; full trains the model itself. optimizer: of OptimizerConfig.
    graphs: compiled blocks are replayed as CUDA graphs (docs/decisions/0105). The product does not do this yet.
    apart: bases that read the same input are not joined, as where weights are offloaded (docs/decisions/0118).
    """

    family: str = "chroma"
    level: str = "none"
    products: str = "exact"
    edge: int = 512
    batch: int = 1
    interval: int = 1
    compiled: bool = False
    offload: str = "none"
    stream: bool = False
    activations: bool = False
    attention: str = "native"
    kind: str = "lora"
    optimizer: str = "adamw"
    graphs: bool = False
    apart: bool = False

    @property
    def is_full(self) -> bool:
        """Whether the model's own weights are trained."""
        return self.kind == "full"

    @property
    def name(self) -> str:
        """Such as int8-quanto-512-compiled."""
        words = [self.family if self.family != "chroma" else "", self.kind if self.kind != "lora" else ""]
        words += [self.level if self.level != "none" else "bf16"]
        words += [str(self.edge), f"batch-{self.batch}" if self.batch > 1 else ""]
        words += [f"{self.products}-products" if self.products != "exact" else ""]
        words += {0: ["stored"], 1: []}.get(self.interval, [f"interval-{self.interval}"])
        words += ["compiled"] if self.compiled else []
        words += ["graphs"] if self.graphs else []
        words += ["apart"] if self.apart else []
        words += [f"{self.offload}-offload"] if self.offload != "none" else []
        words += ["stream"] if self.stream else []
        words += ["activation-offload"] if self.activations else []
        words += [self.attention] if self.attention != "native" else []
        words += [self.optimizer] if self.optimizer != "adamw" else []
        return "-".join(word for word in words if word)


# Full size, most telling first.
STEPS = (
    Case(level="int8-quanto"),
    Case(edge=1024),
    Case(level="int8-quanto", edge=1024),
    Case(),
    Case(level="int4-quanto"),
    Case(level="nf4-bnb"),
    Case(kind="full", optimizer="adafactor"),
    Case(offload="block", stream=True),
    Case(level="int8-quanto", batch=4),
    Case(family="flux", level="int8-quanto"),
    Case(level="int8-quanto", compiled=True),
    Case(compiled=True),
    Case(compiled=True, graphs=True),
    Case(level="int8-quanto", products="int8"),
    Case(edge=1024, compiled=True),
    Case(interval=0),
    Case(level="int8-quanto", products="int8", edge=1024),
    Case(family="flux", edge=1024),
    Case(apart=True),
)
TRACED = STEPS[0]

# Of a model of four blocks. Each is compared with the first in fp32; those that only place things must give its bytes.
PLAIN = Case(interval=0)
GRADIENTS = {
    "plain": PLAIN,
    "checkpointed": Case(),
    "interval-2": Case(interval=2),
    "block-offload": Case(interval=0, offload="block"),
    "block-offload-stream": Case(interval=0, offload="block", stream=True),
    "leaf-offload": Case(interval=0, offload="leaf"),
    "leaf-offload-stream": Case(interval=0, offload="leaf", stream=True),
    "activation-offload": Case(interval=0, activations=True),
    "int8-quanto": Case(interval=0, level="int8-quanto"),
    "int4-quanto": Case(interval=0, level="int4-quanto"),
    "nf4-bnb": Case(interval=0, level="nf4-bnb"),
    "fp8-native": Case(interval=0, level="fp8-native"),
    "int8-products": Case(interval=0, level="int8-quanto", products="int8"),
    "fp8-products": Case(interval=0, level="fp8-native", products="fp8"),
    "compiled": Case(compiled=True),
    "int8-compiled": Case(compiled=True, level="int8-quanto"),
}
# Replayed, against the same compiled blocks launched kernel by kernel.
GRAPHS = Case(compiled=True, graphs=True, attention="math")
WHOLE = Case(kind="full", optimizer="adafactor", attention="math")
