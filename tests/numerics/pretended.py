"""Runs what a GPU would run on a device that does not exist: `python pretended.py CHROMA FLUX [CASE ...]`, one JSON line a case.

Tensors there are torch's fake ones: they have shapes and a device, no numbers, and two devices in one operation are an error, as
on a GPU. A process of its own, for the device's name stays registered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.ema import Ema
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.flux import FluxOptions
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.quant.low_precision_matmul import choose_products_
from chroma_trainer.trainer_core.registry import load, names
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "pretended"
DRAWS_OR_READS = {
    "adamw_bf16",
    "prodigy",
}  # the one draws on the device, the other reads a number: fake tensors do neither
LEVELS_OF_PRODUCTS = {"int8": "int8-quanto", "fp8": "fp8-native"}


class NoWaits(TorchDispatchMode):
    """An error where numbers come back from the device: the host would wait for all that it has been given to do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        came = any(isinstance(x, torch.Tensor) and x.device.type == DEVICE for x in tree_leaves((args, kwargs)))
        if came and any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves(out)):
            raise RuntimeError(f"{func} waits for the device")
        return out


def moved_(module: nn.Module) -> nn.Module:
    """Every tensor of it on the device. Only inside of a FakeTensorMode."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                there = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(there, requires_grad=tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    return module


def step(model: ModelConfig, level: str, kind: str, products: str = "exact", references: bool = False) -> None:
    """A batch of two prompts of different lengths, checkpointed; then the same without gradients. Nothing waits for the device."""
    family = load("family", model.family)()
    transformer = family.load_transformer(model)
    load("quantization", level)().quantize_(transformer, family.full_precision)
    choose_products_(transformer, products)
    names_ = resolve_targets(transformer, family, "all+ffs")
    inject_(transformer, names_, 4, 4, generator=torch.Generator().manual_seed(0), config=AdapterConfig(kind=kind))
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaits():
        moved_(transformer)
        checkpoint_blocks_(family.blocks(transformer))
        latents, sigma = torch.empty(2, 16, 8, 8, device=DEVICE), torch.empty(2, device=DEVICE)
        text = [torch.empty(tokens, 32, device=DEVICE) for tokens in (5, 9)]
        beside = {"reference": torch.empty_like(latents)} if references else {}
        loss = velocity_loss(family.predict(transformer, latents, sigma, text, **beside), latents).mean()
        assert str(loss.device).startswith(DEVICE) and loss.requires_grad
        with torch.no_grad(), family.drawing(transformer):
            family.predict(transformer, latents, sigma, text, **beside)


def codec(model: ModelConfig, tiling: bool) -> None:
    family = load("family", model.family)()
    found = family.load_codec(model, torch.device("cpu"))
    found.economise_(tiling, tiling)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved_(found.vae)
        found.device = torch.device(DEVICE)
        latents = found.encode(torch.empty(2, 3, 64, 64))
        assert found.decode(latents).device.type == "cpu"


def optimizer(name: str) -> None:
    """Two steps, the second on states that are there, and an average of the weights."""
    layer = inject_(nn.Sequential(nn.Linear(16, 24)), ["0"], 4, 4, generator=torch.Generator().manual_seed(0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved_(layer["0"])
        parameters = [parameter for _, parameter in trainable_parameters(layer)]
        part = load("optimizer", name)
        made = part.build([{"params": parameters}], OptimizerConfig(optimizer=name), 1e-3, 0.01, 0)
        average = Ema(layer, 0.9)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            made.step()
            average.update_(layer)


def cases(chroma: str, flux: str) -> Iterator[tuple[str, Callable[[], None]]]:
    of_chroma = ModelConfig(family="chroma", flavour="tiny", repo=chroma, dtype="fp32")
    of_flux = ModelConfig(family="flux", flavour="dev", repo=flux, dtype="fp32", flux=FluxOptions(max_tokens=24))
    kontext = ModelConfig(family="flux", flavour="kontext", repo=flux, dtype="fp32", flux=FluxOptions(max_tokens=24))
    for level in names("quantization"):
        if not load("quantization", level)().missing():
            yield f"chroma, {level}", lambda n=level: step(of_chroma, n, "lora")
    for kind in names("adapter"):
        yield f"chroma, {kind}", lambda k=kind: step(of_chroma, "none", k)
    yield "flux", lambda: step(of_flux, "int8-quanto", "lora")
    for tiling in (False, True):
        yield f"codec, tiling {tiling}", lambda t=tiling: codec(of_chroma, t)
    yield "flux kontext, references", lambda: step(kontext, "none", "lora", references=True)
    for products, level in LEVELS_OF_PRODUCTS.items():
        yield f"chroma, {products} products", lambda p=products, n=level: step(of_chroma, n, "lora", p)
    for name in names("optimizer"):
        if not load("optimizer", name).extra and name not in DRAWS_OR_READS:
            yield f"optimizer {name}", lambda n=name: optimizer(n)
    yield "two devices", mixed
    yield "a wait", waiting


def mixed() -> None:
    """Must fail: else nothing here means anything."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _ = torch.empty(3, device=DEVICE) + torch.empty(3)


def waiting() -> None:
    """Must fail as well."""
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaits():
        torch.empty(3, device=DEVICE).cpu()


def main() -> int:
    _setup_privateuseone_for_python_backend(DEVICE)
    for name, case in cases(*sys.argv[1:3]):
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        fault = ""
        try:
            case()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps({"case": name, "fault": fault}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
