"""The interface of an adapter: the layer that replaces a frozen Linear, and the update that a file stores for it.

Each kind of adapter is one file and one line in the registry. Code that trains, saves or samples uses only this
interface and never checks the class of a layer.
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

Part = tuple[slice, "Update"]  # rows of a fused weight, and the update of those rows


class IncompatibleUpdate(ValueError):
    """Raised when a layer can't load an update. The message says why and how to fix it."""


class Update(ABC):
    """The update of one layer as a file stores it, in CPU tensors. Subclasses are frozen dataclasses.

    Attributes:
        kind: Name of the kind, in the order of which a file of several kinds names its network.
        keys: Maps the suffixes of keys in files to the part names that `from_parts` takes.
    """

    kind: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Update | None:
        """Build an update from its parts. Return None if parts are missing or don't fit together."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the update changes: (out, in)."""

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether the update can change a weight of this shape."""
        return shape == self.shape

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Return the change of the weight, (out, in), fp64."""

    @abstractmethod
    def applied(self, x: Tensor) -> Tensor:
        """Multiply a vector by the factors, (in,) -> (out,): a cheap check that two updates are equal."""

    def is_zero(self) -> bool:
        """Return whether the update leaves the weight unchanged."""
        return not self.applied(probe(self.shape[1])).any()

    @abstractmethod
    def tensors(self, kohya: bool = False) -> dict[str, Tensor]:
        """Return the tensors to save, by key suffix. kohya: use the key names of kohya's scripts, with an alpha."""

    @abstractmethod
    def rows(self, rows: slice) -> Update:
        """Return the part of the update that changes these rows.

        Raises:
            IncompatibleUpdate: The update can't be split there.
        """

    def swap_halves(self) -> Update:
        """Return the update with the two halves of its rows exchanged, see keys.SWAPPED.

        Raises:
            IncompatibleUpdate: This kind of adapter does not support it.
        """
        raise IncompatibleUpdate(
            "its two halves of rows can't be exchanged, which the last modulation needs in the original layout"
        )

    def for_comfyui(self) -> Update:
        """Return the update without what ComfyUI does not read, and would name in its log."""
        return self

    @abstractmethod
    def fuse(self, parts: Sequence[Part], norms: Tensor) -> Update:
        """Merge the updates of several layers into one update of the fused weight that holds their rows.

        Args:
            parts: Row ranges and their updates, of the same kind as this one. Some rows may have no update.
            norms: Euclidean norm of each row of the fused weight, (rows,).
        """

    @abstractmethod
    def layer(self, base: nn.Linear) -> AdapterLayer:
        """Return a frozen layer that applies the update to `base`."""


@dataclass
class Dropout:
    """Dropout state, shared by all layers of a run.

    Masks are a function of the micro-batch, so recomputed blocks and resumed runs use the same masks.

    Attributes:
        rate: Probability that an element is zeroed.
        seed: Seed of the masks.
        micro: Index of the micro-batch being trained. None: not training, no dropout.
    """

    rate: float
    seed: int
    micro: int | None = None


class AdapterLayer(nn.Module, ABC):
    """A frozen Linear, quantized or not, plus a trainable update.

    Trainable parameters are stored in fp32; matrix products run in the input's precision.

    Attributes:
        inits: Supported initializations, see TrainingConfig.init. Defined in config.adapter.KIND_RULES, which can be
            read without torch.
        formats: File formats that can store this kind, see AdapterConfig.format. Defined in config.adapter.KIND_RULES.
        network: File metadata that describes this kind, besides rank and alpha.
        strength: Multiplier of the weight change. At 0 the output equals the base layer's, bit for bit.
        corrects_base: At strength 0 a base that init loftq corrects is corrected, see inject.without_updates.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    formats: ClassVar[tuple[str, ...]] = ("universal", "comfyui", "kohya")
    network: ClassVar[Mapping[str, str]] = {"ss_network_module": "networks.lora"}
    update_type: ClassVar[type[Update]]

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.strength = rank, float(alpha), 1.0
        self.name, self.dropout, self.corrects_base = "", None, False
        self.working: tuple[Tensor, Tensor] | None = None
        self.together: Callable[[Tensor], list[Tensor] | None] | None = None  # see models/projections.py

    name: str
    dropout: Dropout | None

    @classmethod
    def new(cls, base: nn.Linear, rank: int, alpha: float, config: AdapterConfig) -> AdapterLayer:
        """Create a layer whose update is zero or not initialized yet."""
        return cls(base, rank, alpha)

    def working_factors(self) -> tuple[torch.dtype, Sequence[tuple[Tensor, float]]] | None:
        """What working_copies.py may cast once a step: the products' precision, and A and B with what each is multiplied by.

        None: this layer computes with its masters.
        """
        return None

    @property
    def working_dtype(self) -> torch.dtype | None:
        """The products' precision where working_copies.py casts the factors, else None."""
        factors = self.working_factors()
        return factors[0] if factors else None

    @property
    def is_joinable(self) -> bool:
        """Whether the output is W x + b + B A x with the factors of working_copies.py, see train/step/joined_lora.py."""
        return False

    @abstractmethod
    def start_(self, start: Start) -> None:
        """Initialize the trainable weights."""

    def init_along_(self, directions: Tensor) -> None:
        """Initialize along these unit vectors of the input space, (up to r, in): the eva initialization."""
        raise NotImplementedError(f"{type(self).__name__} has no such start")

    @abstractmethod
    def load_update_(self, update: Update, fill: Callable[[torch.Size], Tensor]) -> None:
        """Load an update from a file.

        Args:
            update: The update.
            fill: Returns initial values of a given shape for weights that the file lacks.
        Raises:
            IncompatibleUpdate: The update is of another kind or shape.
        """

    @abstractmethod
    def update(self) -> Update:
        """Return the update to save, relative to the base it will be loaded on: the original if this is quantized."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""

    @property
    def file_rank(self) -> int:
        """Rank of the saved update."""
        return self.rank

    @property
    def file_alpha(self) -> float:
        """The alpha in a file's metadata: equal to the rank if alpha / rank is already multiplied into the weights."""
        return float(self.file_rank)

    @property
    def scale(self) -> float:
        """Factor that multiplies the product of the trained weights."""
        return self.alpha / self.rank

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters with their names."""
        return self.named_parameters(recurse=False)

    def parts_of_base(self) -> frozenset[str]:
        """Return the names of the trainable parameters that hold parts of the base's weight.

        Weight decay would pull the base itself towards zero, so these parameters are not decayed.
        """
        return frozenset()

    def rounded_(self, before: Mapping[str, Tensor]) -> None:
        """Keep the update where it was, after an optimizer has rounded the trainable weights to fewer bits.

        Args:
            before: The weights in full precision, by their names.
        """

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint stores: the trainable parameters, and initial values where they are needed later."""
        yield from self.trainable()
        yield from self.named_buffers(recurse=False)

    def delta(self) -> Tensor:
        """Return the weight change at strength 1 as it is saved, (out, in), fp64, on the base's device."""
        return self.update().delta(dense_weight(self.base))

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Zero elements of the update's input with probability `rate` and scale the others by 1 / (1 - rate)."""
        drop = self.dropout
        if drop is None or drop.micro is None or not drop.rate:
            return x
        # The mask is generated on the input's device, so that layers don't wait for the CPU.
        source = generator(drop.seed, "dropout", drop.micro, self.name, device=x.device)
        keep_mask = torch.rand(x.shape, generator=source, device=x.device) >= drop.rate
        return x * keep_mask.to(x.dtype).div_(1 - drop.rate)

    def base_product(self, x: Tensor) -> Tensor:
        """Return W x without the bias. Uses the base's own forward, which may load an offloaded weight."""
        base = self.base
        if type(base) is nn.Linear and "forward" not in base.__dict__:
            return F.linear(x, base.weight)
        y = base(x)
        return y if base.bias is None else y - base.bias

    @property
    def summed_base(self) -> nn.Linear | None:
        """The base layer if its output only enters a sum, so that no gradient reads it; else None.

        Used by memory/activation_checkpointing.py.
        """
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
        """Whether the base stores its weight in fewer bits than it computes with."""
        return isinstance(self.base, Compressed) or type(self.base) is not nn.Linear


@dataclass(frozen=True)
class Start:
    """How a layer is initialized.

    Args:
        init: See TrainingConfig.init.
        generator: CPU generator; layers use it one after another, in order.
        iterations: Iterations of the randomized SVD. 0: an exact SVD.
        clean: The layer's weight before quantization, for loftq.
        device: Device on which decompositions run.
    """

    init: str
    generator: torch.Generator
    iterations: int = 0
    clean: Tensor | None = None
    device: torch.device | None = None


def probe(width: int) -> Tensor:
    """Return a fixed vector, (width,), that no update maps to 0 by chance."""
    return torch.linspace(-1, 1, width).cos()


def device_of(base: nn.Module) -> torch.device:
    """Return the device of a layer's tensors without dequantizing a weight."""
    return next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))


def product_dtype(base: nn.Linear) -> torch.dtype:
    """Return the dtype that a layer was loaded in without dequantizing a weight."""
    own = getattr(base, "dtype", None)
    return own if isinstance(own, torch.dtype) else base.weight.dtype
