"""AdapterSettings: type of the adapter, its initialization and its file format."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..trainer_core.config.adapter import CONTINUED, NO_LORA, AdapterConfig
from ..trainer_core.host import Host
from ..trainer_core.runs.saved_loras import checkpoint_of
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(AdapterConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[AdapterConfig]:
    """Return the adapter settings, with init_lora and the checkpoint that is continued as absolute paths."""
    config = AdapterConfig(**{field.name: getattr(inputs, field.name) for field in fields(AdapterConfig)})
    if config.init_lora == NO_LORA:
        return (config,)
    path = host.paths.find_model("loras", config.init_lora, "init_lora")
    if config.init_optimizer == CONTINUED:
        config = replace(config, init_optimizer=str(checkpoint_of(path, host.paths.output)))
    return (replace(config, init_lora=str(path)),)


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
