"""Fixtures for runs of a few steps: a tiny Chroma, four small images, and a host that cancels at a given step."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import Event, Notice, Paths, SinkHost, StepReport
from PIL import Image

CAPTIONS = ("a red cat", "the blue dog\na dog", "a photo of the red dog, and of a cat", "x")
# Without evaluation, which takes more time than 6 steps of a tiny model: tests of the loss on fixed noise and of the leak ask for it.
TRAINING = {
    "name": "tiny", "rank": 4, "alpha": 4.0, "targets": "all+ffs", "steps": 6, "batch_size": 2, "learning_rate": 0.01,
    "warmup_steps": 0, "gradient_checkpointing": False, "caption_dropout": 0.1, "checkpoint_every": 2, "seed": 5, "eval_images": 0,
}  # fmt: skip


EVALUATED: dict[str, Any] = {"eval_images": 4}  # the default of 16 takes four times as long

DEVICE = "second" if os.environ.get("CHROMA_TRAINER_SECOND_DEVICE") else "cpu"  # see tests/device/second.py


def check_handle(handle: int) -> None:
    """Stand in for os.fsync in tests: a tiny run waits for the disk as long as it computes, and no test stops the system."""
    os.fstat(handle)  # a closed handle is an error all the same


os.fsync = check_handle


class Workshop:
    """Makes requests and hosts.

    Runs share the cache of embeddings and latents. Each host has its own output folder.
    """

    def __init__(self, root: Path, model: ModelConfig, dataset: DatasetConfig):
        self.root, self.model, self.dataset, self.num_hosts = root, model, dataset, 0

    def request(
        self, validation: ValidationConfig | None = None, model: ModelConfig | None = None, **values
    ) -> TrainRequest:
        evaluation = EVALUATED if values.get("holdout") else {}
        training = TrainingConfig(**{**TRAINING, **evaluation, **values})
        return TrainRequest(model or self.model, self.dataset, training, validation)

    def host(self, output: Path | None = None, sink: Callable[[Event], None] | None = None) -> Recorder:
        self.num_hosts += 1
        return Recorder(output or self.root / f"output-{self.num_hosts}", self.root / "cache", sink)


class Recorder(SinkHost):
    """A host that records events.

    Attributes:
        events: all events so far.
        cancel_at: step after which the user cancels, 0 never.
    """

    events: list[Event]
    cancel_at: int

    def __init__(self, output: Path, cache: Path, sink: Callable[[Event], None] | None = None):
        events: list[Event] = []
        sinks = (events.append, sink) if sink else (events.append,)
        super().__init__(
            paths=Paths(output=output, cache=cache), sinks=sinks, device=DEVICE, is_cancelled=lambda: self.is_over()
        )
        object.__setattr__(self, "events", events)
        object.__setattr__(self, "cancel_at", 0)

    def cancelling_at(self, step: int) -> Recorder:
        object.__setattr__(self, "cancel_at", step)
        return self

    def is_over(self) -> bool:
        return bool(self.cancel_at) and any(event.step >= self.cancel_at for event in self.all(StepReport))

    def all(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def told(self) -> list[str]:
        return [event.text for event in self.all(Notice)]

    @property
    def lora(self) -> Path:
        (path,) = (self.paths.output / "loras").iterdir()
        return path

    @property
    def run_folder(self) -> Path:
        (path,) = (path for path in (self.paths.output / "chroma_trainer").iterdir() if path.name != "validation")
        return path

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_folder / "checkpoints").iterdir())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Workshop:
    gc.collect()
    gc.freeze()  # every run collects garbage, and need not scan the objects of pytest and torch each time
    root = tmp_path_factory.mktemp("training")
    folder = root / "pictures"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        image = Image.new("RGB", (96, 32) if i == 3 else (32, 32), (60 * i, 200 - 50 * i, 30))
        image.paste((255 - 60 * i, 20, 40 * i), (4, 4, 20, 28 - 4 * i))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    part = FolderConfig(folder=str(folder), resolution=32, trigger="sks")
    return Workshop(root, tiny_model, DatasetConfig(parts=(part,), roots=(str(folder),)))


@pytest.fixture(scope="session")
def plain_run(workshop: Workshop) -> tuple[Recorder, Any]:
    """A run that nothing happens to, and its result: what interrupted and resumed runs must equal. Tests must not write to it."""
    from chroma_trainer.trainer_core.train.run import run

    host = workshop.host()
    return host, run(workshop.request(), host)


@pytest.fixture(scope="session", autouse=True)
def shared_counts() -> Iterator[Any]:
    """Count the memory of a model once for all tests, and not once for each cache folder. Yield what counts each time."""
    if "torch" not in sys.modules:  # nothing that was collected plans a run
        yield None
        return
    from chroma_trainer.trainer_core.planner.cost_cache import CostCache

    counts: dict[tuple[str, ...], dict[str, Any]] = {}
    get_or_count = CostCache.get_or_count

    def get(self: CostCache, key: tuple[str, ...], read: Any, count: Callable[[], Any], write: Any) -> Any:
        def count_once() -> Any:
            if key not in counts:
                counts[key] = write(count())
            return read(counts[key])

        return get_or_count(self, key, read, count_once, write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostCache, "get_or_count", get)
        yield get_or_count
