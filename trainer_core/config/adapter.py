"""What kind of adapter is trained: the widgets of AdapterSettings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..spec import Choice, Doc


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter beyond rank, alpha and targets, which are the trainer's own widgets."""

    kind: Annotated[str, Choice("lora"), Doc("lora: W + alpha / rank B A.")] = "lora"
