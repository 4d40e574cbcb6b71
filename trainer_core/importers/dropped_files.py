"""Configurations that were dropped on ComfyUI's page. They come as texts; nothing is read from the server's disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError
from ..spec import NodeSpec
from ..storage.bounded_files import format_size
from .engine import import_source, recognize
from .source_files import MAX_BYTES, ConfigFile, SourceFiles, parse_config

MAX_FILES = 16
EXPLAINED = (
    ".yaml",
    ".yml",
    ".toml",
)  # endings that ComfyUI's page has no use for, so that a fault in one is ours to say


def import_dropped(entries: Sequence[Any], catalogue: Mapping[str, NodeSpec]) -> dict[str, Any] | None:
    """Convert dropped files.

    Args:
        entries: {"name": the file's name, "text": its content} of each.
        catalogue: the nodes by type.
    Returns:
        {"trainer", "file": name of the main file, "workflow", "report"}, or None if no trainer is recognized: the files are ComfyUI's, or another pack's.
    Raises:
        UserError: it is a trainer's configuration, but can't be converted; all problems are listed.
    """
    named = [_check_entry(entry) for entry in entries[: MAX_FILES + 1]]
    if len(named) > MAX_FILES:
        raise UserError(f"more than {MAX_FILES} files were dropped; a configuration has only a few")
    files, problems = _parse(named)
    match = recognize(files)
    if problems and (match or any(problem.field.lower().endswith(EXPLAINED) for problem in problems)):
        raise UserError(problems)
    if match is None:
        return None
    trainer, main = match
    imported = import_source(SourceFiles(files, dropped=True), trainer, main, catalogue)
    report = imported.report.as_json()
    return {"trainer": imported.trainer, "file": main.path.name, "workflow": imported.workflow, "report": report}


def _check_entry(entry: Any) -> tuple[str, str]:
    """Return the name and the text of a file."""
    values = (entry.get("name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
    name, text = values
    if not isinstance(name, str) or not isinstance(text, str):
        raise UserError('a dropped file is not {"name": text, "text": text}')
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError.at(name, f"is larger than {format_size(MAX_BYTES)}, which no configuration is")
    return Path(name.replace("\\", "/")).name, text


def _parse(named: Sequence[tuple[str, str]]) -> tuple[list[ConfigFile], list[Problem]]:
    files: list[ConfigFile] = []
    problems: list[Problem] = []
    for name, text in named:
        try:
            files.append(parse_config(Path(name), text.removeprefix("\ufeff")))
        except UserError as error:
            problems += error.problems
    return files, problems
