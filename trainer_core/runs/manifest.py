"""What a run was begun with, image by image, so that a later start can say exactly what has changed since.

world.json has the settings and the weights' identities, and how many images there are; world_images.py has them one by one.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..config.request import TrainRequest
from ..config.training import LR_SCHEDULES
from ..data.sample_table import Sample
from ..errors import UserError
from ..storage.atomic import sha256_of, write_json
from .control import read_status
from .image_manifest import FILE as IMAGES
from .image_manifest import ImageManifest, image_changes, iter_images, iter_json_images, iter_masks
from .layout import CHECKPOINTS, MANIFEST, has_checkpoints, list_checkpoints

# Fields that do not change the course of a run: it may be resumed after they were edited.
WITHOUT_EFFECT = (
    "resume", "checkpoint_every", "keep_checkpoints", "keep_every", "validate_every", "on_change", "skip_bad_steps",
    "trackers",
)  # fmt: skip


def settings_of(request: TrainRequest) -> dict[str, Any]:
    """The part of a request that decides the course of a run, as JSON values."""
    value = request.as_json()
    value.pop("validation")
    value["memory"] = request.memory.numeric_rules()
    if not value["memory"]:
        value.pop("memory")
    value["model"]["quantization"].pop("cached_bases")
    value["adapter"].pop("format")  # how the file is written
    value["adapter"].pop("precision", None)
    value["adapter"].pop("init_lora")  # its bytes count, not its name
    for name in WITHOUT_EFFECT:
        value["training"].pop(name, None)
    if LR_SCHEDULES[request.training.lr_schedule].endless:  # its first steps are the same however long it goes on
        value["training"].pop("steps")
        value["training"].pop("epochs")
    return value


@dataclass(frozen=True)
class RunManifest:
    """Args:
    weights: identity of each part. samples, and the masks of some: looked at only where they are compared or written down.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, str]
    samples: Sequence[Sample]
    masks: Sequence[Sample] = ()

    def images(self) -> ImageManifest:
        return ImageManifest.gather(chain(iter_images(self.samples), iter_masks(self.masks)))


def changes(folder: Path, new: RunManifest) -> list[str]:
    """What differs from the world that a run's folder tells of, in words, one change a line; long lists are cut and counted."""
    old = json.loads((folder / MANIFEST).read_text("utf-8"))
    settings = json.loads(json.dumps(new.settings))  # as it would be read back: tuples are lists
    told = [
        f"{name} was {_short(before)}, is {_short(after)}"
        for name, before, after in _differences(old["settings"], settings, "")
    ]
    told += [
        f"the weights of the {part} are others"
        for part, identity in new.weights.items()
        if old["weights"].get(part) != identity
    ]
    before = _images_of(folder, old)
    if before is None:
        lost = f"{IMAGES} is missing or damaged, so that it can't be said which images or captions are others"
        return [*told, lost]
    return told + image_changes(before, new.images())


def _images_of(folder: Path, world: Mapping[str, Any]) -> ImageManifest | None:
    """None where their file is not what it was. Runs of before it was there have them in world.json."""
    if "images" in world:
        return ImageManifest.gather(iter_json_images(world["images"]))
    try:
        return (
            ImageManifest.read(folder / IMAGES) if sha256_of(folder / IMAGES) == world["image_rows"]["sha256"] else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i in range(len(old)) for d in _differences(old[i], new[i], f"{name}[{i}]")]
    return [(name, old, new)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_unfinished(folder: Path, name: str) -> Path | None:
    """The run folder of this LoRA's name that was worked on last, when it is another one and has not come to its end."""
    if has_checkpoints(folder):  # this very run was begun: nothing has changed
        return None
    others = []
    for path in folder.parent.glob(f"{glob.escape(name)}-*"):
        status = read_status(path)
        is_run = path.name.rpartition("-")[0] == name and (path / MANIFEST).is_file()
        if is_run and path != folder and status:
            others.append((status.updated, path, status.state))
    if not others:
        return None
    _, newest, state = max(others)
    begun = bool(list_checkpoints(newest / CHECKPOINTS))
    return newest if begun and state != "finished" else None


@dataclass(frozen=True)
class ResumeFrom:
    """An unfinished run whose newest checkpoint is to be gone on from, and what differs from it."""

    folder: Path
    told: str


def check_for_changes(folder: Path, new: RunManifest, request: TrainRequest) -> ResumeFrom | None:
    """What on_change says about an unfinished run of this name that was another one.

    Returns: None where a run begins anew or simply goes on.
    Raises:
        UserError: on_change is "ask", and there is one; says what differs.
    """
    choice = request.training.on_change
    if choice == "anew" or not request.training.resume:
        return None
    before = find_unfinished(folder, request.training.name)
    if before is None:
        return None
    told = changes(before, new)
    status = read_status(before)
    text = f"the run {before.name} is {status.text() if status else 'unfinished'}, and since then: " + "; ".join(told)
    if choice == "ask":
        ways = (
            "To begin a new run set on_change to anew; to go on from its newest checkpoint with what is set now, adopt"
        )
        raise UserError.at("on_change", f"{text}. {ways}")
    return ResumeFrom(before, text)


def write_manifest(folder: Path, world: RunManifest) -> None:
    """The images first: where world.json is, all is."""
    if (folder / MANIFEST).is_file():  # the folder's name holds all that is in it
        return
    world.images().write(folder / IMAGES)
    rows = {"count": len(world.samples) + len(world.masks), "sha256": sha256_of(folder / IMAGES)}
    write_json(folder / MANIFEST, {"settings": world.settings, "weights": dict(world.weights), "image_rows": rows})
