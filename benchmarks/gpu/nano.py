"""The product on chroma-nano, which comes with it.

Losses in two precisions and on two devices, repeated and resumed runs, and drawn pictures.
"""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chroma_trainer.nodes.load_chroma import REPOS
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import ASSETS, Notice, Paths, SinkHost
from chroma_trainer.trainer_core.setup.placement import load_codec
from chroma_trainer.trainer_core.train.attention_choice import choose_attention_
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.checkpoint import step_name
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import TrainResult, run
from chroma_trainer.trainer_core.validation.sample_images import draw_pictures
from context import Context, Finding
from torch import Tensor

DATASET = ASSETS / "neon-emoji"
# Most that a step's loss may differ, relative to it.
OF_PRECISIONS, OF_DEVICES = 0.03, 1e-3
EXACT = "math"  # a kernel that always adds in the same order


@dataclass(frozen=True)
class Sizes:
    steps: int
    pictures: int
    batch: int


def sizes_of(context: Context) -> Sizes:
    return context.pick(Sizes(steps=40, pictures=4, batch=4), Sizes(steps=4, pictures=2, batch=2))


@dataclass
class Trials:
    """Runs of the product's, and what is found of them."""

    context: Context
    root: Path
    found: dict[str, Any] = field(default_factory=lambda: {"losses": {}, "run_seconds": {}})
    faults: list[str] = field(default_factory=list)

    def run(self, name: str, dtype: str = "bf16", device: str = "", attention: str = "native") -> TrainResult:
        """A run in the folder of this name, or what is left of one there gone on with."""
        began = time.perf_counter()
        request, device = request_of(self.context, dtype, attention), device or str(self.context.device)
        result = run(request, host_of(self.root / name, device, self.context))
        self.found["losses"][name] = [round(loss, 6) for loss in result.losses]
        seconds = {"in_all": round(time.perf_counter() - began, 1), "a_step": result.report["seconds_per_step"]}
        self.found["run_seconds"][name] = seconds
        if not np.isfinite(result.losses).all() or len(result.losses) != request.training.steps:
            self.faults.append(f"{name}: losses are not finite, or not one a step")
        self.context.tell(self.found | {"faults": self.faults})
        return result

    def repeat_and_resume(self) -> str:
        """bf16 twice, and once from a checkpoint: judged by EXACT where a repeated run differs."""
        first = self.run("bf16")
        repeatable = self.run("bf16-again").lora.sha256 == first.lora.sha256
        kernel, name, whole = ("native", "bf16", first) if repeatable else (EXACT, "bf16-exact", None)
        whole = whole or self.run(name, attention=kernel)
        cut_short(self.root / name, self.root / "resumed", len(whole.losses))
        resumed = self.run("resumed", attention=kernel)
        begun, is_same = resumed.report["resumed_from"], resumed.lora.sha256 == whole.lora.sha256
        told = {
            "is_repeatable": repeatable,
            "resumed_from": begun,
            "resumed_kernel": kernel,
            "resumed_is_same": is_same,
        }
        self.found |= told
        if not 0 < begun < len(whole.losses):
            self.faults.append(f"resumed from step {begun}")
        if not is_same:
            self.faults.append("a resumed run ends in other bytes")
        bytes_of = {True: "the same bytes", False: "other bytes"}
        return f"bf16 twice: {bytes_of[repeatable]}; resumed from {begun} ({kernel}): {bytes_of[is_same]}"

    def compare(self, name: str, other: str, limit: float) -> float:
        """The largest difference of two runs' losses, relative to the second one's."""
        pairs = zip(self.found["losses"][name], self.found["losses"][other], strict=True)
        off = self.found[f"off_{name}_{other}"] = max(abs(a - b) / abs(b) for a, b in pairs)
        if not off <= limit:
            self.faults.append(f"losses in {name} and {other} differ by {off:.2g} of their size")
        return off


def train(context: Context) -> Finding:
    """bf16 twice, once more from a checkpoint; fp32 here and on the CPU."""
    root = context.scratch / "nano"
    shutil.rmtree(root, ignore_errors=True)
    trials = Trials(context, root)
    told = trials.repeat_and_resume()
    trials.run("fp32", dtype="fp32")
    of_precisions = trials.compare("bf16", "fp32", OF_PRECISIONS)
    trials.run("fp32-cpu", dtype="fp32", device="cpu")
    of_devices = trials.compare("fp32", "fp32-cpu", OF_DEVICES)
    told += f"; losses off fp32's by {of_precisions:.2g}, those off the CPU's by {of_devices:.2g}"
    return Finding(told, trials.found, trials.faults)


def request_of(
    context: Context, dtype: str, attention: str = "native", validation: ValidationConfig | None = None
) -> TrainRequest:
    sizes = sizes_of(context)
    pictures = str(some_pictures(context, sizes.pictures))
    training = TrainingConfig(
        name="nano", targets="all+ffs", steps=sizes.steps, batch_size=sizes.batch, learning_rate=1e-3, warmup_steps=0,
        gradient_checkpointing=False, checkpoint_every=max(1, sizes.steps // 4), keep_checkpoints=8,
    )  # fmt: skip
    return TrainRequest(
        ModelConfig(family="chroma", flavour="nano", repo=REPOS["nano"], dtype=dtype),
        DatasetConfig(parts=(FolderConfig(folder=pictures, resolution=64, trigger="neonglow"),), roots=(pictures,)),
        training, validation, memory=MemoryConfig(attention=attention),
    )  # fmt: skip


def host_of(output: Path, device: str, context: Context, sinks: tuple[Any, ...] = ()) -> SinkHost:
    """Each kind of device has a cache of its own: what one encodes the other is not to be judged by."""
    cache = context.scratch / f"nano-cache-{torch.device(device).type}"
    return SinkHost(paths=Paths(output=output, cache=cache), sinks=sinks, device=device)


def some_pictures(context: Context, count: int) -> Path:
    """The first of the shipped dataset: the loss before and after is taken over all of them, and that takes time."""
    folder = context.scratch / f"neon-emoji-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sorted(DATASET.glob("*.png"))[:count]:
        for source in (picture, picture.with_suffix(".txt")):
            shutil.copy(source, folder / source.name)
    return folder


def cut_short(whole: Path, target: Path, steps: int) -> None:
    """As if the run had been killed when it wrote its third checkpoint: that one is cut, and none is later."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "loras")
    checkpoints = sorted(target.glob("chroma_trainer/*/checkpoints/step-*"))
    last = next(path for path in reversed(checkpoints) if path.name <= step_name(steps * 3 // 4))
    for path in checkpoints:
        if path.name > last.name:
            shutil.rmtree(path)
    adapter = last / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-7])


class Watched:
    """A codec that remembers what it decodes; the members are those of contract.ImageCodec."""

    def __init__(self, codec: Any):
        self._codec, self.factor, self.channels = codec, codec.factor, codec.channels
        self.latents: list[Tensor] = []
        self.decoded: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.latents.append(latents.cpu())
        self.decoded.append(self._codec.decode(latents))
        return self.decoded[-1]

    def encode(self, pixels: Tensor) -> Tensor:
        return self._codec.encode(pixels)


def draw(context: Context) -> Finding:
    """A picture with CFG by the way of validation, twice, in bf16."""
    gc.collect()
    settings = ValidationConfig(prompts="red heart", steps=context.pick(12, 2), cfg=3.0, resolutions="64x64", seed=3)
    notices: list[str] = []
    sinks = (lambda event: notices.append(event.text) if isinstance(event, Notice) else None,)
    host = host_of(context.scratch / "drawn", str(context.device), context, sinks)
    plan = plan_run(request_of(context, "bf16", validation=settings), host)
    built = build_run(plan, host, PhaseTimer())
    choose_attention_(built, plan.resolved_request.memory.attention, host)
    codec: Any = Watched(load_codec(built.family, plan.resolved_request, built.device))
    began = time.perf_counter()
    pictures = [
        draw_pictures(settings, built.family, built.transformer, codec, built.text)[64, 64][0] for _ in range(2)
    ]
    seconds = (time.perf_counter() - began) / 2
    faults = (
        []
        if all(tensor.isfinite().all() for tensor in (*codec.latents, *codec.decoded))
        else ["latents or pixels are not finite"]
    )
    is_same = torch.equal(codec.latents[0], codec.latents[1]) and bool((pictures[0] == pictures[1]).all())
    faults += [] if is_same else ["the second picture is another one"]
    spread = float(pictures[0].std())
    faults += [] if spread > 1 else ["the picture is of one colour"]
    found = {
        "attention": built.attention,
        "seconds_a_picture": round(seconds, 3),
        "is_same": is_same,
        "deviation": round(spread, 1),
    }
    return Finding(f"{'the same picture' if is_same else 'another picture'} twice, {seconds:.2f} s each", found, faults)
