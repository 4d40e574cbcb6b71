"""Find saved LoRAs, and keep that of another run when a run saves one of the same name (docs/decisions/0046).

A file belongs to the run that logged its digest: LoraSaved in events.jsonl.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, nearest, quoted, reason_of
from ..host import Host, LoraSaved, Notice, event_kind
from ..storage.atomic import sha256_of
from ..storage.bounded_files import Unusable, parse_json
from ..storage.lora_name import numbered
from ..storage.safetensors_header import read_header
from .event_log import read_events
from .layout import CHECKPOINTS, LORAS, MANIFEST, list_checkpoints, runs_folder, step_of


@contextmanager
def keep_other_lora(path: Path, folder: Path, host: Host) -> Iterator[None]:
    """If the LoRA at a path is another run's, give it a second name while the block replaces it.

    Args:
        path: file that the block replaces.
        folder: folder of the run that saves.
    """
    if not path.is_file() or has_saved(folder, before := sha256_of(path)):
        yield
        return
    other = _name_beside(path, folder, before)
    _link(path, other)
    try:
        yield
    finally:
        if sha256_of(path) == before:  # the block failed, or has written the same bytes
            other.unlink()
    if other.is_file():
        host.emit(Notice(f"{path.name} was saved by another run; that file is now {other.name}", "warning"))


def has_saved(folder: Path, sha256: str) -> bool:
    """Return whether the run of a folder has saved the LoRA with this digest."""
    return any(
        isinstance(event, dict) and event.get("kind") == event_kind(LoraSaved) and event.get("sha256") == sha256
        for event in read_events(folder)
    )


def checkpoint_of(lora: Path, output: Path) -> Path:
    """Return the checkpoint that a LoRA file was saved from.

    Args:
        lora: The file.
        output: Output folder whose runs are searched, besides that in which the file lies.
    Raises:
        UserError: The run's folder, or this checkpoint, is not there.
    """
    try:
        digest, step = sha256_of(lora), _step_of(lora)
    except (OSError, ValueError) as error:
        raise UserError.at("init_lora", f"{lora.name} can't be read: {reason_of(error)} ({lora})") from error
    roots = dict.fromkeys([output, *(folder.parent for folder in lora.parents if folder.name == LORAS)])
    runs = [path.parent for root in roots for path in sorted(runs_folder(root).glob(f"*/{MANIFEST}"))]
    run = next((folder for folder in runs if has_saved(folder, digest)), None)
    otherwise = "set init_optimizer to new to train from its weights alone"
    if run is None or step is None:
        text = (
            f"no run in {runs_folder(output)} has saved {lora.name}, so its optimizer state is not known: the run's "
            f"folder was deleted, or the file is of another machine or tool; {otherwise}"
        )
        raise UserError.at("init_optimizer", text)
    steps = {step_of(path): path for path in list_checkpoints(run / CHECKPOINTS)}
    if step not in steps:
        text = (
            f"{lora.name} was saved at step {step} of the run {run.name}, which has checkpoints of step "
            f"{', '.join(map(str, steps)) or 'none'} only (keep_checkpoints, keep_every); {otherwise}"
        )
        raise UserError.at("init_optimizer", text)
    return steps[step]


def _step_of(lora: Path) -> int | None:
    """Return the step in the record of a LoRA file; None where it has none."""
    try:
        record = parse_json(read_header(lora).metadata.get("chroma_trainer", "{}"))
    except Unusable:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _name_beside(path: Path, folder: Path, sha256: str) -> Path:
    """Return NAME-DIGEST of the run that saved the file; NAME-2, NAME-3 and so on where no run folder has it."""
    owners = (run.parent for run in sorted(folder.parent.glob(f"*/{MANIFEST}")) if run.parent != folder)
    owner = next((run for run in owners if has_saved(run, sha256)), None)
    if owner:
        return path.with_stem(f"{path.stem}-{owner.name.rpartition('-')[2]}")
    return next(other for other in numbered(path) if not other.exists())


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    other.unlink(missing_ok=True)  # an earlier file of that same run
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


def find_lora(text: str, output: Path) -> Path:
    """Return the LoRA file for a user's input: a path, or a name in the output folder's loras.

    Raises:
        UserError: there is none.
    """
    loras = Path(output) / LORAS
    for path in (Path(text), loras / text, loras / f"{text}.safetensors"):
        if os.path.isfile(path):
            return path
    files = loras.rglob("*.safetensors") if loras.is_dir() else ()
    names = [path.relative_to(loras).as_posix().removesuffix(path.suffix) for path in files]
    hint = nearest(text, names) or f"; use a path, or the name of a file in {loras}"
    raise UserError.at("lora", f"there is no LoRA {quoted(text)}{hint}")
