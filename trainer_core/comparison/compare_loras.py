"""Compare two LoRAs by their loss on the same images and noise, and by images of the same prompts and noise.

The model, the images and the prompts are those of a workflow. The loss is that of the held-out images of a run
(train/hooks/eval_loss.py), so two LoRAs are compared image by image (train/paired_evals.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.files.load import apply_lora_, read_lora_file
from ..adapters.inject import remove_
from ..config.adapter import AdapterConfig
from ..config.dataset import DatasetConfig
from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..config.training import EVAL_SIGMAS
from ..errors import Problem, UserError
from ..host import Host, Notice, PreviewReady, SinkHost, collect
from ..plots.image_grid import save_png
from ..runs.saved_loras import find_lora
from ..setup.placement import load_codec
from ..storage.atomic import sha256_of, write_json
from ..storage.safetensors_header import read_header
from ..train.build import build_run
from ..train.figures.leak import Leak
from ..train.figures.paired_evals import Estimate, Evaluation, change, lower_bound
from ..train.hooks.eval_loss import measure
from ..train.phase_timer import PhaseTimer
from ..train.prepare import RunPlan, plan_run
from ..train.step.state import TrainState
from ..validation.render import Counter
from ..validation.sample_images import Pictures, draw_grids, draw_pictures

FOLDER, RESULT = "comparisons", "result.json"
DEFAULT_IMAGES = 16  # where the workflow's eval_images is 0
ALL_IMAGES = 1_000_000  # of a given folder
MIN_IMAGES = 3  # below them an error of a difference says nothing
RECORD = "chroma_trainer"


@dataclass(frozen=True)
class Contender:
    """A LoRA, or the base model.

    Attributes:
        label: "A", "B" or "base".
        path: The file; None for the base model.
    """

    label: str
    path: Path | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a contender."""

    contender: Contender
    evaluation: Evaluation
    leak: Leak | None = None


@dataclass(frozen=True)
class Comparison:
    """The result.

    Attributes:
        base, first, second: The base model, A and B.
        images: What the loss was measured on, in words.
        grids: Files of the image grids.
    """

    base: Measured
    first: Measured
    second: Measured
    images: str
    grids: Sequence[Path] = field(default_factory=tuple)

    @property
    def difference(self) -> Estimate:
        """The loss of B above that of A, and its standard error."""
        value = change(self.second.evaluation.judged, self.first.evaluation.judged)
        assert value
        return value

    @property
    def better(self) -> str:
        """The label of the LoRA with the lower loss, "" where they can't be told apart with 95 % certainty."""
        mean, error = self.difference
        count = len(self.first.evaluation.judged)
        if count < MIN_IMAGES or not math.isfinite(mean):
            return ""
        if lower_bound((abs(mean), error), count - 1) <= 0:
            return ""
        return "A" if mean > 0 else "B"

    def as_json(self) -> dict[str, Any]:
        measured = (self.base, self.first, self.second)
        losses = {entry.contender.label: entry.evaluation for entry in measured}
        pairs = (("B", "A"), ("A", "base"), ("B", "base"))
        return {
            "loras": {
                entry.contender.label: {"file": str(entry.contender.path), "sha256": sha256_of(entry.contender.path)}
                for entry in measured
                if entry.contender.path
            },
            "images": {"count": len(self.base.evaluation.judged), "of": self.images},
            "loss": {label: _estimate(evaluation.loss) for label, evaluation in losses.items()},
            "difference": {
                f"{one} - {other}": {
                    **_estimate(change(losses[one].judged, losses[other].judged)),
                    "by_sigma": {
                        f"{sigma:g}": _estimate(change(losses[one].judged, losses[other].judged, number))
                        for number, sigma in enumerate(EVAL_SIGMAS)
                    },
                }
                for one, other in pairs
            },
            "better": self.better or None,
            "leak": {
                entry.contender.label: _estimate(entry.leak.ratio if entry.leak else None)
                for entry in (self.first, self.second)
                if entry.leak
            },
            "grids": [str(path) for path in self.grids],
        }

    def text(self) -> str:
        """Return the result as lines of text."""
        rows = [f"loss on {len(self.base.evaluation.judged)} {self.images}, the same noise for all:"]
        for entry in (self.base, self.first, self.second):
            loss, start = entry.evaluation.loss, self.base.evaluation.judged
            since = change(entry.evaluation.judged, start) if entry.contender.path else None
            leak = entry.leak.ratio if entry.leak else None
            line = f"  {entry.contender.label:5} {loss[0]:.4f}"
            line += "  {:+.4f} +- {:.4f} from the base".format(*since) if since else ""
            line += "  leak {:.2f} +- {:.2f}".format(*leak) if leak else ""
            line += f"  {entry.contender.path.name}" if entry.contender.path else ""
            rows.append(line)
        mean, error = self.difference
        verdict = f"{self.better} has the lower loss" if self.better else "they can't be told apart"
        rows.append(f"B - A: {mean:+.4f} +- {error:.4f}; {verdict}{' (95 % certainty)' if self.better else ''}")
        return "\n".join(rows)


def _estimate(value: Estimate | None) -> dict[str, float | None]:
    mean, error = value or (math.nan, math.nan)
    return {
        "mean": mean if math.isfinite(mean) else None,
        "standard_error": error if math.isfinite(error) else None,
    }


def find_contenders(first: str, second: str, output: Path) -> list[Contender]:
    """Return A and B.

    Raises:
        UserError: every file that is not there, or is no LoRA that can be used.
    """
    problems: list[Problem] = []
    contenders = []
    for label, text in (("A", first), ("B", second)):
        path = collect(problems, find_lora, text, output)
        if isinstance(path, Path):
            collect(problems, _refuse_broken, path)
            contenders.append(Contender(label, path))
    if not problems and contenders[0].path == contenders[1].path:
        problems.append(Problem("B", "is the same file as A"))
    if problems:
        raise UserError(problems)
    return contenders


def _refuse_broken(path: Path) -> None:
    if broken := read_lora_file(path).broken_layers():
        raise UserError.at(path.name, f"{len(broken)} layers have values that are not finite, such as {broken[0]}")


def request_for(request: TrainRequest, images: str) -> TrainRequest:
    """Return the workflow's request with what a comparison needs.

    Args:
        images: Folder whose images are judged; "" for those of the workflow.
    """
    training = replace(
        request.training, rank=1, alpha=1.0, init="default", preservation=0.0, rollout_probability=0.0, routed_share=0.0,
        eval_images=request.training.eval_images or DEFAULT_IMAGES, resume=False, devices="", trackers="none",
        stop_when="never", epochs=0, steps=1, warmup_steps=0, targets="all",
    )  # fmt: skip
    dataset = request.dataset
    if images:
        root = Path(images).resolve()
        if not root.is_dir():
            raise UserError.at("--images", f"{images!r} is not a folder")
        part = replace(
            dataset.parts[0], folder=str(root), masks="", table="", references="", prior_preservation=False, repeats=1, flip=0.0
        )  # fmt: skip
        dataset, training = DatasetConfig((part,), (str(root),)), replace(training, holdout=0.0, eval_images=ALL_IMAGES)
    return replace(
        request, dataset=dataset, training=training, adapter=AdapterConfig(), memory=MemoryConfig(),
    )  # fmt: skip


def compare(request: TrainRequest, contenders: Sequence[Contender], host: SinkHost, given: bool) -> Comparison:
    """Measure the base model and two LoRAs, and sample the workflow's prompts with each.

    Args:
        request: From request_for.
        contenders: A and B.
        given: Whether the images are given for the comparison.
    Raises:
        UserError: The workflow can't run here, or a LoRA does not fit its model.
        Cancelled: The user canceled.
    """
    with torch.inference_mode(False), torch.no_grad():
        plan = plan_run(request, host, is_main=False)
        for contender in contenders:
            _warn_trained_on(contender, plan, host, given)
        state = _build(plan, host)
        folder = (
            host.paths.output / FOLDER / "-".join(contender.path.stem for contender in contenders if contender.path)
        )
        measured, columns = [], []
        drawer = _Drawer(plan, state, host, len(contenders) + 1)
        for contender in (Contender("base"), *contenders):
            with _applied(state, contender):
                host.emit(Notice(f"measuring {contender.path.name if contender.path else 'the base model'}"))
                measured.append(_measure(state, contender, host))
                columns.append((_column(contender), drawer.draw()))
        grids = drawer.save(columns, folder)
    images = "given images" if given else "held-out images" if state.held else "images of the dataset"
    if not given and not state.held:
        text = "no images are held out (holdout is 0): a LoRA that memorized them has the lower loss. Give other ones with --images"
        host.emit(Notice(text, "warning"))
    result = Comparison(measured[0], measured[1], measured[2], images, tuple(grids))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, result.as_json())
    return result


def _build(plan: RunPlan, host: Host) -> TrainState:
    """Return the state of a run without its adapter."""
    state = build_run(plan, host, PhaseTimer())
    remove_(state.transformer)
    state.layers, state.ema, state.working = {}, None, None
    state.leak_meter.measure_base_(state, host)
    return state


@contextmanager
def _applied(state: TrainState, contender: Contender) -> Iterator[None]:
    if contender.path:
        apply_lora_(state.transformer, contender.path)
    try:
        yield
    finally:
        remove_(state.transformer)


def _measure(state: TrainState, contender: Contender, host: Host) -> Measured:
    leak = state.leak_meter.measure(state, host) if contender.path and state.leak_meter.probes else None
    return Measured(contender, measure(state, host), leak)


def _column(contender: Contender) -> str:
    return f"{contender.label}: {contender.path.stem}" if contender.path else "base"


class _Drawer:
    """Samples the workflow's prompts. Does nothing where no ValidateSampler is connected."""

    def __init__(self, plan: RunPlan, state: TrainState, host: Host, count: int):
        self.settings, self.state, self.host = plan.request.validation, state, host
        self.codec = load_codec(state.family, plan.resolved_request, state.device) if self.settings else None
        if self.settings is None:
            host.emit(Notice("no images are sampled: no ValidateSampler is connected to the trainer"))
        self._total = count * len(self.settings.sizes()) * len(self.settings.library()) if self.settings else 0
        self._counter: Counter | None = None

    def draw(self) -> Pictures:
        if self.settings is None or self.codec is None:
            return {}
        self._counter = self._counter or Counter(self.host, self._total)
        return draw_pictures(
            self.settings, self.state.family, self.state.transformer, self.codec, self.state.text, self._counter,
            self.host.check_cancelled,
        )  # fmt: skip

    def save(self, columns: Sequence[tuple[str, Pictures]], folder: Path) -> list[Path]:
        if self.settings is None:
            return []
        paths = []
        for (width, height), page in draw_grids(columns, self.settings, folder.name).items():
            path = folder / f"{width}x{height}.png"
            save_png(page, path)
            self.host.emit(PreviewReady(-1, path))
            paths.append(path)
        return paths


def _warn_trained_on(contender: Contender, plan: RunPlan, host: Host, given: bool) -> None:
    """Warn where the file's own record says that it was trained on the images that judge it.

    Args:
        given: Whether all images of a folder judge, and not those that are held out.
    """
    assert contender.path
    try:
        record = json.loads(read_header(contender.path).metadata.get(RECORD, "{}"))
        same, holdout = record["dataset"]["digest"] == plan.index.digest, record["request"]["training"]["holdout"]
    except (OSError, ValueError, KeyError, TypeError, UserError, AttributeError):
        return
    if same and (given or holdout != plan.request.training.holdout):
        text = f"{contender.label} was trained on this dataset with holdout {holdout}, so it may know the images that are judged"
        host.emit(Notice(text, "warning"))


def result_path(contenders: Sequence[Contender], output: Path) -> Path:
    """Return the file of the result."""
    return output / FOLDER / "-".join(contender.path.stem for contender in contenders if contender.path) / RESULT
