"""What a run that waits trains, as JSON in which the folders of this machine have names.

A waiting run lies in the output folder, which may be shared, and may be started after a restart of ComfyUI, whose folders
may have other paths by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.request import TrainRequest
from ..errors import UserError
from ..host import PACKAGE, Paths, extra_roots
from ..runs.portable import without_secrets
from .job import Job, decode, encode

MARK, END = "chroma-trainer-folder:", "|"  # MARK name END path


def pack(request: TrainRequest, prompt: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    """Return a request and its workflow as JSON: without secrets, and with names in place of the folders of this machine."""
    roots = sorted(
        ((text, name) for name, path in _folders(paths) for text in {str(path), os.path.realpath(path)}),
        key=lambda root: -len(root[0]),
    )

    def to_name(text: str) -> str:
        for root, name in roots:
            if text == root or text.startswith(f"{root}{os.sep}"):
                return f"{MARK}{name}{END}{text[len(root) + 1 :]}"
        return text

    return _texts({"request": encode(request), "prompt": without_secrets(dict(prompt))}, to_name)


def unpack(value: Mapping[str, Any], paths: Paths, is_detached: bool) -> Job:
    """Return the job of what pack returned, with the folders as they are now.

    Raises:
        UserError: one of the folders is no longer there.
    """
    folders = {name: str(path) for name, path in _folders(paths)}

    def to_path(text: str) -> str:
        if not text.startswith(MARK):
            return text
        name, _, rest = text[len(MARK) :].partition(END)
        if name not in folders:
            raise UserError.at("background", f"the folder {name} ({rest}) is not set any more; queue the run again")
        return os.path.join(folders[name], rest) if rest else folders[name]

    restored = _texts(value, to_path)
    return Job(decode(TrainRequest, restored["request"]), paths, restored["prompt"], is_detached)


def _folders(paths: Paths) -> Iterator[tuple[str, Path]]:
    """Yield a name for each folder of this machine that a request may be about."""
    yield from (("output", paths.output), ("cache", paths.cache), ("pack", PACKAGE))
    lists = {**{f"models/{kind}": roots for kind, roots in paths.models.items()}, "datasets": paths.datasets}
    for name, roots in {**lists, "roots": extra_roots()}.items():
        yield from ((f"{name}/{number}", root) for number, root in enumerate(roots))


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _texts(item, change) for key, item in value.items()}
    return [_texts(item, change) for item in value] if isinstance(value, list | tuple) else value
