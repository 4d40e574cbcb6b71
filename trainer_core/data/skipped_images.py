"""The images of a dataset that are not used, with their reasons, and the error where that is not wanted."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.dataset import CAPTIONS, FolderConfig
from ..errors import Problem
from .source.backend import MAX_LISTED, Backend
from .tables.caption_row import NAMES
from .tables.caption_source import NO_CAPTION

NUM_SHOWN = 5  # names in a log message; the report lists them all
MAX_PROBLEMS = 20  # shown in one error
# Reasons that are the user's choice: these images are no error with on_broken "stop".
BY_CHOICE = ("its shorter edge", "its aspect ratio", "it would be enlarged")


class SkippedImages:
    """The images that are not used.

    Args:
        problems: Receives a problem for each one of a folder with on_broken "stop".
    """

    def __init__(self, problems: list[Problem]):
        self.listed: list[dict[str, str]] = []
        self.count = self.num_unlisted = 0  # num_unlisted: problems beyond those that are listed
        self._problems = problems

    def add(self, settings: FolderConfig, location: str, name: str, reason: str) -> None:
        """Add an image.

        Args:
            settings: Those of its folder.
            location: Where it is, for the report.
            name: Its name in the folder.
            reason: Why it is not used.
        """
        self.count += 1
        if self.count <= MAX_LISTED:
            self.listed.append({"image": location, "reason": reason})
        is_error = settings.on_broken == "stop" and not reason.startswith(BY_CHOICE)
        if is_error and len(self._problems) >= MAX_LISTED:
            self.num_unlisted += 1
        elif is_error:
            text = f"{name}: {reason}; fix or remove it, or set on_broken to skip"
            self._problems.append(Problem(settings.folder, text))

    def add_unreadable(self, settings: FolderConfig, backend: Backend) -> None:
        """Add the files that the backend could not even list as images."""
        for location, reason in sorted(backend.left_out.unreadable):
            self.add(settings, location, Path(location).name, reason)
        self.count += backend.left_out.num_unreadable - len(backend.left_out.unreadable)

    def describe_none_used(self, num_found: int) -> str:
        """Return why none of the images that were found can be used, and how to fix it."""
        reasons = "; ".join(f"{entry['image']}: {entry['reason']}" for entry in self.listed[:NUM_SHOWN])
        more = f"; and {self.count - NUM_SHOWN} more" if self.count > NUM_SHOWN else ""
        return f"none of {num_found} images can be used: {reasons}{more}{_suggest_caption_fix(self.listed)}"


def truncate_problems(problems: list[Problem], num_unlisted: int) -> list[Problem]:
    """Return as many problems as fit on a screen.

    If the captions are in another folder, every image has the same problem.
    """
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = f"{len(problems) + num_unlisted - MAX_PROBLEMS} more images can't be used, for similar reasons"
    return [*problems[:MAX_PROBLEMS], Problem("dataset", more)]


def _suggest_caption_fix(skipped: list[dict[str, str]]) -> str:
    if not any(entry["reason"].startswith(NO_CAPTION) for entry in skipped):
        return ""
    image = next(entry["image"] for entry in skipped if entry["reason"].startswith(NO_CAPTION))
    others = ", ".join(map(repr, CAPTIONS[1:]))
    return ". " + (find_other_captions(image) or f"Add a .txt file next to each image, or set captions to {others}")


def find_other_captions(image: str) -> str:
    """Return how to use the captions that lie beside an image in another form; "" if there are none."""
    folder, base = os.path.split(os.path.splitext(image)[0])
    table = next((name for name in NAMES if os.path.isfile(os.path.join(folder, name))), "")
    if table:
        return f"{table} lies there: set captions to 'table' to use it"
    if os.path.isfile(f"{os.path.join(folder, base)}.json"):
        return f"{base}.json lies beside it: set captions to 'json file' to use such files"
    if os.path.isfile(f"{os.path.join(folder, base)}.caption"):
        return f"{base}.caption lies beside it: rename such files to .txt"
    return ""
