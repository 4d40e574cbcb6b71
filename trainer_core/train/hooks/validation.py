"""Validation during training: sample images with the trained model every N steps, next to the base model's images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...adapters.inject import set_strength_
from ...config.validation import ValidationConfig
from ...distributed.ranks import Ranks
from ...host import Host, Notice, PhaseStarted, PreviewReady
from ...models.family import ImageCodec
from ...planner.memory_plan import MemoryPlan
from ...plots.image_grid import find_png_fault, save_png
from ...runs import layout
from ...setup.placement import SoloCodec, load_codec
from ...storage.atomic import set_aside
from ...validation.base_images import key_of, load_base, save_base
from ...validation.previews import Preview, preview_of
from ...validation.sample_images import Pictures, draw_grids, draw_named, draw_pictures, file_names
from ..phase_timer import PhaseTimer
from ..prepare import RunPlan
from ..step.state import TrainState
from .eval_weights import final_weights
from .sampling_model import SamplingModel
from .score_images import BASE, ImageScoring


@dataclass
class LiveValidation:
    """Samples and saves validation images. Does nothing where no ValidateSampler is connected."""

    settings: ValidationConfig | None
    codec: ImageCodec | None
    folder: Path
    host: Host
    record: Mapping[str, Any]
    phases: PhaseTimer
    preview: Preview | None = None  # of the image that is being sampled
    scoring: ImageScoring | None = None  # where images are scored, on the main rank
    base: Pictures = field(default_factory=dict)  # the base model's images, sampled once a run
    last_grids: list[Path] = field(default_factory=list)  # files of the latest validation
    damaged: list[str] = field(default_factory=list)  # names of images that were set aside
    other: SamplingModel | None = None  # the model that samples, where it is not the trained one

    @classmethod
    def build(
        cls,
        plan: RunPlan,
        state: TrainState,
        host: Host,
        record: Mapping[str, Any],
        phases: PhaseTimer,
        scoring: ImageScoring | None = None,
        estimate: MemoryPlan | None = None,
    ) -> LiveValidation:
        """Load the codec where images are sampled."""
        settings, request = plan.request.validation, plan.resolved_request.for_drawing
        codec = load_codec(state.family, request, state.device) if settings else None
        if codec and request.memory.model_offload:
            codec = SoloCodec(codec, state.transformer, state.device)
        preview = preview_of(settings, codec, plan.folder / layout.PREVIEW, host) if settings and codec else None
        live = cls(settings, codec, plan.folder / layout.VALIDATION, host, record, phases, preview, scoring)
        live.other = SamplingModel.of(plan, host, estimate)
        return live

    def sample_base(self, state: TrainState) -> None:
        """Sample the base model's images, or take those of an earlier start."""
        if not self.settings:
            return
        set_strength_(state.transformer, 0.0)
        model = self.other.identity() if self.other else ""
        key = key_of(self.settings, self.record["versions"], str(state.device), model)
        earlier = load_base(self.folder, key) if state.ranks.is_main else None
        if state.ranks.from_main(lambda: earlier is None):
            with self._drawing(state, has_lora=False) as (transformer, codec):
                self.base = self._sample_images(state, transformer, codec)
        if earlier is None and state.ranks.is_main:
            save_base(self.folder, key, self.base)
        set_strength_(state.transformer, 1.0)
        self.base = earlier or self.base
        self._save(state, 0, [("base", self.base)])
        self._score(0, [(BASE, self.base)])

    def hook(self, state: TrainState) -> None:
        """Sample images where the settings ask for them at this step."""
        if self._is_due(state):
            with self.phases("validate"):
                self._validate(state)
            self.host.emit(PhaseStarted("train", state.num_steps, "steps"))

    def set_damaged_aside(self, ranks: Ranks) -> None:
        """Rename the validation images of an earlier start that can't be read any more."""
        if not ranks.is_main:
            return
        for path in sorted(self.folder.glob(f"{layout.STEP}*.png")):
            if fault := find_png_fault(path):
                renamed = set_aside(path)
                self.damaged.append(path.name)
                message = f"validation image {path.name} is damaged ({fault}) and was renamed to {renamed.name}"
                self.host.emit(Notice(message, "warning"))

    def catch_up(self, state: TrainState) -> None:
        """After a resume, sample the images of this step if they are missing or damaged.

        They are missing where the run ended between its checkpoint and its validation.
        """
        prefix = f"{layout.step_name(state.step)}-"
        past = [name for name in self.damaged if layout.step_name(1) <= name < prefix]
        if past:
            text = f"{', '.join(past)} can't be sampled again, because the run is at step {state.step}"
            self.host.emit(Notice(text, "warning"))
        is_damaged = any(name.startswith(prefix) for name in self.damaged)
        is_unscored = self.scoring is not None and state.step not in self.scoring.steps
        is_missing = is_damaged or is_unscored or not any(self.folder.glob(f"{prefix}*"))
        is_missing = state.ranks.from_main(lambda: is_missing)
        if self._is_due(state) and is_missing:
            with self.phases("validate"):
                self._validate(state)

    def _is_due(self, state: TrainState) -> bool:
        every = state.config.validate_every
        return bool(self.settings and every and state.step % every == 0 and state.step and not state.is_over)

    def sample_last(self, state: TrainState) -> None:
        """Sample the images of the last step."""
        if self.settings:
            self._validate(state)

    def _validate(self, state: TrainState) -> None:
        assert self.settings
        strengths, images = self.settings.strengths(), []
        with final_weights(state), self._drawing(state, has_lora=True) as (transformer, codec):
            for strength in strengths:
                set_strength_(transformer, strength)
                images.append(self._sample_images(state, transformer, codec))
        set_strength_(state.transformer, 1.0)
        labels = ["trained" if state.is_full else f"LoRA {strength:g}" for strength in strengths]
        self._save(state, state.step, [("base", self.base), *zip(labels, images, strict=True)])
        self._score(state.step, [*zip(strengths, images, strict=True)])

    def _score(self, step: int, columns: list[tuple[float, Pictures]]) -> None:
        if self.scoring:
            self.host.emit(PhaseStarted("score"))
            self.scoring.score(step, columns)

    @contextmanager
    def _drawing(self, state: TrainState, has_lora: bool) -> Iterator[tuple[nn.Module, ImageCodec]]:
        """Yield the model that samples, and its codec."""
        assert self.codec
        if self.other is None:
            yield state.transformer, self.codec
            return
        with self.other.loaded(state, has_lora) as transformer:
            codec = self.codec.beside(transformer) if isinstance(self.codec, SoloCodec) else self.codec
            yield transformer, codec

    def _sample_images(self, state: TrainState, transformer: nn.Module, codec: ImageCodec) -> Pictures:
        assert self.settings
        self.host.emit(PhaseStarted("validate"))
        text = state.text if state.drawn_text is None else state.drawn_text
        return draw_pictures(
            self.settings, state.family, transformer, codec, text,
            on_step=lambda: state.check_cancelled(self.host), preview=self.preview, ranks=state.forward_ranks,
        )  # fmt: skip

    def _save(self, state: TrainState, step: int, columns: list[tuple[str, Pictures]]) -> None:
        assert self.settings
        if not state.ranks.is_main:
            return
        self.last_grids = []
        for (width, height), grid in draw_grids(columns, self.settings, f"step {step}").items():
            path = self.folder / f"{layout.step_name(step)}-{width}x{height}.png"
            save_png(grid, path, self.record, prompt=self.record["workflow"])
            self.last_grids.append(path)
            self.host.emit(PreviewReady(step, path))
        if self.settings.is_named:
            self._save_by_name(step, columns)

    def _save_by_name(self, step: int, columns: list[tuple[str, Pictures]]) -> None:
        """Save the images of each prompt of a library in a file with the prompt's name."""
        assert self.settings
        names = file_names(list(self.settings.library()))
        for (label, (width, height)), row in draw_named(columns, self.settings, f"step {step}").items():
            path = self.folder / layout.BY_NAME / f"{names[label]}-{layout.step_name(step)}-{width}x{height}.png"
            save_png(row, path, self.record, prompt=self.record["workflow"])
