"""Log scalars, images and settings for TensorBoard, in the run's folder. Only viewing them needs `tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .event_file import EventFile, image, scalar, session_end, session_start, text
from .tracker import Opening, flat

FOLDER = "tensorboard"


class TensorBoard:
    def __init__(self, opening: Opening, log: Callable[[str], None]):
        folder = opening.folder / FOLDER
        self._file = EventFile(folder, opening.step + 1 if opening.step else 0)
        settings = json.dumps(opening.settings, indent=2, ensure_ascii=False)
        self._file.add(
            0,
            session_start(opening.folder.name, flat(opening.settings)),
            text("settings", _code(settings)),
        )
        log(f'TensorBoard: tensorboard --logdir "{opening.folder.parent}"')

    @staticmethod
    def missing() -> str:
        return ""

    def values(self, step: int, values: Mapping[str, float]) -> None:
        self._file.add(step, *(scalar(name, value) for name, value in values.items()))

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        self._file.add(step, image(name, path.read_bytes(), caption))

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.add(step, text("result", _code(json.dumps(values, indent=2, ensure_ascii=False))))

    def close(self, failed: bool) -> None:
        self._file.add(0, session_end(failed))
        self._file.close()


def _code(lines: str) -> str:
    """Return the text as a Markdown code block."""
    return "\n".join("    " + line for line in lines.splitlines())
