"""The family tree of a LoRA: what it was trained or made from, from its header alone, and what of that is at hand.

A trained LoRA records its base model, and the LoRA that it continued from (train/results/parents.py). A LoRA that a tool
made records the files it was made from (writer.edited_metadata). Both name files by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...runs import layout
from ...runs.saved_loras import has_saved
from ...storage.bounded_files import Unusable, parse_json
from ...workflow.lora_metadata import describe_base
from ..reader import EDIT, LoraReader

RECORD = "chroma_trainer"
FILE, MODEL = "file", "model"
MAX_GENERATIONS, MAX_PARENTS, MAX_TEXT = 16, 64, 200


@dataclass(frozen=True)
class Relative:
    """A LoRA in the tree, or a model.

    Attributes:
        kind: FILE for a LoRA, MODEL for a base model or another model that it was made from.
        name: Name of the file, or the model in words.
        sha256: Digest of the file; "" if it is not recorded.
        operation: How a tool made it, such as "lora merge"; "" if it was trained, or this is not known.
        steps: Steps of its training, None if unknown.
        applied: What was done to it to make the child, such as "strength 0.5".
        run: Name of the run's folder on this machine that saved it; "" if there is none.
        file: Name in the LoRA folders of this machine; "" if it is not there.
        is_changed: There is a file of this name, with other bytes.
        parents: What it was trained or made from.
    """

    kind: str
    name: str
    sha256: str = ""
    operation: str = ""
    steps: int | None = None
    applied: str = ""
    run: str = ""
    file: str = ""
    is_changed: bool = False
    parents: tuple[Relative, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the tree as JSON values."""
        return asdict(self) | {"parents": [parent.as_json() for parent in self.parents]}


def family_of(lora: LoraReader) -> Relative:
    """Return the tree that the header of a LoRA gives."""
    return _of_metadata(lora.name, lora.sha256, lora.metadata, MAX_GENERATIONS)


def _of_metadata(name: str, sha256: str, metadata: Mapping[str, Any], generations: int) -> Relative:
    edit, record = (_object(metadata.get(key)) for key in (EDIT, RECORD))
    if edit:
        parents = _makers(edit, metadata, generations)
        return Relative(FILE, name, sha256, _text(edit.get("operation")) or "edited", parents=parents)
    parents = [_recorded(parent, generations - 1) for parent in _objects(record.get("parents"), generations)]
    base = _base(record)
    steps = record.get("step")
    return Relative(
        FILE, name, sha256, steps=steps if type(steps) is int else None, parents=tuple([*parents, *base])
    )  # fmt: skip


def _makers(edit: Mapping[str, Any], metadata: Mapping[str, Any], generations: int) -> tuple[Relative, ...]:
    """Return the files that a tool made a LoRA from."""
    parents = _objects(edit.get("parents"), generations)
    relatives = []
    for parent in parents:
        name, sha256 = _text(parent.get("name")) or "?", _text(parent.get("sha256"))
        if not sha256:  # `extract` records the files of models
            relatives.append(Relative(MODEL, name))
            continue
        own = parent.get("metadata")
        own = dict(own) if isinstance(own, dict) else {}
        if len(parents) == 1:  # a file of one parent has the parent's record as its own
            own = {RECORD: metadata.get(RECORD), **own}
        relative = _of_metadata(name, sha256, own, generations - 1)
        relatives.append(replace(relative, applied=_text(parent.get("applied"))))
    return tuple(relatives)


def _recorded(parent: Mapping[str, Any], generations: int) -> Relative:
    """Return a LoRA that a training continued from, as parents.py records it."""
    elders = tuple(_recorded(elder, generations - 1) for elder in _objects(parent.get("parents"), generations))
    steps = parent.get("step")
    name, sha256 = _text(parent.get("name")) or "?", _text(parent.get("sha256"))
    return Relative(FILE, name, sha256, steps=steps if type(steps) is int else None, parents=elders)


def _base(record: Mapping[str, Any]) -> list[Relative]:
    request = record.get("request")
    model = request.get("model") if isinstance(request, dict) else None
    return [Relative(MODEL, describe_base(model).removesuffix(", none")[:MAX_TEXT])] if isinstance(model, dict) else []


def _object(value: Any) -> Mapping[str, Any]:
    """Return the JSON object that a text of the metadata holds; {} where it holds none."""
    try:
        value = parse_json(value) if isinstance(value, str) else {}
    except Unusable:
        return {}
    return value if isinstance(value, dict) else {}


def _objects(value: Any, generations: int) -> list[Mapping[str, Any]]:
    values = value[:MAX_PARENTS] if isinstance(value, list) and generations > 0 else []
    return [item for item in values if isinstance(item, dict)]


def _text(value: Any) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def located(
    relative: Relative, output: Path, folders: Sequence[Path], digest: Callable[[Path], str], path: Path | None = None
) -> Relative:
    """Return the tree with the runs and files of this machine.

    Only files and runs of the same name are looked at, because a file is found by its digest.

    Args:
        relative: The root of the tree.
        output: Output folder with the runs.
        folders: Folders of LoRAs.
        digest: Returns the SHA-256 of a file.
        path: The file of the root, if it is known.
    """
    by_name: dict[str, list[tuple[Path, Path]]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
            by_name.setdefault(file.name, []).append((file, folder))
    return _located(relative, output, by_name, digest, path)


def _located(
    relative: Relative,
    output: Path,
    by_name: Mapping[str, Sequence[tuple[Path, Path]]],
    digest: Callable[[Path], str],
    path: Path | None = None,
) -> Relative:
    """by_name: name of a file -> the LoRAs of this name, each with the folder of LoRAs that it is in."""
    parents = tuple(_located(parent, output, by_name, digest) for parent in relative.parents)
    if relative.kind != FILE or not relative.sha256:
        return replace(relative, parents=parents)
    files = [entry for entry in by_name.get(relative.name, ()) if entry[0].is_file()]
    same = (entry for entry in files if entry[0] == path or digest(entry[0]) == relative.sha256)
    file, folder = next(same, (None, None))
    name = file.relative_to(folder).as_posix() if file and folder else ""
    run = next((run.name for run in _runs(relative.name, output) if has_saved(run, relative.sha256)), "")
    return replace(relative, parents=parents, file=name, is_changed=bool(files) and not name, run=run)


def _runs(name: str, output: Path) -> Iterator[Path]:
    """Yield the folders of runs that save a LoRA of this name."""
    stem = name.removesuffix(".safetensors")
    names = {stem, stem.removesuffix("-best")}
    folder = layout.runs_folder(output)
    for run in sorted(folder.iterdir()) if folder.is_dir() else ():
        if layout.name_of_run(run).rpartition("~")[2] in names and run.is_dir():
            yield run
