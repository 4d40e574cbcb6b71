"""The product, whole, on files of true size: what its plan says beside what is measured."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.devices import peak_ram_bytes, peak_vram_bytes, reset_peak
from chroma_trainer.trainer_core.host import Notice, Paths, PhaseStarted, SinkHost, StepReport
from chroma_trainer.trainer_core.train.run import run
from context import Context, Finding, Skipped
from machine import peak_reserved_bytes
from models import picture_folder
from random_runs import RANK, SMALLEST, TARGETS
from true_size import num_bytes, write_model

ROOM = 1.45  # times the files: int8 of the transformer is cached beside them
PICTURES, WORDS = 4, (34, 40)  # captions of 71 to 96 tokens; the loss before and after takes four passes a picture
WARM, STEPS = 2, 12


def write(context: Context) -> Finding:
    """The files, unless they are there."""
    began = time.perf_counter()
    model = model_of(context)
    seconds = time.perf_counter() - began
    sizes = {name: Path(path).stat().st_size for name, path in files_of(model).items()}
    total = sum(sizes.values()) / 1e9
    return Finding(f"{total:.1f} GB in {seconds:.0f} s", {"bytes": sizes, "write_seconds": round(seconds, 1)})


def files_of(model: ModelConfig) -> dict[str, str]:
    return {"transformer": model.transformer_file, "text_encoder": model.text_encoder_file, "vae": model.vae_file}


def model_of(context: Context) -> ModelConfig:
    """Raises: Skipped: the disk has no room for it."""
    size, folder = context.pick("true", "tiny"), context.scratch / "true-size"
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    needed, free = ROOM * num_bytes(size) - there, shutil.disk_usage(folder).free
    if free < needed:
        raise Skipped(
            f"{folder} needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} are free; name another folder with --scratch"
        )
    return write_model(folder, size)


class Watch:
    """Takes the run's events: when each phase began and what it took at most, and when steps ended."""

    def __init__(self, context: Context):
        self._device = context.device
        self.began = self._since = time.perf_counter()
        self.phase = "start"
        self.phases: dict[str, dict[str, float]] = {}
        self.steps: list[StepReport] = []
        self.first_step = 0.0
        self.notices: list[str] = []

    def __call__(self, event: Any) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.text.splitlines()[0])
        if isinstance(event, PhaseStarted):
            self.note(event.phase)
        if isinstance(event, StepReport):
            self.first_step = self.first_step or time.perf_counter() - self.began
            self.steps.append(event)

    def note(self, next_phase: str) -> None:
        """The phase is over."""
        now = time.perf_counter()
        known = self.phases.setdefault(self.phase, {"seconds": 0.0, "peak_gb": 0.0, "reserved_gb": 0.0, "ram_gb": 0.0})
        known["seconds"] = round(known["seconds"] + now - self._since, 2)
        for name, size in (
            ("peak_gb", peak_vram_bytes(self._device)),
            ("reserved_gb", peak_reserved_bytes(self._device)),
            ("ram_gb", peak_ram_bytes()),
        ):
            known[name] = max(known[name], round(size / 1e9, 3))
        reset_peak(self._device)
        self.phase, self._since = next_phase, now

    def peak(self, name: str) -> float:
        """Of all phases."""
        return max(phase[name] for phase in self.phases.values())


def train(context: Context, level: str, edge: int, is_cold: bool = False, mode: str = "manual") -> Finding:
    """A run of a few steps from its request to its LoRA.

    Phases are those that the run tells of: the loss before lies in load, the loss after in save. The report's own
    seconds tell them apart.
    """
    model = replace(model_of(context), quantization=QuantizationConfig(level))
    request, root = request_of(context, model, edge, mode), context.scratch / "product"
    shutil.rmtree(root / "output", ignore_errors=True)
    if is_cold:
        shutil.rmtree(root / "cache", ignore_errors=True)
    watch = Watch(context)
    paths = Paths(output=root / "output", cache=root / "cache")
    report = run(request, SinkHost(paths=paths, sinks=(watch,), device=str(context.device))).report
    watch.note("over")
    found = seconds_found(watch, report, context) | memory_found(watch, report)
    found |= {"level": level, "edge": context.pick(edge, edge // SMALLEST), "mode": mode}
    found |= {"targets": TARGETS, "rank": RANK, "notices": watch.notices}
    told = [f"step 1 after {found['seconds_to_first_step']:.0f} s", f"{found['seconds_a_step']:.3f} s a step"]
    for name, planned in found.get("plan_gb", {}).items():
        told.append(f"{name} {found['peaks_gb'][name]:.2f} GB of {planned:.2f} planned")
    faults = ["steps were skipped"] if report["skipped_steps"] or len(watch.steps) != report["steps"] else []
    faults += [] if "plan_gb" in found else ["there was no forecast"]
    return Finding(", ".join(told), found, faults)


def seconds_found(watch: Watch, report: dict[str, Any], context: Context) -> dict[str, Any]:
    """The import of packages, before the run, counts for its first step."""
    seconds = [event.seconds for event in watch.steps]
    return {
        "import_seconds_before": context.import_seconds,
        "seconds_to_first_step": round(context.import_seconds + watch.first_step, 1),
        "seconds_a_step": round(median(seconds[WARM:] or seconds), 4), "step_seconds": [round(s, 3) for s in seconds],
        "report_seconds": report["seconds"], "losses": [round(event.loss, 5) for event in watch.steps],
    }  # fmt: skip


def memory_found(watch: Watch, report: dict[str, Any]) -> dict[str, Any]:
    """Peaks of each phase, of all, and what the plan said."""
    ram = round(peak_ram_bytes() / 1e9, 3)
    peaks = {"vram": watch.peak("peak_gb"), "reserved": watch.peak("reserved_gb"), "ram": ram}
    found: dict[str, Any] = {"phases": watch.phases, "peaks_gb": peaks, "plan": report["memory"]["predicted"]}
    found |= {"peak_vram_gb": peaks["vram"] or None, "peak_reserved_gb": peaks["reserved"] or None}
    if plan := found["plan"]:
        found["plan_gb"] = {"vram": plan["device_peak_bytes"] / 1e9, "ram": plan["ram_peak_bytes"] / 1e9}
        found["forecast"] = {"peak_gb": round(found["plan_gb"]["vram"], 3)}
    return found


def request_of(context: Context, model: ModelConfig, edge: int, mode: str) -> TrainRequest:
    edge = context.pick(edge, edge // SMALLEST)
    pictures = str(picture_folder(PICTURES, edge, mixed=False, words=WORDS))
    training = TrainingConfig(
        name="true-size", rank=RANK, alpha=float(RANK), targets=TARGETS, steps=context.pick(STEPS, 3), warmup_steps=0,
        checkpoint_every=0, caption_dropout=0.0, gradient_checkpointing=True,
    )  # fmt: skip
    dataset = DatasetConfig(parts=(FolderConfig(folder=pictures, resolution=edge),), roots=(pictures,))
    return TrainRequest(model, dataset, training, memory=MemoryConfig(mode=mode))
