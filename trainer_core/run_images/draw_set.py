"""Sample the images of a set (image_sets.py): two versions for a blind vote, or one LoRA at several strengths.

Every version samples the same prompts from the same noise, with the settings of the run's own ValidateSampler.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..config.validation import CheckpointChoice, ValidationConfig
from ..errors import Problem, UserError, quoted
from ..host import Notice, SinkHost, collect
from ..plots.image_grid import save_png
from ..runs import layout
from ..runs.saved_loras import find_lora
from ..storage.atomic import sha256_of, sha256_text, write_json
from ..storage.stored_names import key_text
from ..validation.render import Counter, Renderer
from ..validation.sample_images import Pictures, prompts_of
from ..workflow.execute import TrainerNode
from .draw_run import newest_checkpoint, request_of, resolve
from .drawable import Asked
from .image_sets import (
    MAX_ROWS,
    MAX_VERSIONS,
    SET,
    STRENGTHS,
    VOTE,
    ImageSet,
    Row,
    Shown,
    image_name,
    read_set,
    set_folder,
)

BASE = "base"


@dataclass(frozen=True)
class Version:
    """What is sampled.

    Attributes:
        label: Its name.
        path: The LoRA; None: the base model.
        strength: Of the LoRA.
        step: Of its checkpoint, for a slider.
    """

    label: str
    path: Path | None
    strength: float = 1.0
    step: int = 0


def versions_for_vote(names: Sequence[str], run: Path, output: Path) -> list[Version]:
    """Return the two versions of a vote: steps of checkpoints, names of LoRAs in the output folder, or "base".

    Raises:
        UserError: There are not two, they are the same, or one of them does not exist.
    """
    if len(names) != 2:
        raise UserError.at("compare", f"are {len(names)} versions; a vote is on two, such as 250, 500")
    problems: list[Problem] = []
    versions = [collect(problems, _version, name, run, output) for name in names]
    files = [version.path for version in versions if isinstance(version, Version)]
    if not problems and files[0] == files[1]:
        problems.append(Problem("compare", f"are both {names[0]}; choose two versions"))
    if problems:
        raise UserError(problems)
    return [version for version in versions if isinstance(version, Version)]


def _version(name: str, run: Path, output: Path) -> Version:
    if name == BASE:
        return Version(BASE, None)
    if not name.isdecimal():
        path = find_lora(name, output)
        if not path.resolve().is_relative_to((output / layout.LORAS).resolve()):
            raise UserError.at(
                "compare", f"{quoted(name)} is outside of the output folder; use the name of a LoRA in it"
            )
        return Version(path.relative_to(output / layout.LORAS).as_posix(), path)
    steps = {layout.step_of(path): path for path in layout.list_checkpoints(run / layout.CHECKPOINTS)}
    path = steps.get(int(name), run) / layout.CHECKPOINT_LORA
    if not path.is_file():
        known = ", ".join(map(str, steps)) or "none"
        raise UserError.at("compare", f"the run has no checkpoint of step {name} with a LoRA; it has {known}")
    return Version(f"step {int(name)}", path)


def draw_asked(
    run: Path, asked: Asked, prompts: Sequence[str], trainer: TrainerNode, host: SinkHost, settings: Sequence[str] = ()
) -> Path:
    """Sample the images that a user asks for. Return the folder of the set. See draw_set."""
    if asked.compare.strip():
        kind, versions = VOTE, versions_for_vote(asked.names(), run, host.paths.output)
    else:
        kind, versions = STRENGTHS, strengths_of(run, asked.strength_list(), asked.checkpoint_choice())
    return draw_set(run, kind, versions, prompts, asked.num_seeds, trainer, host, settings)


def draw_set(
    run: Path,
    kind: str,
    versions: Sequence[Version],
    prompts: Sequence[str],
    num_seeds: int,
    trainer: TrainerNode,
    host: SinkHost,
    settings: Sequence[str] = (),
) -> Path:
    """Sample the images of a set, unless they are there. Return its folder.

    Args:
        run: Folder of the run.
        kind: VOTE or STRENGTHS.
        versions: Two for VOTE; for STRENGTHS each checkpoint at each strength, the checkpoints one after another.
        prompts: The prompts; empty: those of the run's ValidateSampler.
        num_seeds: Number of seeds for each prompt, from that of the sampling settings on.
        trainer: See TrainerNode.
        host: Environment.
        settings: NODE.FIELD=VALUE for values of the run's workflow.
    Raises:
        UserError: The run's workflow can't run here, or there are too many images.
        Cancelled: The user canceled. The set is not there.
    """
    model, sampling = resolve(request_of(run, trainer, host, settings), prompts, host)
    sampling = sampling.of_the_images()
    rows = _rows(sampling, num_seeds)
    digests = {path: sha256_of(path) for path in {version.path for version in versions} if path}
    shown = [Shown(v.label, digests[v.path] if v.path else "", v.strength, v.step) for v in versions]
    identity = (
        key_text(sampling),
        str(num_seeds),
        *(f"{item.label} {item.sha256} {item.strength:g}" for item in shown),
    )
    folder = set_folder(run, kind, sha256_text(*identity))
    if read_set(folder):
        host.emit(Notice(f"the images are there already: {folder.name}"))
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what a canceled one left
    with torch.inference_mode(False), torch.no_grad():
        renderer = Renderer(model, None, prompts_of(sampling), host, sampling)
        repeated = sum(not version.strength for version in versions) - 1 if kind == STRENGTHS else 0
        count = Counter(host, len(rows) * (len(versions) - max(0, repeated)))
        base: list[Pictures] = []  # of strength 0, which no checkpoint changes
        for number, version in enumerate(versions):
            is_base = kind == STRENGTHS and not version.strength
            if is_base and base:
                _save(folder, number, base)
                continue
            if version.path:
                renderer.put(version.path)
            images = [_draw(renderer, version, sampling, seed, count) for seed in _seeds(sampling, num_seeds)]
            base = images if is_base else base
            _save(folder, number, images)
    step = versions[-1].step
    write_json(folder / SET, ImageSet(kind, tuple(shown), tuple(rows), step).as_json())
    host.emit(Notice(f"{len(rows)} rows of images are ready in the sidebar, at the run {run.name}"))
    return folder


def _seeds(sampling: ValidationConfig, count: int) -> range:
    return range(sampling.seed, sampling.seed + count)


def _rows(sampling: ValidationConfig, num_seeds: int) -> list[Row]:
    """Return the rows in the order of the images: by seed, size and prompt."""
    rows = [
        Row(name, prompt, seed, size)
        for seed in _seeds(sampling, num_seeds)
        for size in sampling.sizes()
        for name, prompt in sampling.library().items()
    ]
    if len(rows) > MAX_ROWS:
        raise UserError.at("num_seeds", f"gives {len(rows)} images of each version; at most {MAX_ROWS} are sampled")
    return rows


def _draw(renderer: Renderer, version: Version, sampling: ValidationConfig, seed: int, count: Counter) -> Pictures:
    return renderer.draw(replace(sampling, seed=seed), version.strength if version.path else 0.0, count)


def _save(folder: Path, version: int, by_seed: Sequence[Pictures]) -> None:
    images = (image for pictures in by_seed for column in pictures.values() for image in column)
    folder.mkdir(parents=True, exist_ok=True)
    for row, pixels in enumerate(images):
        save_png(Image.fromarray(pixels), folder / image_name(row, version))


def strengths_of(run: Path, strengths: Sequence[float], choice: CheckpointChoice) -> list[Version]:
    """Return each chosen checkpoint's LoRA at these strengths. Strength 0 is the base model.

    Raises:
        UserError: The run has no such checkpoints, or there are too many versions.
    """
    if not choice:
        newest = newest_checkpoint(run)
        path, step = newest / layout.CHECKPOINT_LORA, layout.step_of(newest)
        return [Version(f"{strength:g}", path, strength, step) for strength in strengths]
    folders = {
        layout.step_of(path): path / layout.CHECKPOINT_LORA
        for path in layout.list_checkpoints(run / layout.CHECKPOINTS)
    }
    steps = choice.pick([step for step, path in folders.items() if path.is_file()])
    if len(steps) * len(strengths) < 2:
        raise UserError.at(
            "checkpoints", f"are step {steps[0]} alone, at one strength; a slider needs two or more of either"
        )
    if len(steps) * len(strengths) > MAX_VERSIONS:
        text = f"are {len(steps)}, each at {len(strengths)} strengths; at most {MAX_VERSIONS} versions are sampled"
        raise UserError.at("checkpoints", text)
    return [
        Version(f"step {step}, {strength:g}", folders[step], strength, step) for step in steps for strength in strengths
    ]
