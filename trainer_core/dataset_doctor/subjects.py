"""The datasets that `chroma-trainer doctor` is asked to examine: a folder or a store, or those of a workflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config.dataset import DatasetConfig
from ..config.model import ModelConfig
from ..errors import Problem, UserError
from ..host import SinkHost, collect
from ..paths import cache_folder
from ..spec import NodeSpec
from ..storage.allowed_urls import is_url
from ..workflow.execute import execute, with_sources
from ..workflow.graph import Graph, Link

TABLES_OF_URLS = (".csv", ".tsv", ".jsonl")  # .json is a workflow
DATASET, TRAINER = "DatasetBackend", "LoRATrainer"
Catalogue = Mapping[str, NodeSpec]


@dataclass(frozen=True)
class Subject:
    """A dataset to examine.

    Attributes:
        dataset: The dataset.
        model: The model that is trained on it, whose text encoder limits the captions; None if it is not known.
    """

    dataset: DatasetConfig
    model: ModelConfig | None = None


def is_source(text: str) -> bool:
    """Return whether an argument names images: a folder, a store, or a table of addresses."""
    return Path(text).is_dir() or is_url(text) or Path(text).suffix.lower() in TABLES_OF_URLS


@contextmanager
def subject_of_source(
    source: str, fields: Mapping[str, Any], catalogue: Catalogue, host: SinkHost
) -> Iterator[tuple[Subject, SinkHost]]:
    """Yield a folder, a store or a table of addresses as a dataset, and the host that finds it.

    The user names it, so it is allowed. The scan of a folder is kept nowhere; what is downloaded is for a run too.

    Args:
        fields: values of DatasetBackend, beside the folder.
        catalogue: the nodes by type.
    """
    paths = host.paths
    with TemporaryDirectory(prefix="chroma-trainer-doctor-", ignore_cleanup_errors=True) as temporary:
        if is_url(source):
            paths = replace(paths, urls=(*paths.urls, source))
        else:
            if Path(source).is_dir():
                paths = replace(paths, output=Path(temporary), cache=cache_folder(Path(temporary)))
            source = str(Path(source).resolve())
            paths = replace(paths, datasets=(Path(source).parent, *paths.datasets))
        own = replace(host, paths=paths)
        spec = catalogue[DATASET]
        (dataset,) = spec.run(spec.inputs(folder=source, **fields), own)
        yield Subject(dataset), own


def subjects_of_workflow(graph: Graph, catalogue: Catalogue, host: SinkHost) -> list[Subject]:
    """Return the dataset of every trainer, with its model if that is at hand; without a trainer, every dataset.

    Raises:
        UserError: there is none, or one of them is not known here.
    """
    trainers = [node.inputs for node in graph.nodes.values() if node.type == TRAINER]
    links = [(inputs.get("dataset"), inputs.get("model")) for inputs in trainers]
    if not links:
        backends = {id for id, node in graph.nodes.items() if node.type == DATASET}
        chained = {v.node for id in backends if isinstance(v := graph.nodes[id].inputs.get("dataset"), Link)}
        links = [(Link(id, 0), None) for id in graph.nodes if id in backends - chained]
    models = {dataset: model for dataset, model in links if isinstance(dataset, Link)}
    if not models:
        raise UserError.at("workflow", f"has no dataset: no {DATASET} is connected to a {TRAINER}")
    return [_subject(graph, dataset, model, catalogue, host) for dataset, model in models.items()]


def _subject(graph: Graph, dataset: Link, model: Any, catalogue: Catalogue, host: SinkHost) -> Subject:
    values = _value_of(graph, dataset, catalogue, host)
    problems: list[Problem] = []  # of the model: it may not be on this machine
    loaded = collect(problems, _value_of, graph, model, catalogue, host) if isinstance(model, Link) else None
    return Subject(values, loaded)  # type: ignore[arg-type]


def _value_of(graph: Graph, link: Link, catalogue: Catalogue, host: SinkHost) -> Any:
    """Run the nodes that an output depends on, and return its value."""
    kind = graph.nodes[link.node].type
    if kind not in catalogue:
        raise UserError.at("workflow", f"{kind} only runs in ComfyUI, so its output is not known here")
    catalogue = {**catalogue, kind: replace(catalogue[kind], is_output=True)}
    return execute(with_sources(graph, {link.node}), catalogue, host)[link.node][link.slot]
