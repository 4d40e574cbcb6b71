"""What a kind of adapter brings: a layer that stands in for a frozen Linear, and the update that a file holds for it.

One file and one registry line a kind. Whoever trains, saves or draws asks the layer and never its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import AdapterConfig
from ..seeds import generator
from .dense_weight import Compressed, dense_weight

Part = tuple[slice, "Update"]  # rows of a fused weight, and what is added there


class IncompatibleUpdate(ValueError):
    """A file's update can't be taken up by a layer; says why and what to do."""


class Update(ABC):
    """What a file says about one layer, in tensors on the CPU. Frozen dataclasses.

    keys: ends of keys in files -> names of the parts that `from_parts` takes.
    """

    keys: ClassVar[Mapping[str, str]]

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Update | None:
        """None: these are not all the parts of one."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it changes."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """What it adds to the weight, (out, in), fp64."""

    @abstractmethod
    def applied(self, x: Tensor) -> Tensor:
        """Its factors times a vector, (in,) -> (out,): a cheap check that two are the same."""

    def is_zero(self) -> bool:
        """Whether it leaves the weight as it is."""
        return not self.applied(probe(self.shape[1])).any()

    @abstractmethod
    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        """By end of key. kohya: by the names of kohya's scripts, with an alpha."""

    @abstractmethod
    def rows(self, rows: slice) -> Update:
        """The part that changes these rows.

        Raises:
            Misfit: it can't be cut there.
        """

    def swap_halves(self) -> Update:
        """The same with the two halves of the rows exchanged: keys.SWAPPED.

        Raises:
            Misfit: this kind can't.
        """
        raise IncompatibleUpdate("its rows can't be exchanged, as the original layout of the last modulation needs it")

    @abstractmethod
    def fuse(self, parts: Sequence[Part], norms: Tensor) -> Update:
        """One update of a weight that holds several layers' rows, of which some may not change.

        Args:
            parts: of the same kind as this one.
            norms: Euclidean norm of each row of the fused weight, (rows,).
        """

    @abstractmethod
    def layer(self, base: nn.Linear) -> AdapterLayer:
        """A layer that applies it, frozen."""


@dataclass
class Dropout:
    """Which micro-batch is being trained, shared by all layers of a run: masks are a function of it, so that a block that is
    computed again, and a run that is resumed, meet the same ones. micro: None while nothing is trained: then nothing drops."""

    rate: float
    seed: int
    micro: int | None = None


class AdapterLayer(nn.Module, ABC):
    """A frozen Linear, quantised or not, with an update beside it. Masters are fp32, products run in the input's precision.

    Attributes:
        inits: starts that it knows, see TrainingConfig.init. formats: file formats that can hold it, see AdapterConfig.format. Both
            are config.adapter.KIND_RULES' own, where they are read without torch.
        network: what a file's header says about its kind, beside rank and alpha.
        strength: multiplies the change of the weight; at 0 the layer is its base, to the bit.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    formats: ClassVar[tuple[str, ...]] = ("universal", "comfyui", "kohya")
    network: ClassVar[Mapping[str, str]] = {"ss_network_module": "networks.lora"}
    update_type: ClassVar[type[Update]]

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.strength = rank, float(alpha), 1.0
        self.name, self.dropout = "", None
        self.working: tuple[Tensor, Tensor] | None = None

    name: str
    dropout: Dropout | None

    @classmethod
    def new(cls, base: nn.Linear, rank: int, alpha: float, config: AdapterConfig) -> AdapterLayer:
        """A layer whose update is zero or not yet started."""
        return cls(base, rank, alpha)

    def working_factors(self) -> tuple[torch.dtype, Sequence[tuple[Tensor, float]]] | None:
        """What working_copies.py may cast once a step: the products' precision, and A and B with what each is multiplied by.

        None: this layer computes with its masters.
        """
        return None

    @abstractmethod
    def start_(self, start: Start) -> None:
        """Give the trainable weights their first values."""

    def init_along_(self, directions: Tensor) -> None:
        """Start along these unit vectors of the input, (up to r, in): eva, for kinds that know it."""
        raise NotImplementedError(f"{type(self).__name__} has no such start")

    @abstractmethod
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        """Begin with what a file holds. fill: first values for what the file lacks, by shape.

        Raises:
            Misfit: it is of another kind or shape.
        """

    @abstractmethod
    def update(self) -> Update:
        """What a file holds, relative to the base that it will be loaded on (the clean one, where this one is quantised)."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""

    @property
    def file_rank(self) -> int:
        """Rank of the update in a file."""
        return self.rank

    @property
    def file_alpha(self) -> float:
        """alpha as a file's header says it: the rank, where alpha / rank is multiplied into the weights already."""
        return float(self.file_rank)

    @property
    def scale(self) -> float:
        """What the product of the trained weights is multiplied by."""
        return self.alpha / self.rank

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What learns, by name."""
        return self.named_parameters(recurse=False)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint must hold, by name: what learns, and what it started from where that is needed later."""
        yield from self.trainable()
        yield from self.named_buffers(recurse=False)

    def delta(self) -> Tensor:
        """The change of the weight at strength 1, as the file has it, (out, in), fp64, on the base's device."""
        return self.update().delta(dense_weight(self.base))

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input of the update: elements are zeroed with probability `rate`, the others scaled by 1 / (1 - rate)."""
        drop = self.dropout
        if drop is None or drop.micro is None or not drop.rate:
            return x
        # On the input's device: a mask for every layer would wait for the CPU's numbers.
        source = generator(drop.seed, "dropout", drop.micro, self.name, device=x.device)
        kept = torch.rand(x.shape, generator=source, device=x.device) >= drop.rate
        return x * kept.to(x.dtype).div_(1 - drop.rate)

    def base_product(self, x: Tensor) -> Tensor:
        """W x without the bias, through the base's own forward (which may bring the weight from elsewhere)."""
        base = self.base
        if type(base) is nn.Linear and "forward" not in base.__dict__:
            return F.linear(x, base.weight)
        y = base(x)
        return y if base.bias is None else y - base.bias

    @property
    def summed_base(self) -> nn.Linear | None:
        """The base, where its product enters a sum alone, so that gradients do not read it; else None. See memory/activation_checkpointing.py."""
        return self.base

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def is_quantized(self) -> bool:
        """Whether the base stores its weight in fewer bits than it acts with."""
        return isinstance(self.base, Compressed) or type(self.base) is not nn.Linear


@dataclass(frozen=True)
class Start:
    """How a layer starts.

    Args:
        init: see TrainingConfig.init.
        generator: on the CPU; drawn from in the order of the layers.
        iterations: of the randomised SVD; 0: an exact one.
        clean: the layer's weight before it was quantised, for loftq.
        device: where decompositions are computed.
    """

    init: str
    generator: torch.Generator
    iterations: int = 0
    clean: Tensor | None = None
    device: torch.device | None = None


def probe(width: int) -> Tensor:
    """A vector that no update sends to 0 by chance, (width,)."""
    return torch.linspace(-1, 1, width).cos()


def device_of(base: nn.Module) -> torch.device:
    """Where a layer's tensors are, without decoding a quantised weight."""
    return next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))


def product_dtype(base: nn.Linear) -> torch.dtype:
    """The precision that a layer was loaded in, without decoding a quantised weight."""
    own = getattr(base, "dtype", None)
    return own if isinstance(own, torch.dtype) else base.weight.dtype
