"""Image comparisons: the base model next to a LoRA at several strengths, final or at its run's checkpoints."""

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
    """One state of a LoRA.

    Attributes:
        label: Its label; "" for the final LoRA.
        path: Its file.
        is_model: It is a whole model, which a full-rank run has trained.
    """

    label: str
    path: Path
    is_model: bool = False


@dataclass(frozen=True)
class Drawn:
    """Images of one version at one strength.

    Attributes:
        version: The LoRA; None: the base model.
        strength: Its strength.
        pictures: The images.
    """

    version: Version | None
    strength: float
    pictures: Pictures

    @property
    def label(self) -> str:
        """Label of the grid column."""
        if self.version is None:
            return "base"
        if self.version.is_model:
            return "trained"
        return f"{self.version.label} LoRA {self.strength:g}".strip()


@dataclass(frozen=True)
class Grid:
    """A labeled grid.

    Attributes:
        size: Image width and height.
        label: The prompt's name; empty if there is only one grid per size.
        page: The grid.
    """

    size: tuple[int, int]
    label: str
    page: Image.Image


def versions_of(lora: TrainedLora, settings: ValidationConfig) -> list[Version]:
    """Return the LoRA states to sample, in ascending order of steps.

    Raises:
        UserError: The run has no such checkpoints.
    """
    if lora.is_model:
        if problems := settings.problems_of_model(lora.name):
            raise UserError(problems)
        return [Version("", Path(lora.path), is_model=True)]
    choice = settings.checkpoint_choice()
    if not choice:
        return [Version("", Path(lora.path))]
    folder = Path(lora.folder) / CHECKPOINTS
    if not lora.folder or not folder.is_dir():
        raise UserError.at("checkpoints", f"{lora.name} has no run folder with checkpoints; leave this field empty")
    files = {step_of(path): path / CHECKPOINT_LORA for path in list_checkpoints(folder)}
    paths = {step: path for step, path in files.items() if path.is_file()}
    return [Version(f"step {step}", paths[step]) for step in choice.pick(list(paths))]


def grids_of(results: Sequence[Drawn], settings: ValidationConfig, title: str) -> list[Grid]:
    """Draw grids with a row per prompt and a column per version, or one grid per prompt with versions x strengths."""
    strengths = list(dict.fromkeys(item.strength for item in results if item.version))
    versions = list(dict.fromkeys(item.version for item in results if item.version))
    if len(versions) < 2 or len(strengths) < 2:
        pages = draw_grids([(item.label, item.pictures) for item in results], settings, title)
        return [Grid(size, "", page) for size, page in pages.items()]
    base, by_version = results[0].pictures, {(item.version, item.strength): item.pictures for item in results}
    columns = ["base", *(f"LoRA {strength:g}" for strength in strengths)]
    labels = [version.label for version in versions]
    return [
        Grid(
            size,
            name,
            draw_grid(
                [[base[size][row], *(by_version[version, s][size][row] for s in strengths)] for version in versions],
                labels, columns, f"{title}\n{name}",
            ),
        )
        for size in base
        for row, name in enumerate(settings.library())
    ]  # fmt: skip


def singles_of(results: Sequence[Drawn], settings: ValidationConfig) -> list[tuple[str, object]]:
    """Return every image separately, (H, W, 3) uint8, with its label, such as "base, cat face, 1024x1024"."""
    return [
        (f"{item.label}, {name}, {width}x{height}", pictures[row])
        for item in results
        for (width, height), pictures in item.pictures.items()
        for row, name in enumerate(settings.library())
    ]
