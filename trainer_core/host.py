"""The only way out of the engine: events, cancel and paths. ComfyUI, the CLI and tests each bring their own Host.

Events are frozen values; sinks subscribe to them and nothing reaches back into the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import Cancelled, Problem, UserError, nearest

MODEL_SUFFIXES = (".safetensors",)
ROOTS_VARIABLE = "CHROMA_TRAINER_ROOTS"
PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"


@dataclass(frozen=True)
class Notice:
    """Something a person should know, that is no fault. level: "info" or "warning"; ascii: the same for a console that can't show text."""

    text: str
    level: str = "info"
    ascii: str = ""

    def shown_on(self, stream: object) -> str:
        """The text, or its ASCII form where the stream's encoding lacks a character of it."""
        try:
            self.text.encode(getattr(stream, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return self.ascii or self.text
        return self.text


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of the run begins. phase: start, text, latents, load, train, validate or save; total: its units of work, 0 unknown."""

    phase: str
    total: int = 0
    unit: str = ""


@dataclass(frozen=True)
class PhaseProgress:
    """done of total units of the phase."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class StepReport:
    """One optimiser step. loss: mean over its micro-batches; grad_norm: before clipping; seconds: of this step."""

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class EvalReport:
    """The loss on fixed noise, comparable between steps and runs (train/hooks/eval_loss.py). step 0 is the base; held_out: on images that were not trained on."""

    step: int
    loss: float
    standard_error: float
    held_out: bool


@dataclass(frozen=True)
class PreviewReady:
    """A validation picture lies at path. step 0 is the base model."""

    step: int
    path: Path


@dataclass(frozen=True)
class CheckpointSaved:
    """The run can be resumed from path."""

    step: int
    path: Path


@dataclass(frozen=True)
class LoraSaved:
    """The trained LoRA lies at path, read back and checked. applied of num_keys modules take it."""

    path: Path
    sha256: str
    applied: int
    num_keys: int


@dataclass(frozen=True)
class RunOpened:
    """The run works in this folder from here on: settings, journal, checkpoints and pictures lie there."""

    folder: Path


@dataclass(frozen=True)
class MemoryPlanned:
    """The most memory that the run is forecast to take, in bytes: on the accelerator, and of the host's RAM."""

    device_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class RunReported:
    """A run is over; report: JSON values, see docs/report.md."""

    report: dict[str, Any]


Event = (
    Notice
    | PhaseStarted
    | PhaseProgress
    | StepReport
    | PreviewReady
    | CheckpointSaved
    | LoraSaved
    | RunOpened
    | MemoryPlanned
    | EvalReport
    | RunReported
)


@dataclass(frozen=True)
class Paths:
    """Where things are, and what may be read.

    Args:
        output: results go here (ComfyUI's output folder, or --output).
        cache: text, latent and index caches; may be deleted at any time.
        models: kind ("diffusion_models", "text_encoders", "vae", "loras", "diffusers") -> folders, in order of search.
        datasets: folders under which a dataset may lie. Reads elsewhere are refused: a workflow may come from a stranger.
    """

    output: Path
    cache: Path
    models: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    datasets: tuple[Path, ...] = ()

    def list_models(self, kind: str) -> tuple[str, ...]:
        """Names of the files of a kind, relative to their folder, with forward slashes, sorted."""
        names = {
            path.relative_to(root).as_posix()
            for root in self.models.get(kind, ())
            if root.is_dir()
            for path in root.rglob("*")
            if path.suffix.lower() in MODEL_SUFFIXES and path.is_file()
        }
        return tuple(sorted(names))

    def find_model(self, kind: str, name: str, field_name: str) -> Path:
        """The file (or diffusers folder) of this name, from the folders of the kind.

        Raises:
            UserError: no such file; names the folders searched and the nearest name.
        """
        relative = name.replace("\\", "/")
        roots = self.models.get(kind, ())
        for root in roots:
            path = (root / relative).resolve()
            if os.path.exists(path) and path.is_relative_to(root.resolve()):  # Path.exists raises on a name too long
                return path
        searched = ", ".join(str(root) for root in roots) or "no folder is known; say --models"
        hint = nearest(relative, self.list_models(kind))
        raise UserError.at(field_name, f"{name!r} is not in the {kind} folders ({searched}){hint}")

    def find_dataset(self, folder: str, field_name: str) -> Path:
        """The dataset folder of this name: relative to an allowed root, or absolute and under one.

        Raises:
            UserError: not there, not a folder, or outside the allowed roots.
        """
        text = folder.strip().strip('"')
        if not text:
            raise UserError.at(field_name, "no folder is given; name a folder of images")
        roots = [*self.datasets, ASSETS, *extra_roots()]
        for root in roots:
            path = (root / text.replace("\\", "/")).resolve()
            if os.path.isdir(path) and any(path.is_relative_to(r.resolve()) for r in roots):
                return path
        allowed = ", ".join(str(root) for root in roots)
        outside = os.path.isdir(text) or any(os.path.isdir(root / text) for root in roots)  # such as a link
        if outside:
            remedy = f"to allow it, set {ROOTS_VARIABLE} to its parent folder or move it"
            raise UserError.at(
                field_name, f"{folder!r} lies outside the folders that may be read ({allowed}); {remedy}"
            )
        hint = nearest(text, [path.name for root in roots if root.is_dir() for path in root.iterdir() if path.is_dir()])
        raise UserError.at(
            field_name, f"{folder!r} is not a folder in ({allowed}){hint or '; put it into one of them'}"
        )


def extra_roots() -> list[Path]:
    """Folders that the owner of the machine allows beside the usual ones, from CHROMA_TRAINER_ROOTS (separated like PATH)."""
    return [Path(part) for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part]


class Host(Protocol):
    """What the engine may ask of the world around it."""

    @property
    def paths(self) -> Paths: ...

    @property
    def device(self) -> str:
        """The accelerator to use, such as "cuda:0"; "" lets the engine pick the best there is."""
        ...

    @property
    def prompt(self) -> Mapping[str, Any]:
        """The running workflow in ComfyUI's API form, {} where there is none."""
        ...

    @property
    def node_id(self) -> str:
        """Id of the running node in the prompt, "" outside of one."""
        ...

    @property
    def waits_when_paused(self) -> bool:
        """Whether a paused run waits here to be resumed. Where others queue behind it, it ends instead, to be run again."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the sinks. Never raises for a sink's own fault."""
        ...

    def check_cancelled(self) -> None:
        """Raises Cancelled (or the host's own interrupt) when the user asked to end. Cheap: called every step."""
        ...

    def free_memory(self) -> None:
        """Ask the surroundings to give up what memory they can, before a model is loaded."""
        ...


@dataclass(frozen=True)
class SinkHost:
    """A Host for the CLI and for tests: hands every event to its sinks, in order."""

    paths: Paths
    sinks: tuple[Callable[[Event], None], ...] = ()
    is_cancelled: Callable[[], bool] = lambda: False
    device: str = ""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    node_id: str = ""
    waits_when_paused: bool = True

    def emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink(event)

    def check_cancelled(self) -> None:
        if self.is_cancelled():
            raise Cancelled

    def free_memory(self) -> None:
        return


def collect(problems: list[Problem], call: Callable[..., object], *args: object) -> object | None:
    """Call, and keep a UserError's problems instead of stopping at them. Returns None where the call failed."""
    try:
        return call(*args)
    except UserError as error:
        problems.extend(error.problems)
        return None
