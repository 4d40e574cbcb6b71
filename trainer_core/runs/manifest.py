"""The manifest of a run: its settings, weights and images. A later start lists exactly what has changed since.

world.json has the settings, the identities of the weights and the number of images. The images themselves are in a
second file, see image_manifest.py.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..config.request import TrainRequest
from ..config.training import LR_SCHEDULES
from ..data.sample_table import Sample
from ..errors import UserError
from ..storage.atomic import DAMAGED, set_aside, sha256_of, write_json
from ..storage.bounded_files import Unusable, read_json
from .control import read_status, recover_status
from .image_manifest import FILE as IMAGES
from .image_manifest import ImageManifest, image_changes, iter_images, iter_json_images, iter_masks
from .layout import CHECKPOINTS, MANIFEST, flat_name, has_checkpoints, list_checkpoints, name_of_run

MAX_BYTES = 256 << 20  # of world.json; an older one holds the images, 60 bytes each
# Fields that do not affect the training: a run can be resumed after they were edited.
WITHOUT_EFFECT = (
    "resume", "checkpoint_every", "keep_checkpoints", "keep_every", "validate_every", "on_change", "skip_bad_steps",
    "trackers", "eval_images", "stop_when", "patience",
)  # fmt: skip


def settings_of(request: TrainRequest) -> dict[str, Any]:
    """Return the part of a request that decides the course of the training, as JSON values."""
    value = request.as_json()
    value.pop("validation")
    value["memory"] = request.memory.numeric_rules()
    if not value["memory"]:
        value.pop("memory")
    value["model"]["quantization"].pop("cached_bases")
    value["adapter"].pop("format")  # affects only how the file is written
    value["adapter"].pop("precision", None)
    value["adapter"].pop("init_lora")  # compared by its bytes, not by its name
    value["adapter"].pop("init_optimizer", None)  # so is the checkpoint
    for name in WITHOUT_EFFECT:
        value["training"].pop(name, None)
    if LR_SCHEDULES[request.training.lr_schedule].endless:  # the first steps do not depend on the number of steps
        value["training"].pop("steps")
        value["training"].pop("epochs")
    return value


@dataclass(frozen=True)
class RunManifest:
    """What the name of a run's folder identifies.

    Args:
        settings: as `settings_of` returns them.
        weights: identity of each part of the model.
        samples: the images. They are read only where they are compared or written.
        masks: the masks of images that have one.
        sampled_weights: identities of the same parts by samples of their bytes, which older runs have.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, str]
    samples: Sequence[Sample]
    masks: Sequence[Sample] = ()
    sampled_weights: Mapping[str, str] = field(default_factory=dict)

    def images(self) -> ImageManifest:
        """Return the images and the masks."""
        return ImageManifest.gather(chain(iter_images(self.samples), iter_masks(self.masks)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the saved manifest of a run.

    Raises:
        OSError: there is none, or it can't be read.
        Unusable: it is damaged.
    """
    value = read_json(folder / MANIFEST, MAX_BYTES)
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in ("settings", "weights")):
        raise Unusable("has no settings or weights")
    if not isinstance(value.get("images", {}), dict):
        raise Unusable("has images that are no object")
    return value


def changes(folder: Path, new: RunManifest) -> list[str]:
    """Return the differences from the manifest in a run's folder, one change a line.

    Long lists are truncated, with a count. A damaged manifest is set aside, and the line says so.
    """
    try:
        old = read_manifest(folder)
    except FileNotFoundError:
        return [f"{MANIFEST} was damaged (see {DAMAGED}{MANIFEST}), so what has changed is unknown"]
    except (OSError, Unusable) as error:
        reason = getattr(error, "strerror", "") or str(error)
        renamed = set_aside(folder / MANIFEST)
        return [f"{MANIFEST} {reason}; it was renamed to {renamed.name}, and what has changed is unknown"]
    settings = json.loads(json.dumps(new.settings))  # as it is read back from JSON: tuples become lists
    lines = [
        f"{name} was {_short(before)}, is {_short(after)}"
        for name, before, after in _differences(old["settings"], settings, "")
    ]
    lines += [
        f"the weights of the {part} have changed"
        for part, identity in new.weights.items()
        if old["weights"].get(part) not in (identity, new.sampled_weights.get(part, identity))
    ]
    before = _images_of(folder, old)
    if before is None:
        unknown = f"{IMAGES} is missing or damaged, so the changed images and captions are unknown"
        return [*lines, unknown]
    return lines + image_changes(before, new.images())


def _images_of(folder: Path, manifest: Mapping[str, Any]) -> ImageManifest | None:
    """Return the images of a saved manifest; None where their file is missing or damaged."""
    try:
        if "images" in manifest:  # older runs have the images in world.json
            return ImageManifest.gather(iter_json_images(manifest["images"]))
        return (
            ImageManifest.read(folder / IMAGES)
            if sha256_of(folder / IMAGES) == manifest["image_rows"]["sha256"]
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
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
    """Return the most recent other run folder of this LoRA's name if its run is unfinished; else None.

    Args:
        folder: the new run's folder.
        name: the LoRA's name.
    """
    if has_checkpoints(folder):  # this same run was started before: nothing has changed
        return None
    others = []
    for path in folder.parent.glob(f"{glob.escape(flat_name(name))}-*"):
        has_manifest = any(os.path.lexists(path / file) for file in (MANIFEST, f"{DAMAGED}{MANIFEST}"))
        if name_of_run(path) != flat_name(name) or path == folder or not has_manifest:
            continue
        if status := recover_status(path):
            others.append((status.updated, path, status.state))
    if not others:
        return None
    _, newest, state = max(others)
    has_progress = bool(list_checkpoints(newest / CHECKPOINTS))
    return newest if has_progress and state != "finished" else None


@dataclass(frozen=True)
class ResumeFrom:
    """An unfinished run whose newest checkpoint the new run resumes from."""

    folder: Path
    changes: str  # in words: what differs from that run


def check_for_changes(folder: Path, new: RunManifest, request: TrainRequest) -> ResumeFrom | None:
    """Look for an unfinished run of this name with another manifest, and do what on_change says.

    Args:
        folder: the new run's folder.
        new: the new run's manifest.
    Returns:
        The run to resume from; None where the new run starts from scratch or from its own checkpoints.
    Raises:
        UserError: on_change is "ask", and there is such a run. The message lists the changes.
    """
    choice = request.training.on_change
    if choice == "anew" or not request.training.resume:
        return None
    before = find_unfinished(folder, request.training.name)
    if before is None:
        return None
    lines = changes(before, new)
    status = read_status(before)
    text = f"the run {before.name} {status.clause() if status else 'is unfinished'}, and since then: " + "; ".join(
        lines
    )
    if choice == "ask":
        ways = (
            "To start a new run set on_change to anew; to resume from its newest checkpoint with the new settings, "
            "set it to adopt"
        )
        raise UserError.at("on_change", f"{text}. {ways}")
    return ResumeFrom(before, text)


def write_manifest(folder: Path, manifest: RunManifest) -> str:
    """Write the manifest into a run's folder, unless a sound one is there.

    The images are written first, so that they exist wherever world.json does.

    Returns:
        "", or that a damaged one was set aside and written again.
    """
    message = ""
    try:
        read_manifest(folder)
        return ""  # the folder's name holds the digest of the manifest
    except FileNotFoundError:
        pass
    except (OSError, Unusable) as error:
        renamed = set_aside(folder / MANIFEST)
        message = f"{MANIFEST} {error}; it was renamed to {renamed.name} and written again"
    manifest.images().write(folder / IMAGES)
    rows = {"count": len(manifest.samples) + len(manifest.masks), "sha256": sha256_of(folder / IMAGES)}
    write_json(
        folder / MANIFEST, {"settings": manifest.settings, "weights": dict(manifest.weights), "image_rows": rows}
    )
    return message
