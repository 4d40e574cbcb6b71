"""Registry of selectable parts: name -> module and attribute, as strings. A part is imported when it is loaded."""

from __future__ import annotations

import importlib
from typing import Any

PARTS: dict[str, dict[str, str]] = {
    "family": {
        "chroma": ".models.chroma.family:ChromaFamily",
        "flux": ".models.flux.family:FluxFamily",
        "radiance": ".models.radiance.family:RadianceFamily",
    },
    "linears": {  # linear layers of each family; imports no torch
        "chroma": ".models.lora_targets:CHROMA",
        "flux": ".models.lora_targets:FLUX",
        "radiance": ".models.lora_targets:RADIANCE",
    },
    "store": {  # by the scheme of an address
        "s3": ".data.places.stores.s3_store:S3Store",
        "hf": ".data.places.stores.hub_store:HubStore",
        "fsspec": ".data.places.stores.fsspec_store:FsspecStore",  # every other scheme
    },
    "quantization": {
        "none": ".quant.quantizer:KeepPrecision",
        "int8-quanto": ".quant.quanto:Int8Quanto",
        "int4-quanto": ".quant.quanto:Int4Quanto",
        "int2-quanto": ".quant.quanto:Int2Quanto",
        "fp8-quanto": ".quant.quanto:Fp8Quanto",
        "nf4-bnb": ".quant.bnb:Nf4Bnb",
        "int8-bnb": ".quant.bnb:Int8Bnb",
        "int8-torchao": ".quant.torchao:Int8Torchao",
        "fp8-torchao": ".quant.torchao:Fp8Torchao",
        "fp8-native": ".quant.native:Fp8Native",
    },
    "products": {
        "int8": ".quant.low_precision_matmul:Int8Product",
        "fp8": ".quant.low_precision_matmul:Fp8Product",
    },
    "adapter": {
        "lora": ".adapters.lora:LoraLinear",
        "rslora": ".adapters.rslora:RsLoraLinear",
        "dora": ".adapters.dora:DoraLinear",
        "lokr": ".adapters.lokr:LokrLinear",
        "loha": ".adapters.loha:LohaLinear",
        "oft": ".adapters.oft:OftLinear",
    },
    "weights": {  # kinds of AdapterSettings that train the model itself
        "full": ".full_rank.trained_layer:TrainedLayer",
    },
    "optimizer": {
        "adamw": ".optim.adamw:PART",
        "adamw_bf16": ".optim.adamw_bf16:PART",
        "optimi-lion": ".optim.lion:PART",
        "optimi-stableadamw": ".optim.stable_adamw:PART",
        "bnb-adamw8bit": ".optim.bnb:ADAMW8BIT",
        "bnb-lion8bit-paged": ".optim.bnb:LION8BIT_PAGED",
        "bnb-ademamix8bit": ".optim.bnb:ADEMAMIX8BIT",
        "prodigy": ".optim.prodigy:PART",
        "schedulefree-adamw": ".optim.schedule_free:PART",
        "adafactor": ".optim.adafactor:PART",
        "came": ".optim.came:PART",
    },
    "importer": {  # of other trainers' configurations, in the order in which they are recognized
        "simpletuner": ".importers.trainers.simpletuner:TRAINER",
        "onetrainer": ".importers.trainers.onetrainer:TRAINER",
        "ai-toolkit": ".importers.trainers.ai_toolkit:TRAINER",
        "diffusion-pipe": ".importers.trainers.diffusion_pipe:TRAINER",
        "kohya_ss": ".importers.trainers.kohya_gui:TRAINER",
        "kohya": ".importers.trainers.kohya:TRAINER",
    },
    "tracker": {
        "tensorboard": ".trackers.tensorboard:TensorBoard",
        "wandb": ".trackers.wandb:WeightsAndBiases",
        "webhook": ".trackers.webhook:Webhook",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Return the names of a kind, in the order in which the nodes list them."""
    return tuple(PARTS[kind])


def load(kind: str, name: str) -> Any:
    """Import and return a part.

    Specs validate names before a run starts, so an unknown name here is a bug.
    """
    assert name in PARTS[kind], f"unknown {kind} {name!r}"
    module, attribute = PARTS[kind][name].split(":")
    return getattr(importlib.import_module(module, __package__), attribute)
