"""What the processes of a run get from the one that starts them, and what they leave: files in a temporary folder.

job.json       the request with the paths of this machine
events.jsonl   every event of the machine's first process, as a line
result.json    how the run ended
stop           exists once the run shall end after the current step
run.lock       locked by the machine's first process
log.txt        what torchrun printed, or the only process
logs/          what each of several processes printed
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.request import TrainRequest
from ..errors import Problem
from ..host import EVENT_KINDS, Event, Paths, event_kind
from ..storage.atomic import write_atomic
from ..storage.stored_names import stored_fields, stored_values

JOB, EVENTS, RESULT, LOG, LOGS, STOP = "job.json", "events.jsonl", "result.json", "log.txt", "logs", "stop"
FINISHED, PAUSED, STOPPED, REFUSED, FAILED = "finished", "paused", "stopped", "refused", "failed"


@dataclass(frozen=True)
class Job:
    """What every process of a machine trains.

    Args:
        request: what is trained.
        paths: folders of this machine.
        prompt: the workflow, to be recorded.
        is_detached: whether the run goes on when the process that started it ends.
    """

    request: TrainRequest
    paths: Paths
    prompt: dict[str, Any]
    is_detached: bool = False

    def write(self, folder: Path) -> None:
        value = {name: encode(getattr(self, name)) for name in ("request", "paths", "prompt", "is_detached")}
        (folder / JOB).write_text(json.dumps(value), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        value = json.loads((folder / JOB).read_text("utf-8"))
        request, paths = decode(TrainRequest, value["request"]), decode(Paths, value["paths"])
        return cls(request, paths, value["prompt"], value["is_detached"])


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        status: finished; paused or stopped by the user; refused: a UserError; failed: any other error.
        lora: path, name, SHA-256 and folder of the LoRA that was saved.
        losses: one per step.
        report: see docs/report.md; {} on other machines than the first.
        problems: what a UserError says.
        text: folder of a paused run, or the message of an error.
    """

    status: str
    lora: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    text: str = ""

    def write(self, folder: Path) -> None:
        write_atomic(folder / RESULT, json.dumps(encode(self)))

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Return the result; None where the process that should write it was killed."""
        try:
            return decode(cls, json.loads((folder / RESULT).read_text("utf-8")))
        except OSError:
            return None


def encode_event(event: Event) -> str:
    """Return an event as a line of JSON."""
    return json.dumps({"kind": event_kind(event), **encode(event)})


def decode_event(line: str) -> Event:
    """Return the event of a line."""
    value = json.loads(line)
    return decode(EVENT_KINDS[value.pop("kind")], value)


def encode(value: Any) -> Any:
    """Return a value as JSON, for decode."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: encode(item) for name, item in stored_values(value).items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def decode(kind: Any, value: Any) -> Any:
    """Return a value of this type from its JSON: a dataclass of numbers, texts, paths, tuples and dicts."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else decode(next(part for part in parts if part is not type(None)), value)
    if origin is typing.Annotated:
        return decode(parts[0], value)
    if origin is tuple:
        return tuple(decode(parts[0], item) for item in value)
    if origin is dict:
        return {key: decode(parts[1], item) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, names = typing.get_type_hints(kind), {stored: name for name, stored in stored_fields(kind).items()}
        return kind(**{names[stored]: decode(hints[names[stored]], item) for stored, item in value.items()})
    return Path(value) if kind is Path else value
