"""Validation while it trains: the live model's pictures beside the base model's, every N steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...adapters.inject import set_strength_
from ...config.validation import ValidationConfig
from ...host import Host, PhaseStarted, PreviewReady
from ...models.family import ImageCodec
from ...plots.image_grid import save_png
from ...runs import layout
from ...setup.placement import SoloCodec, load_codec
from ...validation.sample_images import Pictures, draw_grids, draw_pictures
from ..phase_timer import PhaseTimer
from ..prepare import RunPlan
from ..step.state import TrainState
from .eval_weights import final_weights


@dataclass
class LiveValidation:
    """Draws nothing where no ValidateSampler is connected. base: the base model's pictures, drawn once."""

    settings: ValidationConfig | None
    codec: ImageCodec | None
    folder: Path
    host: Host
    record: Mapping[str, Any]
    phases: PhaseTimer
    base: Pictures = field(default_factory=dict)
    last_grids: list[Path] = field(default_factory=list)

    @classmethod
    def build(
        cls, plan: RunPlan, state: TrainState, host: Host, record: Mapping[str, Any], phases: PhaseTimer
    ) -> LiveValidation:
        settings = plan.request.validation
        codec = load_codec(state.family, plan.resolved_request, state.device) if settings else None
        if codec and plan.resolved_request.memory.model_offload:
            codec = SoloCodec(codec, state.transformer, state.device)
        return cls(settings, codec, plan.folder / layout.VALIDATION, host, record, phases)

    def draw_base(self, state: TrainState) -> None:
        """The base model's pictures. Call with the LoRA's strength at 0."""
        if self.settings:
            self.base = self._pictures(state)
            self._save(0, [("base", self.base)])

    def hook(self, state: TrainState) -> None:
        if self._is_due(state):
            with self.phases("validate"):
                self._draw(state)
            self.host.emit(PhaseStarted("train", state.num_steps, "steps"))

    def catch_up(self, state: TrainState) -> None:
        """After a resume: draw the pictures of this step, if the run was ended between its checkpoint and them."""
        if self._is_due(state) and not any(self.folder.glob(f"{layout.step_name(state.step)}-*")):
            with self.phases("validate"):
                self._draw(state)

    def _is_due(self, state: TrainState) -> bool:
        every = state.config.validate_every
        return bool(self.settings and every and state.step % every == 0 and 0 < state.step < state.num_steps)

    def draw_last(self, state: TrainState) -> None:
        if self.settings:
            self._draw(state)

    def _draw(self, state: TrainState) -> None:
        assert self.settings
        columns = [("base", self.base)]
        with final_weights(state):
            for strength in self.settings.strengths():
                set_strength_(state.transformer, strength)
                columns.append((f"LoRA {strength:g}", self._pictures(state)))
        set_strength_(state.transformer, 1.0)
        self._save(state.step, columns)

    def _pictures(self, state: TrainState) -> Pictures:
        assert self.settings and self.codec
        self.host.emit(PhaseStarted("validate"))
        return draw_pictures(
            self.settings, state.family, state.transformer, self.codec, state.text, on_step=self.host.check_cancelled
        )

    def _save(self, step: int, columns: list[tuple[str, Pictures]]) -> None:
        assert self.settings
        self.last_grids = []
        for (width, height), grid in draw_grids(columns, self.settings, f"step {step}").items():
            path = self.folder / f"{layout.step_name(step)}-{width}x{height}.png"
            save_png(grid, path, self.record, prompt=self.record["workflow"])
            self.last_grids.append(path)
            self.host.emit(PreviewReady(step, path))
