"""An imported workflow as a user sees it: read as any exported workflow, and its nodes by type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.importers.engine import Imported, import_files
from chroma_trainer.trainer_core.workflow.graph import Graph, Link
from chroma_trainer.trainer_core.workflow.read import graph_from_json


class Result:
    """The imported workflow: values by node, the report's lines by option."""

    def __init__(self, *paths: Path):
        self.imported: Imported = import_files(paths, CATALOGUE)
        self.graph: Graph = graph_from_json(json.loads(json.dumps(self.imported.workflow)), schemas())
        report = self.imported.report
        self.taken, self.equal, self.missing = (dict(lines) for lines in (report.taken, report.equal, report.missing))

    def nodes(self, kind: str) -> list[dict[str, Any]]:
        nodes = [node.inputs for node in self.graph.nodes.values() if node.type == kind]
        return [{name: value for name, value in inputs.items() if not isinstance(value, Link)} for inputs in nodes]

    def values(self, kind: str, *names: str) -> dict[str, Any]:
        (node,) = self.nodes(kind)
        return {name: node[name] for name in names}

    def reported(self) -> set[str]:
        return {*self.taken, *self.equal, *self.missing}
