"""What is drawn side by side: the base, and a LoRA at its strengths, as it ended or at its run's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..config.request import TrainedLora
from ..config.validation import ValidationConfig
from ..errors import UserError
from ..plots.image_grid import draw_grid
from ..runs.layout import CHECKPOINT_LORA, CHECKPOINTS, list_checkpoints, step_of
from .sample_images import Pictures, draw_grids


@dataclass(frozen=True)
class Version:
    """One state of a LoRA. label: "" for the LoRA as it ended."""

    label: str
    path: Path


@dataclass(frozen=True)
class Drawn:
    """Pictures of one version at one strength; version None: the base model."""

    version: Version | None
    strength: float
    pictures: Pictures

    @property
    def label(self) -> str:
        if self.version is None:
            return "base"
        return f"{self.version.label} LoRA {self.strength:g}".strip()


@dataclass(frozen=True)
class Grid:
    """A labelled page. label: what is on it; empty where there is one a size only."""

    size: tuple[int, int]
    label: str
    page: Image.Image


def versions_of(lora: TrainedLora, settings: ValidationConfig) -> list[Version]:
    """The states to draw, rising by step.

    Raises:
        UserError: checkpoints are asked for that the run does not have.
    """
    choice = settings.checkpoint_choice()
    if not choice:
        return [Version("", Path(lora.path))]
    folder = Path(lora.folder) / CHECKPOINTS
    if not lora.folder or not folder.is_dir():
        raise UserError.at("checkpoints", f"{lora.name} comes without its run's folder; leave this field empty")
    files = {step_of(path): path / CHECKPOINT_LORA for path in list_checkpoints(folder)}
    found = {step: path for step, path in files.items() if path.is_file()}
    return [Version(f"step {step}", found[step]) for step in choice.pick(list(found))]


def grids_of(drawn: Sequence[Drawn], settings: ValidationConfig, title: str) -> list[Grid]:
    """A row a prompt and a column a version; with several versions and strengths, a grid of both for each prompt."""
    strengths = list(dict.fromkeys(item.strength for item in drawn if item.version))
    versions = list(dict.fromkeys(item.version for item in drawn if item.version))
    if len(versions) < 2 or len(strengths) < 2:
        pages = draw_grids([(item.label, item.pictures) for item in drawn], settings, title)
        return [Grid(size, "", page) for size, page in pages.items()]
    base, by_place = drawn[0].pictures, {(item.version, item.strength): item.pictures for item in drawn}
    columns = ["base", *(f"LoRA {strength:g}" for strength in strengths)]
    labels = [version.label for version in versions]
    return [
        Grid(
            size,
            name,
            draw_grid(
                [[base[size][row], *(by_place[version, s][size][row] for s in strengths)] for version in versions],
                labels, columns, f"{title}\n{name}",
            ),
        )
        for size in base
        for row, name in enumerate(settings.library())
    ]  # fmt: skip


def singles_of(drawn: Sequence[Drawn], settings: ValidationConfig) -> list[tuple[str, object]]:
    """Every picture by itself, (H, W, 3) uint8, with what it shows: "base, cat face, 1024x1024"."""
    return [
        (f"{item.label}, {name}, {width}x{height}", pictures[row])
        for item in drawn
        for (width, height), pictures in item.pictures.items()
        for row, name in enumerate(settings.library())
    ]
