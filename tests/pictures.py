"""Fixtures: a host that records its events, and small images with captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from PIL import Image


class Events(list):
    """The recorded events."""

    def warnings(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Notice) and event.level == "warning"]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def host(tmp_path: Path, events: Events) -> SinkHost:
    return SinkHost(paths=Paths(output=tmp_path / "out", cache=tmp_path / "cache"), sinks=(events.append,))


@pytest.fixture
def pictures(tmp_path: Path):
    """pictures("a.png", (80, 60), caption="a cat") writes an image below `pictures.folder`, and its caption file."""

    class Pictures:
        folder = tmp_path / "pictures"

        def __call__(self, name: str, size: tuple[int, int] = (80, 60), caption: str | None = "a picture", shade=90):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.linear_gradient("L").resize(size).convert("RGB")
            image.paste((shade, 10, 200 - shade // 2), (0, 0, size[0] // 2, size[1] // 2))
            image.save(path)
            if caption is not None:
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
            return path

        def config(self, **values) -> DatasetConfig:
            part = FolderConfig(**{"folder": "pictures", "resolution": 64, **values})
            return DatasetConfig(parts=(part,), roots=(str(self.folder),))

    return Pictures()
