"""Log scalars, images and settings to Weights & Biases, and the LoRA where asked. Needs the optional extra `wandb`.

The key, project, entity and mode are read from wandb's own environment variables: WANDB_API_KEY, WANDB_PROJECT,
WANDB_ENTITY, WANDB_MODE. WANDB_LOG_MODEL, which transformers' Trainer reads too, decides whether LoRAs are uploaded: end
(the run's LoRAs and its last grids), checkpoint (those of checkpoints too), or false.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..host import CheckpointSaved, Event, RunReported
from ..storage.atomic import write_atomic
from .tracker import Opening

FOLDER, ID_FILE = "wandb", "run-id.txt"
PROJECT = "chroma-trainer"
LOG_MODEL = "WANDB_LOG_MODEL"
NEVER, END, CHECKPOINT = "", "end", "checkpoint"
MODES = {
    "": NEVER,
    "false": NEVER,
    "0": NEVER,
    "no": NEVER,
    "end": END,
    "true": END,
    "1": END,
    "checkpoint": CHECKPOINT,
}
UPLOAD_SECONDS = 1800.0  # how long a run waits at its end while LoRAs are uploaded
OTHER_LETTERS = re.compile(r"[^A-Za-z0-9._-]+")  # in an artifact's name
MAX_NAME = 100  # characters of it; W&B takes 128
WITHOUT_KEY = ("offline", "dryrun", "disabled")  # modes that upload nothing


class WeightsAndBiases:
    def __init__(self, opening: Opening, log: Callable[[str], None]):
        self._wandb = wandb = importlib.import_module("wandb")
        self._opening, self._log_model = opening, MODES.get(_log_model(), NEVER)
        (opening.folder / FOLDER).mkdir(exist_ok=True)
        identity, is_known = run_id(opening)
        self._run = wandb.init(
            id=identity,
            resume="allow" if is_known and not offline() else None,
            dir=str(opening.folder),
            project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
            name=None if os.environ.get("WANDB_NAME") else opening.folder.name,
            config=dict(opening.settings),
            reinit="create_new",  # another extension in this process may have its own run
            # Upload no code, git state or console output. wandb's own lines would break up ours on the console.
            settings=wandb.Settings(console="off", save_code=False, disable_code=True, disable_git=True, silent=True),
        )
        hint = f'W&B (offline): to upload it later, run wandb sync "{Path(self._run.dir).parent}"'
        log(hint if offline() else f"W&B: {self._run.url}")

    @staticmethod
    def missing() -> str:
        try:
            metadata.version("wandb")
        except metadata.PackageNotFoundError:
            return 'wandb is not installed; run pip install wandb, or pip install "chroma-trainer[wandb]"'
        if _log_model() not in MODES:
            return f"{LOG_MODEL} is {_log_model()[:40]!r}; use end, checkpoint or false"
        if offline() or _has_key():
            return ""
        return (
            "wandb has no API key; set WANDB_API_KEY, or set WANDB_MODE=offline to store the run on this machine and "
            "upload it later"
        )

    def values(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        with Image.open(path) as image:  # upload only the pixels, because the file contains the workflow
            self._log(step, {name: self._wandb.Image(image.convert("RGB"), caption=caption)})

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def event(self, event: Event) -> None:
        """Upload LoRAs, where the user asks for it."""
        if self._log_model == CHECKPOINT and isinstance(event, CheckpointSaved):
            lora = event.path / "lora.safetensors"
            if lora.is_file():  # there is none with kind full; and the checkpoint may have been deleted by now
                self._upload([lora], (), [f"step-{event.step}"], {"step": event.step})
        if self._log_model != NEVER and isinstance(event, RunReported):
            self._upload_result(event.report)

    def _upload_result(self, report: Mapping[str, Any]) -> None:
        """Upload the LoRA of the last step and that of the best one, with the last grids of validation images."""
        best = report.get("best") or {}
        loras = [Path(path) for path in (report.get("lora"), best.get("lora")) if path]
        grids = [Path(path) for path in report.get("files", {}).get("validation", ())]
        values = {name: report.get(name) for name in ("steps", "sha256", "stopped_early")}
        metadata = {**values, "eval_loss": report.get("eval_loss", {}).get("after"), "best": dict(best) or None}
        self._upload(loras, grids, ["final", f"step-{report.get('steps')}"], metadata)

    def _upload(
        self, loras: Sequence[Path], grids: Sequence[Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """Log an artifact of the run. W&B stores equal files once, and adds `latest`."""
        name = OTHER_LETTERS.sub("-", f"lora-{self._opening.name}")[:MAX_NAME].strip("-.")
        settings = {"name": self._opening.name, "settings": self._opening.settings}
        artifact = self._wandb.Artifact(name, type="model", metadata={**settings, **metadata})
        for path in loras:
            artifact.add_file(str(path), name=path.name)
        for path in grids:
            with Image.open(path) as image:  # the pixels alone, as in picture
                artifact.add(self._wandb.Image(image.convert("RGB"), caption=path.stem), f"validation/{path.stem}")
        self._run.log_artifact(artifact, aliases=["latest", *aliases])

    @staticmethod
    def last_seconds(usual: float) -> float:
        """Return how long a run waits for its end."""
        return max(usual, UPLOAD_SECONDS) if MODES.get(_log_model(), NEVER) else usual

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log values, except for steps that wandb already has.

        A resumed run repeats the steps since its checkpoint with the same numbers, and wandb rejects known steps.
        """
        if step >= self._run.step:
            self._run.log(dict(values), step=step)


def run_id(opening: Opening) -> tuple[str, bool]:
    """Return the run's id at W&B, and whether it exists there.

    A new run gets a new id, because ids of deleted runs can't be reused.
    """
    path = opening.folder / FOLDER / ID_FILE
    if opening.step:
        try:
            return path.read_text("utf-8").strip(), True
        except OSError:
            pass
    identity = f"{opening.folder.name.rpartition('-')[2]}-{time.time_ns() // 1_000_000:x}"
    write_atomic(path, identity + "\n")
    return identity, False


def _log_model() -> str:
    return os.environ.get(LOG_MODEL, "").strip().lower()


def offline() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() in WITHOUT_KEY


def _has_key() -> bool:
    """Return whether there is a key in the environment or where `wandb login` stores it.

    Without one, wandb would ask for it at the console in the middle of a run.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if host in path.read_text("utf-8", errors="replace"):
                return True
        except OSError:
            continue
    return False
