"""Train a LoRA again from the record in its own file, and compare the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..devices import pick_device
from ..errors import Cancelled, UserError
from ..host import Event, Notice, SinkHost, StepReport
from ..runs import layout
from ..spec import NodeSpec
from ..storage.atomic import sha256_of
from ..storage.bounded_files import Unusable, parse_json
from ..train.prepare import plan_run
from ..train.results.metadata import PACKAGES, versions
from ..workflow.execute import TrainerNode, execute, with_sources
from ..workflow.graph import Graph
from ..workflow.read import read_workflow
from .reader import EDIT, LoraReader, open_lora
from .report.origin import edit_of

RECORD = "chroma_trainer"
MAX_SHOWN, MAX_LINES = 80, 12


@dataclass(frozen=True)
class Verification:
    """The result of a training from a file's own record.

    Attributes:
        is_equal: Whether the bytes are equal.
        sha256: Digests of the file and of the new one; "" if nothing was trained.
        differences: What differs, in words, the most important first.
    """

    is_equal: bool
    sha256: tuple[str, str]
    differences: tuple[str, ...]

    def text(self) -> str:
        """Return the result as lines of text."""
        if self.is_equal:
            return f"equal: the same {self.sha256[0][:16]}... byte for byte"
        head = "different" if self.sha256[1] else "not trained again, because the result would differ"
        return "\n  ".join([f"{head}:", *self.differences])


def read_record(lora: LoraReader) -> dict[str, Any]:
    """Return the record of the training in a file.

    Raises:
        UserError: There is none, or the file was made from others.
    """
    if EDIT in lora.metadata:
        edit: Any = edit_of(lora)
        parents = ", ".join(f"{p.get('name')} ({str(p.get('sha256', ''))[:16]}...)" for p in edit.get("parents", []))
        raise UserError.at(lora.name, f"was made by {edit.get('operation')} from {parents}; verify those")
    try:
        record = parse_json(lora.metadata.get(RECORD, "null"))
        if isinstance(record, dict) and isinstance(record.get("request"), dict):
            return record
    except Unusable as error:
        raise UserError.at(lora.name, f"its record can't be read: {error}") from error
    raise UserError.at(lora.name, "has no record of its training; only files that ChromaTrainer saved can be verified")


def verify(path: Path, trainer: TrainerNode, host: SinkHost, anyway: bool = False) -> Verification:
    """Train again into the host's output folder, and compare.

    Args:
        path: The LoRA file.
        trainer: See TrainerNode.
        host: Environment with an empty output folder.
        anyway: Train even where a package or the dataset differs, so that the bytes can't be expected to be equal.
    Raises:
        UserError: The file has no record, or its workflow can't run here.
        Cancelled: The user canceled.
    """
    with open_lora(path) as lora:
        record, metadata = read_record(lora), lora.metadata
    graph, node = _graph_of(path, record, trainer)
    known = list(_differences_of_versions(record.get("versions")))
    host.emit(Notice(f"training again from the record in {path.name}, in {host.paths.output}"))
    for line in known:
        host.emit(Notice(line, "warning"))
    if known and not anyway:
        return Verification(False, (sha256_of(path), ""), (*known, "--anyway trains nevertheless"))
    halt = _Halt(record, host)
    catalogue = {**trainer.catalogue, trainer.type: _checked(trainer, record, anyway)}
    try:
        execute(graph, catalogue, halt.host)
    except DatasetDiffers as difference:
        return Verification(False, (sha256_of(path), ""), (str(difference), "--anyway trains nevertheless"))
    except Cancelled:
        if not halt.is_due:
            raise
    return _compare(path, metadata, _result(path, node, record, host), host)


class DatasetDiffers(Exception):
    """The images or captions are not those of the record."""


class _Halt:
    """Stops the training at the step at which the recorded one was stopped."""

    def __init__(self, record: Mapping[str, Any], host: SinkHost):
        step, training = record.get("step"), record["request"].get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        self.step = step if isinstance(step, int) and isinstance(steps, int) and 0 < step < steps else 0
        self.is_due = False
        self.host = replace(
            host, sinks=(*host.sinks, self._see), is_cancelled=lambda: self.is_due or host.is_cancelled()
        )

    def _see(self, event: Event) -> None:
        if isinstance(event, StepReport) and self.step and event.step >= self.step:
            self.is_due = True


def _graph_of(path: Path, record: Mapping[str, Any], trainer: TrainerNode) -> tuple[Graph, str]:
    """Return the trainer of this file with all that it needs, and its node id."""
    graph = read_workflow(path, trainer.schemas)
    name = record["request"].get("training", {}).get("name")
    nodes = [id for id, node in graph.nodes.items() if node.type == trainer.type]
    own = [id for id in nodes if graph.nodes[id].inputs.get("name") == name] or nodes
    if not own:
        raise UserError.at(path.name, f"its workflow has no {trainer.type} node, so it can't be trained again")
    return with_sources(graph, own[:1]), own[0]


def _checked(trainer: TrainerNode, record: Mapping[str, Any], anyway: bool) -> NodeSpec:
    """Return the node that trains, with a look at the dataset before."""
    spec = trainer.catalogue[trainer.type]

    def run(inputs: Any, host: SinkHost) -> tuple[Any, ...]:
        digest = plan_run(trainer.request_of(inputs), host, {}).index.digest
        recorded = record.get("dataset", {}).get("digest")
        if digest != recorded:
            text = (
                f"the dataset differs (digest {str(recorded)[:16]} was recorded, here it is {digest[:16]}): images or "
                "captions were changed"
            )
            host.emit(Notice(text, "warning"))
            if not anyway:
                raise DatasetDiffers(text)
        return spec.run(inputs, host)

    return replace(spec, run=run)


def _differences_of_versions(recorded: Any) -> Iterator[str]:
    current = versions()
    before = recorded if isinstance(recorded, dict) else {}
    for name in dict.fromkeys(["chroma-trainer", *PACKAGES, *before]):
        if before.get(name) != current.get(name):
            yield (
                f"{name} {before.get(name, '(not recorded)')} was used, here it is "
                f"{current.get(name, '(not installed)')}"
            )


def _result(path: Path, node: str, record: Mapping[str, Any], host: SinkHost) -> Path:
    """Return the file that the new run saved in place of this one."""
    name = record["request"].get("training", {}).get("name", "")
    is_best = path.stem.endswith("-best")
    candidates = [layout.lora_path(host.paths.output, name, best=best) for best in (is_best, not is_best)]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise UserError.at(path.name, f"the training of node {node} saved no LoRA")
    own = sha256_of(path)
    return next((file for file in files if sha256_of(file) == own), files[0])


def _compare(path: Path, metadata: Mapping[str, str], result: Path, host: SinkHost) -> Verification:
    digests = sha256_of(path), sha256_of(result)
    if digests[0] == digests[1]:
        return Verification(True, digests, ())
    with open_lora(path) as old, open_lora(result) as new:
        lines = [*_metadata_differences(metadata, new.metadata), *_tensor_differences(old, new)]
    device = pick_device(host.device)
    if not any(line.startswith("record") for line in lines):
        lines.append(
            f"settings, versions and dataset are as recorded; the device is not recorded, and here it is {device}: "
            "other devices, drivers and numbers of threads round in another order (docs/determinism.md)"
        )
    return Verification(False, digests, tuple(lines[:MAX_LINES]))


def _metadata_differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) or name == "sshs_model_hash":
            continue
        if name in (RECORD, "prompt"):
            yield from _value_differences(
                "record" if name == RECORD else "workflow", *(_parse(side.get(name)) for side in (old, new))
            )
        else:
            yield f"metadata {name} was {_short(old.get(name))}, is {_short(new.get(name))}"


def _value_differences(where: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _value_differences(f"{where}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield f"{where} was {_short(old)}, is {_short(new)}"


def _parse(text: str | None) -> Any:
    try:
        return parse_json(text or "null")
    except Unusable:
        return text


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _tensor_differences(old: LoraReader, new: LoraReader) -> Iterator[str]:
    """Yield the keys or shapes that differ, or the first tensor whose values do, and how far all of them are apart."""
    if old.entries != new.entries:
        key = next(
            key
            for key in sorted(old.entries.keys() | new.entries.keys())
            if old.entries.get(key) != new.entries.get(key)
        )
        yield f"tensor {key} was {old.entries.get(key)}, is {new.entries.get(key)}"
        return
    first, square, total = "", 0.0, 0.0
    for key in sorted(old.entries):
        one, two = old.read(key), new.read(key)
        total += float(one.double().square().sum())
        if not torch.equal(one, two):
            first = first or key
            square += float((one.double() - two.double()).square().sum())
    if first:
        yield (
            f"the weights differ from {first} on; relative difference of all weights "
            f"{(square / total) ** 0.5 if total else 0:.3g}"
        )
