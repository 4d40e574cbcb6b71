"""AdapterSettings: type of the adapter, its initialization and its file format."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..trainer_core.config.adapter import NO_LORA, AdapterConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(AdapterConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[AdapterConfig]:
    """Return the adapter settings, with init_lora as an absolute path."""
    config = AdapterConfig(**{field.name: getattr(inputs, field.name) for field in fields(AdapterConfig)})
    if config.init_lora == NO_LORA:
        return (config,)
    return (replace(config, init_lora=str(host.paths.find_model("loras", config.init_lora, "init_lora"))),)


SPEC = NodeSpec(
    id="AdapterSettings",
    title="Adapter Settings",
    category="ChromaTrainer/settings",
    description="Sets the type of the adapter, its initialization and its file format.",
    inputs=Inputs,
    outputs=(Output("adapter", "TRAIN_ADAPTER", "Adapter settings, for LoRATrainer."),),
    run=run,
    light=True,
    search_aliases=("dora", "lokr", "loha", "oft", "rslora", "ema", "block"),
)
