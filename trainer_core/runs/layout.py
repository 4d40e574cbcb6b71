"""Names of files and folders of a run, and the locations of runs and LoRAs. Needs no torch.

    OUTPUT/loras/NAME.safetensors, NAME-best.safetensors     the trained LoRAs
    OUTPUT/diffusion_models/NAME.safetensors, NAME-best...   the models of full-rank runs
    OUTPUT/chroma_trainer/NAME-DIGEST/                       a run's folder
        request.json, world.json, world-images.safetensors   the request; the run's manifest
        status.json, command.json, events.jsonl, run.lock    state, commands, event log and lock
        checkpoints/step-000250/                             see train/hooks/checkpoint.py
        validation/step-000250-512x512.png                   validation images
        validation/by-name/NAME-step-000250-512x512.png      the same by the names of a prompt library
        validation/base.safetensors                          the base model's, see validation/base_images.py
        validation/scores.json                               CLIP scores and likeness, see train/hooks/score_images.py
        drawn/step-000250-KEY-512x512.png                    images that a user has asked for, see run_images/
        image-sets/vote-1f0c5a7e/                            images for a blind vote or a slider, see run_images/image_sets.py
        preview.jpg                                          the image that is being sampled, where previews are on
        crops.png, pairs.png, density.png, loss.png          charts and sheets
        report.json                                          written at the end
        paths.json                                           paths of this machine (local_values.py)
        launch.json                                          devices, background (local_values.py)
        ranks/rank-1.log                                     logs of the other processes, see docs/devices.md
    OUTPUT/chroma_trainer/queue/ID.json                      a run that waits in the background, see launch/run_queue.py

Saved runs are found by these names, so they never change.
"""

from __future__ import annotations

from pathlib import Path

from ..host import MODELS
from ..paths import RUNS

REQUEST, REPORT, MANIFEST = "request.json", "report.json", "world.json"
LOCAL_VALUES, LAUNCH_VALUES = "paths.json", "launch.json"
STATUS, COMMAND, EVENTS = "status.json", "command.json", "events.jsonl"
CROP_SHEET, PAIR_SHEET, DENSITY_CHART, LOSS_CHART = "crops.png", "pairs.png", "density.png", "loss.png"
PREVIEW = "preview.jpg"
DRAWN = "drawn"
IMAGE_SETS = "image-sets"
CHECKPOINTS, VALIDATION, BY_NAME, SCORES = "checkpoints", "validation", "by-name", "scores.json"
CHECKPOINT_LORA, CHECKPOINT_STATE = "lora.safetensors", "state.json"  # in each checkpoint
CHECKPOINT_WEIGHTS, CHECKPOINT_MANIFEST = "adapter.safetensors", "manifest.json"
STEP = "step-"
LORAS = "loras"
RANKS = "ranks"
QUEUE = "queue"


def runs_folder(output: Path) -> Path:
    """Return the folder that holds the run folders and the cache."""
    return Path(output) / RUNS


def run_folder(output: Path, name: str, digest: str) -> Path:
    """Return the folder of a run.

    Args:
        name: the LoRA's name.
        digest: hex digest of the run, see train/prepare.py.
    """
    return runs_folder(output) / f"{flat_name(name)}-{digest[:8]}"


def rank_log(folder: Path, rank: int) -> Path:
    """Return the log of a process. Rank 0 has one only where it failed in a process of its own."""
    return folder / RANKS / f"rank-{rank}.log"


def flat_name(name: str) -> str:
    """Return a LoRA's name as a part of a folder's name: all run folders lie side by side."""
    return name.replace("/", "~")


def name_of_run(folder: Path) -> str:
    """Return the LoRA's name, as in flat_name, in the name of a run's folder."""
    return folder.name.rpartition("-")[0]


def lora_path(output: Path, name: str, best: bool = False) -> Path:
    """Return the path of a run's LoRA file, or of its best checkpoint's."""
    return Path(output) / LORAS / f"{name}{'-best' if best else ''}.safetensors"


def model_path(output: Path, name: str, best: bool = False) -> Path:
    """Return the path of the model of a full-rank run, or of its best checkpoint's."""
    return Path(output) / MODELS / f"{name}{'-best' if best else ''}.safetensors"


def listed_name(path: Path, output: Path) -> str:
    """Return the name of a LoRA or model as ComfyUI's loaders list it: with its subfolder of the folder they list."""
    folders = (Path(output) / name for name in (LORAS, MODELS))
    return next((str(path.relative_to(folder)) for folder in folders if path.is_relative_to(folder)), path.name)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint folder, which is also the prefix of its validation images."""
    return f"{STEP}{step:06}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix(STEP))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders in a run's folder of checkpoints, in the order of their steps, intact or not."""
    paths = (path for path in checkpoints.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdecimal())
    return sorted(paths, key=step_of)


def has_checkpoints(folder: Path) -> bool:
    """Return whether the run has started to save a checkpoint."""
    return (folder / CHECKPOINTS).is_dir()
