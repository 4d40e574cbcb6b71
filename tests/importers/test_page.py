"""docs/coming-from.md names options as the tables of the import do."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.trainer_core.importers.option_table import LOAD, Trainer
from chroma_trainer.trainer_core.registry import load, names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
OPTION = re.compile(r"`-{0,2}([a-z][a-z0-9]*(?:[_.][a-z0-9_.]+)+)`")
COLUMNS = {"SimpleTuner": "simpletuner", "OneTrainer": "onetrainer", "ai-toolkit": "ai-toolkit", "kohya": "kohya"}
# Values, and names within an option.
VALUES = {
    "flux_shift",
    "jpeg_artifacts",
    "compression_rounds",
    "selection_ratio",
    "start_layer_idx",
    "end_layer_idx",
    "run_name",
}


def options_of(trainer: Trainer) -> set[str]:
    tables = (trainer.table, trainer.folders)
    rows = {name for table in tables for row in table.rows for name in row.names}
    return rows | {name for table in tables for name in (*table.equal, *table.missing)}


def is_known(option: str, known: set[str]) -> bool:
    """Whether it is an option, or the last part of one."""
    return any(
        fnmatchcase(option, name) or name.endswith(f".{option}")
        or f"{option}." in name
        or (not name.endswith(".*") and fnmatchcase(option, name.rpartition(".")[2]))
        for name in known
    )  # fmt: skip


def test_the_page_names_only_options_that_the_import_knows():
    header: list[str] = []
    unknown, seen = [], 0
    for line in PAGE.read_text("utf-8").splitlines():
        cells = (
            [cell.strip() for cell in line.replace(r"\|\|", "").strip("|").split("|")] if line.startswith("|") else []
        )
        if not cells:
            header = []
        elif not header:
            header = [re.sub(r" \(.*", "", cell) for cell in cells]
        for title, cell in zip(header, cells, strict=False):
            if title in COLUMNS:
                known = options_of(load("importer", COLUMNS[title]))
                for option in set(OPTION.findall(cell)) - VALUES:
                    seen += 1
                    unknown += [] if is_known(option, known) else [(title, option)]
    assert seen > 100 and unknown == []


def test_every_row_sets_a_field_that_there_is():
    for name in names("importer"):
        trainer: Trainer = load("importer", name)
        for row in (*trainer.table.rows, *trainer.folders.rows):
            kinds = ("LoadChroma", "LoadFlux") if row.node == LOAD else (row.node,)
            assert any(row.field in {item.name for item in CATALOGUE[kind].fields()} for kind in kinds), (
                name,
                row.theirs,
            )


def test_an_option_is_in_one_list_only():
    for name in names("importer"):
        trainer: Trainer = load("importer", name)
        for table in (trainer.table, trainer.folders):
            assert not set(table.equal) & set(table.missing), name
