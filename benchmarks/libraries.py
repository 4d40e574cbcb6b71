"""Our transformer and our LoRA layer beside diffusers' and peft's, in all four pairs. `python benchmarks/libraries.py`

Each takes the same training step of one sample: forward, backward, the gradients in fp32, as a run takes it (trimmed text, no mask).

operators     dispatched in one step of a narrow Chroma with 19 + 38 blocks in bf16, counted as launches.py does
cpu_seconds   of one step of the tiny and the medium model, forward and backward, in turns in one process; ratio to ours
stored_mib    what the forward pass stores for the backward pass (medium, nothing recomputed)
error         of the LoRA's gradient in bf16, relative to the same pair in fp32 (medium; mean over the layers)
import        CPU seconds and peak MiB of a process that imports what the pair needs to build a model

Result: benchmarks/results/libraries.json. Decision notes 0003 and 0008 quote it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.latent_packing import image_ids, pack, unpack
from chroma_trainer.trainer_core.models.projections import projection_groups
from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies
from launches import NARROW
from models import RESULTS, SIZES, surroundings
from operator_counter import OperatorCounter
from overhead import compared, in_turns
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAMILY = ChromaFamily()
RANK, TEXT_TOKENS, LATENT_EDGE = 16, 24, 16  # a picture of 128 px
PAIRS = {
    "ours": ("ours", "ours"),
    "our transformer, peft's LoRA": ("ours", "peft"),
    "diffusers' transformer, our LoRA": ("diffusers", "ours"),
    "diffusers' transformer, peft's LoRA": ("diffusers", "peft"),
}
IMPORTS = {
    "ours": "from chroma_trainer.trainer_core.models.chroma import transformer",
    "diffusers' transformer, peft's LoRA": "from diffusers import ChromaTransformer2DModel; import peft",
}


@dataclass
class Case:
    """A model with a LoRA.

    Attributes:
        transformer: The model.
        parameters: Trainable parameters by layer, those of A and B in turn, the same order for every pair.
        active: Opened around forward and backward.
        collect: Brings the gradients to the fp32 parameters.
        is_ours: Whether the transformer is ours.
    """

    transformer: Any
    parameters: list[nn.Parameter]
    active: Callable[[], AbstractContextManager[Any]]
    collect: Callable[[], None]
    is_ours: bool

    def step(self, x: Tensor, text: Tensor, target: Tensor) -> float:
        """Forward and backward; return the loss. Gradients replace those of the step before."""
        for parameter in self.parameters:
            parameter.grad = None
        with self.active():
            prediction = self.predict(x, text)
            loss = (prediction.float() - target).square().mean()
            loss.backward()
            self.collect()
        return float(loss.detach())

    def predict(self, x: Tensor, text: Tensor) -> Tensor:
        sigma = torch.tensor([0.4])
        if self.is_ours:
            return FAMILY.predict(self.transformer, x, sigma, [text])
        dtype = next(self.transformer.parameters()).dtype
        tokens = self.transformer(
            hidden_states=pack(x).to(dtype), encoder_hidden_states=text[None].to(dtype), timestep=sigma.to(dtype),
            img_ids=image_ids(*x.shape[2:]), txt_ids=torch.zeros(len(text), 3),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, *x.shape[2:])


def build(pair: str, config: dict[str, Any], dtype: torch.dtype, recompute: bool) -> Case:
    """Build a pair with seeded weights, equal in all pairs; the LoRA's B is random too, so that A has gradients."""
    modules, layers = PAIRS[pair]
    torch.manual_seed(0)
    ours = ChromaTransformer(**config)
    names = resolve_targets(ours, FAMILY, "all+ffs")
    transformer: Any = ours
    if modules == "diffusers":
        from diffusers import ChromaTransformer2DModel

        transformer = ChromaTransformer2DModel(in_channels=64, **config)
        transformer.load_state_dict(ours.state_dict())
    transformer.to(dtype).requires_grad_(False).eval()
    case = _with_our_lora(transformer, names, modules) if layers == "ours" else _with_peft(transformer, names, modules)
    generator = torch.Generator().manual_seed(1)
    for parameter in case.parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5 / 4
    if recompute and pair == "ours":
        checkpoint_blocks_(FAMILY.blocks(transformer), spare_last=False)
    elif recompute and modules == "ours":  # what our checkpointing leaves out, peft's layers would need
        for block in FAMILY.blocks(transformer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    elif recompute:
        transformer.enable_gradient_checkpointing()
        transformer.train()
    return case


def _with_our_lora(transformer: Any, names: list[str], modules: str) -> Case:
    layers = inject_(transformer, names, RANK, RANK, generator=torch.Generator().manual_seed(0))
    by_name = dict(trainable_parameters(layers))
    groups = projection_groups(FAMILY.blocks(transformer)) if modules == "ours" else []
    copies = WorkingCopies(layers, groups, joins_bases=modules == "ours")
    parameters = [by_name[key] for key in sorted(by_name)]
    return Case(transformer, parameters, copies.active, copies.collect_, modules == "ours")


def _with_peft(transformer: Any, names: list[str], modules: str) -> Case:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), transformer)
    by_name = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    for parameter in by_name.values():
        parameter.data = parameter.data.float()  # as peft does in a training (autocast_adapter_dtype)
    parameters = [by_name[key] for key in sorted(by_name)]
    return Case(transformer, parameters, nullcontext, lambda: None, modules == "ours")


def config_of(size: str) -> dict[str, Any]:
    values = SIZES[size]
    return {
        "num_layers": values["double"], "num_single_layers": values["single"], "attention_head_dim": values["head"],
        "num_attention_heads": values["heads"], "joint_attention_dim": values["text"], "axes_dims_rope": values["axes"],
        "approximator_hidden_dim": values["approximator"], "approximator_layers": 5,
    }  # fmt: skip


def inputs(config: dict[str, Any], edge: int = LATENT_EDGE) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_sigma, the text's embedding and the target."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(TEXT_TOKENS, config["joint_attention_dim"], generator=generator)
    x, target = (torch.randn(1, 16, edge, edge, generator=generator) for _ in range(2))
    return x, text, target


def count_operators(recompute: bool) -> dict[str, int]:
    config = NARROW | {"num_layers": 19, "num_single_layers": 38}
    counts = {}
    for pair in PAIRS:
        case, counter = build(pair, config, torch.bfloat16, recompute), OperatorCounter()
        with counter:
            case.step(*inputs(config, 8))
        counts[pair] = counter.counts.total()
    return counts


def measure_seconds(size: str, dtype: torch.dtype, recompute: bool, rounds: int) -> dict[str, Any]:
    config = config_of(size)
    arguments = inputs(config)
    cases = {pair: build(pair, config, dtype, recompute) for pair in PAIRS}
    seconds = in_turns(
        {pair: lambda case=case: case.step(*arguments) for pair, case in cases.items()}, rounds, warmup=2
    )
    return compared(seconds, "ours")


def stored_mib(pair: str) -> float:
    """Return MiB that the forward pass stores, each storage once, the model's own parameters left out."""
    config = config_of("medium")
    case = build(pair, config, torch.bfloat16, False)
    own = {parameter.untyped_storage().data_ptr() for parameter in case.transformer.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, so that no address is used twice

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    x, text, _ = inputs(config)
    with case.active(), torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        prediction = case.predict(x, text)
    assert prediction.requires_grad
    return round(sum(sizes.values()) / 2**20, 1)


def gradient_error(pair: str) -> float:
    """Return the relative error of the gradients in bf16 against those in fp32, mean over the parameters."""
    config = config_of("medium")
    arguments = inputs(config)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        case = build(pair, config, dtype, False)
        case.step(*arguments)
        grads.append([parameter.grad.float() for parameter in case.parameters])  # type: ignore[union-attr]
    errors = [float((low - full).norm() / full.norm()) for full, low in zip(*grads, strict=True) if full.norm() > 0]
    return round(sum(errors) / len(errors), 5)


def import_cost(code: str) -> dict[str, float]:
    """Return CPU seconds and peak MiB of a process that imports torch and this, less those of torch alone."""
    figures = []
    for text in ("import torch", f"import torch; {code}"):
        peak = "from chroma_trainer.trainer_core.devices import peak_ram_bytes"
        script = f"import time\n{peak}\n{text}\nprint(time.process_time(), peak_ram_bytes() / 2**20)"
        command = [sys.executable, "-c", script]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
        rows = [tuple(map(float, run.stdout.split()[-2:])) for run in runs]
        figures.append([median(column) for column in zip(*rows, strict=True)])
    (torch_seconds, torch_mib), (seconds, mib) = figures
    return {"cpu_seconds": round(seconds - torch_seconds, 2), "mib": round(mib - torch_mib)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "libraries.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"surroundings": surroundings()}
    result["losses"] = {
        pair: build(pair, config_of("tiny"), torch.float32, False).step(*inputs(config_of("tiny"))) for pair in PAIRS
    }
    result["operators"] = {
        "nothing recomputed": count_operators(False),
        "every block recomputed": count_operators(True),
    }
    result["seconds"] = {
        f"{size}, {str(dtype).removeprefix('torch.')}, {'every block' if recompute else 'nothing'} recomputed":
            measure_seconds(size, dtype, recompute, rounds)
        for size, dtype, recompute, rounds in (
            ("tiny", torch.float32, False, arguments.rounds),
            ("tiny", torch.float32, True, arguments.rounds),
            ("medium", torch.float32, False, max(3, arguments.rounds // 4)),
            ("medium", torch.float32, True, max(3, arguments.rounds // 4)),
        )
    }  # fmt: skip
    result["stored_mib"] = {pair: stored_mib(pair) for pair in PAIRS}
    result["error"] = {pair: gradient_error(pair) for pair in PAIRS}
    result["import"] = {pair: import_cost(code) for pair, code in IMPORTS.items()}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
