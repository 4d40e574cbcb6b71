"""AdapterSettings: what kind of adapter is trained and how it starts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..trainer_core.config.adapter import AdapterConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(AdapterConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[AdapterConfig]:
    return (AdapterConfig(**{field.name: getattr(inputs, field.name) for field in fields(AdapterConfig)}),)


SPEC = NodeSpec(
    id="AdapterSettings",
    title="Adapter Settings",
    category="ChromaTrainer/settings",
    description="What kind of adapter is trained and how it starts.",
    inputs=Inputs,
    outputs=(Output("adapter", "TRAIN_ADAPTER", "The adapter's settings, for LoRATrainer."),),
    run=run,
    light=True,
    search_aliases=("dora", "lokr", "rslora", "pissa"),
)
