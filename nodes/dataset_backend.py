"""DatasetBackend: a folder of images and captions. Several nodes can be chained into one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from ..trainer_core.config.dataset import DatasetConfig, FolderConfig
from ..trainer_core.errors import UserError
from ..trainer_core.host import Host, Paths
from ..trainer_core.runs.portable import portable_path
from ..trainer_core.spec import Doc, NodeSpec, Output, Socket
from ..trainer_core.storage.atomic import sha256_text


@dataclass(frozen=True, kw_only=True)
class Inputs(FolderConfig):
    dataset: Annotated[
        DatasetConfig | None,
        Socket("TRAIN_DATASET"),
        Doc("Another DatasetBackend, to also train on its images."),
    ] = None


def run(inputs: Inputs, host: Host) -> tuple[DatasetConfig]:
    """Return the connected dataset with this folder appended.

    Raises:
        UserError: a folder does not exist or is not allowed.
    """
    root = host.paths.find_dataset(inputs.folder, "folder")
    values = {field.name: getattr(inputs, field.name) for field in fields(FolderConfig)}
    names = {name: portable_path(values[name], host.paths) for name in FolderConfig.PATHS}
    part = FolderConfig(**{**values, **names})
    references = str(host.paths.find_dataset(inputs.references, "references")) if inputs.references.strip() else ""
    masks = str(host.paths.find_dataset(inputs.masks, "masks")) if inputs.masks.strip() else ""
    earlier = inputs.dataset or DatasetConfig(parts=(), roots=())
    dataset = DatasetConfig(
        parts=(*earlier.parts, part),
        roots=(*earlier.roots, str(root)),
        reference_roots=(*earlier.reference_roots, references),
        mask_roots=(*earlier.mask_roots, masks),
    )
    return (dataset,)


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a hash that changes when a file in the folders is added, removed or edited."""
    try:
        roots = [paths.find_dataset(values.get("folder") or "", "folder")]
        for field in ("references", "masks"):
            if (values.get(field) or "").strip():
                roots.append(paths.find_dataset(values[field], field))
    except UserError as error:
        return str(error)
    files = ((root, path) for root in roots for path in sorted(root.rglob("*")) if path.is_file())
    stats = ((path.relative_to(root).as_posix(), path.stat()) for root, path in files)
    return sha256_text(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))


SPEC = NodeSpec(
    id="DatasetBackend",
    title="Dataset Backend",
    category="ChromaTrainer",
    description="A folder of images and captions to train on. Chain several nodes to train on several folders.",
    inputs=Inputs,
    outputs=(Output("dataset", "TRAIN_DATASET", "The dataset, for LoRATrainer or another DatasetBackend."),),
    run=run,
    light=True,
    fingerprint=fingerprint,
    search_aliases=("dataset", "images", "captions", "folder"),
)
