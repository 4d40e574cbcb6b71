"""Interface between the engine and its environment: events, cancellation and paths.

ComfyUI, the CLI and the tests each implement Host. Events are frozen dataclasses that flow one way, from the engine to
its sinks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import Cancelled, Problem, UserError, encodable, nearest, quoted, reason_of
from .storage.allowed_urls import VARIABLE, environment_urls, is_allowed, is_url, normal_url
from .storage.bounded_files import path_fault

MODELS = "diffusion_models"  # folder of models that were trained, in the output folder
MODEL_SUFFIXES = (".safetensors",)
GGUF, GGUF_KINDS = ".gguf", ("diffusion_models", "text_encoders")  # parts that can be read from GGUF files
ROOTS_VARIABLE = "CHROMA_TRAINER_ROOTS"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"


@dataclass(frozen=True)
class Notice:
    """A message to the user that is not an error.

    Args:
        text: the message.
        level: "info" or "warning".
        ascii: the message in ASCII, for consoles whose encoding lacks a character of the text.
    """

    text: str
    level: str = "info"
    ascii: str = ""

    def text_for(self, stream: object) -> str:
        """Return the text; if the encoding of the stream can't represent it, its ASCII form, or escaped."""
        text = encodable(self.text, stream)
        return self.ascii if self.ascii and text != self.text else text


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of the run has started.

    Args:
        phase: "start", "identify", "score", "text", "latents", "load", "eval", "leak", "train", "validate" or
            "save".
        total: units of work in the phase, 0 if unknown.
        unit: name of the unit, in the plural.
    """

    phase: str
    total: int = 0
    unit: str = ""


@dataclass(frozen=True)
class PhaseProgress:
    """Progress of a phase: `done` of `total` units."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class StepReport:
    """An optimizer step has finished.

    Args:
        step: number of the step, from 1.
        total: steps of the run.
        loss: mean over the micro-batches of the step.
        learning_rate: learning rate of the step.
        grad_norm: gradient norm before clipping.
        seconds: duration of the step.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class EvalReport:
    """Loss with fixed noise, which is comparable between steps and runs (train/hooks/eval_loss.py).

    Args:
        step: step of the evaluation, 0 for what the run starts from (the base model, or the LoRA file of init_lora).
        loss: mean loss.
        standard_error: standard error of the mean loss.
        held_out: whether the loss is on images held out of training.
    """

    step: int
    loss: float
    standard_error: float
    held_out: bool


@dataclass(frozen=True)
class EvalCompared:
    """What an evaluation says beside the earlier ones, image by image (train/figures/paired_evals.py).

    Args:
        step: step of the evaluation.
        best: step of the lowest loss so far.
        change: of the loss since the best step, as the mean of the images' differences.
        change_error: standard error of the change.
        trained: mean loss of trained images, beside held-out ones; else None.
        sigmas: noise levels of the gaps.
        gap_since: step that the gaps are counted from.
        gaps: how much more the trained images have improved than the held-out ones, at each sigma.
        gap_errors: their standard errors.
        waiting: evaluations since the best one.
        overfits: whether the loss of held-out images rises while that of the trained ones falls.
    """

    step: int
    best: int
    change: float
    change_error: float
    trained: float | None
    sigmas: tuple[float, ...]
    gap_since: int
    gaps: tuple[float, ...]
    gap_errors: tuple[float, ...]
    waiting: int
    overfits: bool


@dataclass(frozen=True)
class LeakMeasured:
    """How far the LoRA moves predictions without its trigger, beside those with it (train/figures/leak.py).

    Args:
        step: step of the measurement.
        leak: 0 where nothing changes without the trigger, 1 where as much changes as with it.
        standard_error: standard error of the leak.
        sigmas: noise levels.
        by_sigma: the leak at each of them; None where the LoRA moves nothing there.
        moved_with: root mean square of the change of predictions with the trigger; None where it is not finite.
        moved_without: the same without the trigger.
    """

    step: int
    leak: float
    standard_error: float
    sigmas: tuple[float, ...]
    by_sigma: tuple[float | None, ...]
    moved_with: float | None
    moved_without: float | None


@dataclass(frozen=True)
class ImagesScored:
    """How well validation images fit their prompts, and how similar they are to held-out ones (validation/scores/image_scores.py).

    Args:
        step: step of the images, 0 for those of the base model.
        strength: strength of the LoRA, 0 for the base model.
        is_shown: whether charts show it: of several strengths, the one that is nearest to 1.
        clip: mean CLIP score.
        clip_error: standard error of it over the images.
        clip_change: mean change from the base model's images, image by image; None for those themselves.
        clip_change_error: standard error of it.
        likeness: mean likeness to the held-out images; None where none are held out.
        likeness_error: standard error of it.
        likeness_change: mean change from the base model's images.
        likeness_change_error: standard error of it.
        prompts: names of the prompts.
        by_prompt: CLIP score of each of them.
    """

    step: int
    strength: float
    is_shown: bool
    clip: float
    clip_error: float
    clip_change: float | None
    clip_change_error: float | None
    likeness: float | None
    likeness_error: float | None
    likeness_change: float | None
    likeness_change_error: float | None
    prompts: tuple[str, ...]
    by_prompt: tuple[float, ...]


@dataclass(frozen=True)
class PreviewReady:
    """A validation image has been saved to `path`. Step 0 is the base model."""

    step: int
    path: Path


@dataclass(frozen=True)
class SamplingPreview:
    """A preview of the image that is being sampled has replaced the one at `path`. It is not in the event log.

    Args:
        step: sampling steps that are done.
        num_steps: sampling steps of the image.
        path: a JPEG.
    """

    step: int
    num_steps: int
    path: Path


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint has been saved to `path`; the run can resume from it."""

    step: int
    path: Path


@dataclass(frozen=True)
class LoraSaved:
    """The trained LoRA, or model, has been saved to `path`, read back and verified.

    Args:
        path: the .safetensors file.
        sha256: hash of the file.
        applied: number of keys that match a module of the model.
        num_keys: number of keys in the file.
    """

    path: Path
    sha256: str
    applied: int
    num_keys: int

    @property
    def what(self) -> str:
        """What the file is: a LoRA, or the model of a full-rank run, by the folder that it is in."""
        return "model" if MODELS in (parent.name for parent in self.path.parents) else "LoRA"


@dataclass(frozen=True)
class RunOpened:
    """The run has opened its folder, which holds its settings, event log, checkpoints and images."""

    folder: Path


@dataclass(frozen=True)
class MemoryPlanned:
    """Estimated peak memory of the run.

    Args:
        device_bytes: accelerator memory, in bytes.
        ram_bytes: host RAM, in bytes.
    """

    device_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class RunReported:
    """The run has ended. `report` holds JSON values, see docs/report.md."""

    report: dict[str, Any]


@dataclass(frozen=True)
class SweepReported:
    """What the runs of a sweep have reached: at its start, and whenever one of them has ended.

    Args:
        sweep: name of the sweep.
        axes: the fields that differ.
        planned: number of all runs.
        runs: a row for each that has ended, as in table.json (docs/sweep.md).
    """

    sweep: str
    axes: tuple[str, ...]
    planned: int
    runs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class MemoryInUse:
    """Memory of the process that trains, from where that is not the host's own process (trainer_core/launch).

    Args:
        memory: "VRAM" or "RAM".
        used: memory in use, in bytes.
        peak: peak memory of tensors, 0 if unknown.
        total: memory of the device.
    """

    memory: str
    used: int
    peak: int
    total: int


Event = (
    Notice
    | PhaseStarted
    | PhaseProgress
    | StepReport
    | PreviewReady
    | SamplingPreview
    | CheckpointSaved
    | LoraSaved
    | RunOpened
    | MemoryPlanned
    | EvalReport
    | EvalCompared
    | LeakMeasured
    | ImagesScored
    | RunReported
    | SweepReported
    | MemoryInUse
)
# Name of each event in event logs, on the page and in webhooks -> its class.
EVENT_KINDS: Mapping[str, type[Event]] = {
    "Notice": Notice, "PhaseStarted": PhaseStarted, "PhaseProgress": PhaseProgress, "StepReport": StepReport,
    "PreviewReady": PreviewReady, "SamplingPreview": SamplingPreview, "CheckpointSaved": CheckpointSaved,
    "LoraSaved": LoraSaved, "RunOpened": RunOpened, "MemoryPlanned": MemoryPlanned, "EvalReport": EvalReport,
    "EvalCompared": EvalCompared, "LeakMeasured": LeakMeasured, "ImagesScored": ImagesScored,
    "RunReported": RunReported, "SweepReported": SweepReported, "MemoryInUse": MemoryInUse,
}  # fmt: skip
_KIND_OF = {kind: name for name, kind in EVENT_KINDS.items()}


def event_kind(event: Event | type[Event]) -> str:
    """Return the name of an event, or of a kind of events, in event logs, on the page and in webhooks."""
    return _KIND_OF[event if isinstance(event, type) else type(event)]


@dataclass(frozen=True)
class Paths:
    """Folders of a run.

    Args:
        output: folder for results (ComfyUI's output folder, or --output).
        cache: folder for the text, latent and index caches; may be deleted at any time.
        models: kind ("diffusion_models", "text_encoders", "vae", "loras", "diffusers") -> folders, in search order.
        datasets: folders that datasets may be read from. Other folders are refused, because a workflow may come from
            an untrusted source.
        new_datasets: the one of them that SaveDataset writes to; None if nothing can be written.
        urls: addresses that datasets may be read from, in addition to those in the environment.
    """

    output: Path
    cache: Path
    models: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    datasets: tuple[Path, ...] = ()
    new_datasets: Path | None = None
    urls: tuple[str, ...] = ()

    @property
    def allowed_urls(self) -> tuple[str, ...]:
        """All addresses that the user has allowed datasets to be read from."""
        return (*self.urls, *environment_urls())

    def list_models(self, kind: str) -> tuple[str, ...]:
        """Return the sorted names of the model files of a kind, relative to their folder, with forward slashes."""
        suffixes = (*MODEL_SUFFIXES, GGUF) if kind in GGUF_KINDS else MODEL_SUFFIXES
        names = {
            path.relative_to(root).as_posix()
            for root in self.models.get(kind, ())
            if root.is_dir()
            for path in root.rglob("*")
            if path.suffix.lower() in suffixes and path.is_file()
        }
        return tuple(sorted(names))

    def list_transformers(self) -> tuple[str, ...]:
        """Return the sorted names of the diffusers folders that hold a part of a model alone, such as a transformer."""
        names = {
            name
            for kind in ("diffusion_models", "diffusers")
            for root in self.models.get(kind, ())
            if root.is_dir()
            for config in root.glob("*/config.json")
            if (name := config.parent.name) and any(config.parent.glob("*.safetensors"))
        }
        return tuple(sorted(names))

    def find_model(self, kind: str, name: str, field_name: str) -> Path:
        """Return the path of a model file (or diffusers folder) by name.

        Args:
            kind: kind of model, a key of `models`.
            name: name of the file, relative to one of the folders.
            field_name: field that errors refer to.
        Raises:
            UserError: there is no such file. The message lists the searched folders and the closest name.
        """
        relative = name.replace("\\", "/")
        if fault := path_fault(relative):
            raise UserError.at(field_name, f"{name[:60]!r} {fault}")
        roots = self.models.get(kind, ())
        for root in roots:
            path = (root / relative).resolve()
            if os.path.exists(path) and path.is_relative_to(root.resolve()):  # Path.exists raises if a name is too long
                return path
        searched = ", ".join(str(root) for root in roots) or "there are none; set --models"
        hint = nearest(relative, self.list_models(kind))
        if roots and not hint:
            hint = "; put it there, or name another models folder (headless: --models)"
        raise UserError.at(field_name, f"{quoted(name)} is not in the {kind} folders ({searched}){hint}")

    def find_source(self, folder: str, field_name: str) -> str:
        """Return where images are: the path of a folder or of a table of addresses, or an address that is allowed.

        Args:
            folder: address, or path as for find_dataset.
            field_name: field that errors refer to.
        Raises:
            UserError: it does not exist, or is not allowed.
        """
        text = folder.strip().strip('"')
        if is_url(text):
            return self._find_url(text, field_name)
        if text.lower().endswith(TABLE_SUFFIXES) and (table := self._find_table(text, field_name)):
            return table
        return str(self.find_dataset(folder, field_name))

    def _find_table(self, text: str, field_name: str) -> str:
        """Return the path of a table in an allowed root; "" if there is none."""
        roots = [*self.datasets, ASSETS, *extra_roots()]
        if not path_fault(text):
            for path in ((root / expand_home(text).replace("\\", "/")).resolve() for root in roots):
                if os.path.isfile(path) and any(path.is_relative_to(root.resolve()) for root in roots):
                    return str(path)
        return ""

    def _find_url(self, text: str, field_name: str) -> str:
        try:
            url = normal_url(text)
        except ValueError as error:
            raise UserError.at(field_name, f"{text[:100]!r} {error}") from error
        if not is_allowed(url, self.allowed_urls):
            allowed = ", ".join(self.allowed_urls) or "none"
            raise UserError.at(
                field_name,
                f"{url[:200]!r} is not an address that you have allowed ({allowed}); a workflow may come from a "
                f"stranger, so addresses are read only with --allow-url {url[:200]}, or if {VARIABLE} contains it",
            )
        return url

    def find_dataset(self, folder: str, field_name: str) -> Path:
        """Return the path of a dataset folder.

        Args:
            folder: path relative to an allowed root, or absolute and inside one.
            field_name: field that errors refer to.
        Raises:
            UserError: the folder does not exist, is not a folder, or is outside the allowed roots.
        """
        text = expand_home(folder.strip().strip('"'))
        if not text:
            raise UserError.at(field_name, "is empty; enter the name of a folder of images")
        if is_url(text):
            raise UserError.at(field_name, f"{text[:100]!r} is an address; only folder may be one, enter a folder here")
        if fault := path_fault(text):
            raise UserError.at(field_name, f"{text[:60]!r} {fault}")
        roots = [*self.datasets, ASSETS, *extra_roots()]
        for root in roots:
            path = (root / text.replace("\\", "/")).resolve()
            if os.path.isdir(path) and any(path.is_relative_to(r.resolve()) for r in roots):
                return path
        allowed = ", ".join(str(root) for root in roots)
        is_outside = os.path.isdir(text) or any(os.path.isdir(root / text) for root in roots)  # such as by a symlink
        if is_outside:
            fix = f"move it into one of them, or allow its parent folder with {ROOTS_VARIABLE} (headless: --datasets)"
            raise UserError.at(field_name, f"{quoted(folder)} is outside the allowed folders ({allowed}); {fix}")
        hint = nearest(text, [path.name for root in roots if root.is_dir() for path in root.iterdir() if path.is_dir()])
        raise UserError.at(
            field_name, f"{quoted(folder)} is not a folder in ({allowed}){hint or '; put it into one of them'}"
        )

    def find_beside(self, folder: Path, name: str, field_name: str) -> Path:
        """Return the path of a file in a dataset folder, or elsewhere in an allowed root.

        Args:
            folder: the dataset folder, see find_dataset.
            name: path relative to the folder, or absolute.
            field_name: field that errors refer to.
        Raises:
            UserError: the file does not exist, or is outside the allowed roots.
        """
        text = expand_home(name.strip().strip('"'))
        if fault := path_fault(text):
            raise UserError.at(field_name, f"{text[:60]!r} {fault}")
        path = (folder / text.replace("\\", "/")).resolve()
        roots = [folder, *self.datasets, ASSETS, *extra_roots()]
        if not any(path.is_relative_to(root.resolve()) for root in roots):
            fix = f"put it into the folder of the images, or set {ROOTS_VARIABLE} to its folder"
            raise UserError.at(field_name, f"{quoted(name)} is outside the allowed folders; {fix}")
        if not path.is_file():
            names = [item.name for item in folder.iterdir() if item.is_file()] if folder.is_dir() else []
            raise UserError.at(field_name, f"{quoted(name)} is not a file in {folder.name!r}{nearest(text, names)}")
        return path


def extra_roots() -> list[Path]:
    """Return the additional allowed folders in the environment variable CHROMA_TRAINER_ROOTS (separated like PATH)."""
    return [Path(expand_home(part)) for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part]


def expand_home(text: str) -> str:
    """Return a path with a leading ~ replaced by the home folder: a shell does not replace it in VALUE of --set."""
    return os.path.expanduser(text) if text.startswith(("~/", "~\\")) or text == "~" else text


@dataclass(frozen=True)
class Machines:
    """The machines that train together, each of which starts its own processes.

    Args:
        count: number of machines.
        number: number of this one, from 0. Machine 0 writes the run's folder.
        meeting: HOST:PORT of machine 0, where all of them meet.
    """

    count: int = 1
    number: int = 0
    meeting: str = ""


class Host(Protocol):
    """Environment of the engine."""

    @property
    def paths(self) -> Paths:
        """Folders of the run."""
        ...

    @property
    def device(self) -> str:
        """Device to use, such as "cuda:0"; "" lets the engine choose the best one."""
        ...

    @property
    def prompt(self) -> Mapping[str, Any]:
        """The running workflow in ComfyUI's API format, {} outside of a workflow."""
        ...

    @property
    def node_id(self) -> str:
        """Id of the running node in the prompt, "" outside of a workflow."""
        ...

    @property
    def waits_when_paused(self) -> bool:
        """Whether a paused run waits until it is resumed.

        False where other jobs are queued behind it, as in ComfyUI: the run then ends, and continues when it is run
        again.
        """
        ...

    @property
    def machines(self) -> Machines:
        """The machines that train together."""
        ...

    @property
    def background(self) -> Callable[[Any, Mapping[str, Any]], None] | None:
        """Queue a request and its workflow, to be trained in the background; None where nothing would hold the run."""
        ...

    @property
    def faults(self) -> Sequence[str]:
        """One line for each sink that could not write and gets no more events, in the order in which they failed.

        A run logs those that an event of its own has added.
        """
        ...

    def emit(self, event: Event) -> None:
        """Send an event to the sinks. Errors in a sink are not raised."""
        ...

    def check_cancelled(self) -> None:
        """Raise Cancelled (or the exception of the host) if the user has canceled the run. Cheap: called every step."""
        ...

    def free_memory(self) -> None:
        """Free memory that the environment holds, before a model is loaded."""
        ...


@dataclass(frozen=True)
class SinkHost:
    """Host for the CLI and for tests: passes every event to its sinks, in order."""

    paths: Paths
    sinks: tuple[Callable[[Event], None], ...] = ()
    is_cancelled: Callable[[], bool] = lambda: False
    device: str = ""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    node_id: str = ""
    waits_when_paused: bool = True
    machines: Machines = Machines()
    background: Callable[[Any, Mapping[str, Any]], None] | None = None
    faults: list[str] = field(default_factory=list)  # one for each sink that failed and gets no more events
    _failed: list[Callable[[Event], None]] = field(default_factory=list, repr=False)

    def emit(self, event: Event) -> None:
        """Pass an event to the sinks. One that can't write (a closed pipe, a full disk) is left out from then on."""
        for sink in self.sinks:
            if sink in self._failed:
                continue
            try:
                sink(event)
            except (OSError, ValueError) as error:  # ValueError: I/O operation on closed file
                self._failed.append(sink)
                self.faults.append(f"{type(sink).__name__.lower()}: {reason_of(error)}")

    def check_cancelled(self) -> None:
        if self.is_cancelled():
            raise Cancelled

    def free_memory(self) -> None:
        return


def collect(problems: list[Problem], call: Callable[..., object], *args: object) -> object | None:
    """Call a function, and add the problems of a UserError to a list instead of raising it.

    Returns:
        The result of the call, or None if it raised a UserError.
    """
    try:
        return call(*args)
    except UserError as error:
        problems.extend(error.problems)
        return None
