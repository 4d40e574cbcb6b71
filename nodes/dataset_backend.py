"""DatasetBackend: a folder of images and captions. Several nodes can be chained into one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..trainer_core.config.dataset import DatasetConfig, FolderConfig
from ..trainer_core.errors import UserError, quoted
from ..trainer_core.host import Host, Paths
from ..trainer_core.runs.portable import portable_path
from ..trainer_core.spec import Doc, NodeSpec, Output, Socket
from ..trainer_core.storage.allowed_urls import is_url
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
    root = host.paths.find_source(inputs.folder, "folder")
    values = {field.name: getattr(inputs, field.name) for field in fields(FolderConfig)}
    names = {name: portable_path(values[name], host.paths) for name in FolderConfig.PATHS}
    part = FolderConfig(**{**values, **names})
    references = str(host.paths.find_dataset(inputs.references, "references")) if inputs.references.strip() else ""
    masks = str(host.paths.find_dataset(inputs.masks, "masks")) if inputs.masks.strip() else ""
    table = find_table(inputs, root, host.paths) if inputs.needs_table else ""
    earlier = inputs.dataset or DatasetConfig(parts=(), roots=())
    parts = tuple(replace(part, resolution=edge, resolutions="") for edge in inputs.resolution_list())
    dataset = DatasetConfig(
        parts=(*earlier.parts, *parts),
        roots=(*earlier.roots, *[str(root)] * len(parts)),
        reference_roots=(*earlier.reference_roots, *[references] * len(parts)),
        mask_roots=(*earlier.mask_roots, *[masks] * len(parts)),
        tables=(*earlier.tables, *[table] * len(parts)),
    )
    return (dataset,)


def find_table(inputs: FolderConfig, root: str, paths: Paths) -> str:
    """Return the table of a folder: the one that is named, or the first of the usual ones.

    Args:
        inputs: The settings of the folder.
        root: Where the images are. A store is not asked for its tables yet, and rows that come with the images need none.
        paths: The allowed folders.
    Raises:
        UserError: There is none, or it is outside the allowed folders.
    """
    from ..trainer_core.data.tables.caption_row import NAMES
    from ..trainer_core.data.tables.caption_source import IN_STORE

    name, folder = inputs.table.strip(), Path(root)
    if is_url(root):
        return f"{IN_STORE}{name}"
    if name:
        return str(paths.find_beside(folder.parent if folder.is_file() else folder, inputs.table, "table"))
    path = next((folder / usual for usual in NAMES if (folder / usual).is_file()), None)
    if path is None and not folder.is_file() and not any(folder.rglob("*.parquet")):
        text = f"is empty, and {quoted(inputs.folder)} has none of {', '.join(NAMES)}; enter the name of the table"
        raise UserError.at("table", text)
    return str(path or "")


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a hash that changes when a file in the folders is added, removed or edited."""
    try:
        source = paths.find_source(values.get("folder") or "", "folder")
        if is_url(source):
            return source  # what is in a store is listed by each run
        roots = [Path(source)]
        for field in ("references", "masks"):
            if (values.get(field) or "").strip():
                roots.append(paths.find_dataset(values[field], field))
    except UserError as error:
        return str(error)
    files = [(root, path) for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    files += [(root.parent, root) for root in roots if root.is_file()]
    with suppress(UserError):  # there is none, or it is one of the files above
        table = paths.find_beside(roots[0], values.get("table") or "", "table")
        files.append((table.parent, table))
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
