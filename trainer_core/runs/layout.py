"""Names of files and folders of a run, and where runs and LoRAs lie. Needs no torch.

    OUTPUT/loras/NAME.safetensors, NAME-best.safetensors     what is trained
    OUTPUT/chroma_trainer/NAME-DIGEST/                       a run's folder
        request.json, world.json, world-images.safetensors   what it was asked for; its manifest
        status.json, command.json, events.jsonl, run.lock    what it does, and what it is asked to do
        checkpoints/step-000250/                             see train/hooks/checkpoint.py
        validation/step-000250-512x512.png                   validation images
        crops.png, pairs.png, density.png, loss.png          charts and sheets
        report.json                                          at its end

Saved runs are found by these names: they never change.
"""

from __future__ import annotations

from pathlib import Path

from ..paths import RUNS

REQUEST, REPORT, MANIFEST = "request.json", "report.json", "world.json"
STATUS, COMMAND, EVENTS = "status.json", "command.json", "events.jsonl"
CROP_SHEET, PAIR_SHEET, DENSITY_CHART, LOSS_CHART = "crops.png", "pairs.png", "density.png", "loss.png"
CHECKPOINTS, VALIDATION = "checkpoints", "validation"
CHECKPOINT_LORA = "lora.safetensors"  # in each checkpoint
STEP = "step-"
LORAS = "loras"


def runs_folder(output: Path) -> Path:
    """Where the folders of runs lie, and the cache."""
    return Path(output) / RUNS


def run_folder(output: Path, name: str, digest: str) -> Path:
    """The folder of the run of this LoRA's name. digest: hex, see train/prepare.py."""
    return runs_folder(output) / f"{name}-{digest[:8]}"


def lora_path(output: Path, name: str, best: bool = False) -> Path:
    """The LoRA file of a run, or that of its best checkpoint."""
    return Path(output) / LORAS / f"{name}{'-best' if best else ''}.safetensors"


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint, and how names of its validation images begin."""
    return f"{STEP}{step:06}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix(STEP))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders of single checkpoints in a run's folder of checkpoints, rising by step, whole or not."""
    paths = (path for path in checkpoints.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdecimal())
    return sorted(paths, key=step_of)


def has_checkpoints(folder: Path) -> bool:
    """Whether the run ever began to save one."""
    return (folder / CHECKPOINTS).is_dir()
