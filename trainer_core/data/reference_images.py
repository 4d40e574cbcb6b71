"""Pictures to start from: for each picture that is trained, the one of the same name in another folder, or itself made worse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..config.dataset import DatasetConfig
from ..config.degradation import Step, steps_of
from ..errors import Problem, UserError
from ..storage.atomic import sha256_text, sha256_texts
from ..storage.digest_table import Numbers
from .buckets import Placement
from .cache.latents import LatentCache
from .dataset import Index
from .degradation import degrade
from .sample_table import Sample, SampleTable, TableWriter
from .source.backend import Backend, Entry, stem
from .source.decode import BrokenImage, decode
from .source.folder import FolderBackend
from .source.integrity import upright_size

FIELD = "references"
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class References:
    """An index of the pictures to start from, each at the bucket of the one that is to become of it.

    numbers: for the key of that one, the number of the sample of this.
    steps: for each part, how its pictures are made out of those that are to become of them; () where they have files of their own.
    """

    index: Index
    numbers: Numbers
    steps: tuple[tuple[Step, ...], ...]

    def of(self, sample: Sample) -> Sample:
        """What the sample starts from."""
        number = self.numbers.of(sample.key)
        assert number is not None, sample.key
        return self.index.samples[number]

    def change(self, image: Image.Image, start: Sample) -> Image.Image:
        """What a sample of the index looks like, made of its picture at the size of training."""
        return degrade(image, self.steps[start.part], start.sha256)


class Targeted(SampleTable):
    """Samples with the keys of their targets: where one can't be decoded, the pair is left out."""

    def __init__(self, table: SampleTable, targets: Sequence[Sample]):
        super().__init__(table.rows, table.texts, table.path_of)
        self._table, self._targets = table, targets  # the table keeps its files open

    def _between(self, begin: int, end: int) -> Iterator[Sample]:
        keys = (self._targets[i].key for i in range(begin, end))
        return (replace(sample, key=key) for sample, key in zip(super()._between(begin, end), keys, strict=True))


class ReferenceLatents:
    """The latent of what a sample starts from."""

    def __init__(self, references: References, latents: LatentCache):
        self._references, self._latents = references, latents

    def get(self, sample: Sample) -> Tensor:
        """(channels, height / factor, width / factor) of the sample's own bucket, fp32, normalised."""
        return self._latents.get(self._references.of(sample))


def find_references(index: Index, config: DatasetConfig) -> References:
    """Read and place the pictures to start from. Each start reads all that have files of their own.

    Raises:
        UserError: a folder is not named, or pictures are missing or broken.
    """
    problems: list[Problem] = []
    roots = config.reference_roots or ("",) * len(config.parts)
    steps = tuple(steps_of(part.degrade) for part in config.parts)
    backends = tuple(
        FolderBackend(Path(root)) if root else own for root, own in zip(roots, index.backends, strict=True)
    )
    names = [_by_stem(backend.entries()) if root else {} for backend, root in zip(backends, roots, strict=True)]
    for part, root, way in zip(config.parts, roots, steps, strict=True):
        if not root and not way:
            told = f"is empty for {part.folder!r}; name the folder of pictures to start from, or say in degrade how they are made"
            problems.append(Problem(FIELD, told))
    makings = _makings(config, steps)
    found = TableWriter()
    faults: list[str] = []
    for sample in index.samples if not problems else ():
        if steps[sample.part]:
            found.append(replace(sample, sha256=sha256_text("degraded", sample.sha256, makings[sample.part])))
            continue
        name = names[sample.part].get(stem(sample.name))
        if name is None:
            faults.append(f"{sample.name} (none of that name)")
            continue
        try:
            found.append(_sample(sample, name, backends[sample.part]))
        except (OSError, BrokenImage) as error:
            faults.append(f"{name} ({error})")
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        told = f"every picture needs one of its name to start from; not so {', '.join(faults[:SHOWN])}{more}"
        problems.append(Problem(FIELD, told))
    if problems:
        raise UserError(problems)
    samples = Targeted(found.finish(lambda part, name: backends[part].path(name)), index.samples)
    digest = sha256_texts(f"{s.key} {s.sha256} {s.placement}" for s in samples)
    return References(Index(samples, digest, {}, backends), Numbers(sample.key for sample in index.samples), steps)


def _makings(config: DatasetConfig, steps: Sequence[tuple[Step, ...]]) -> list[str]:
    """For each part, what names how its pictures are made: a folder that is chained again is made anew."""
    whole = [(root, way) for root, way in zip(config.roots, steps, strict=True)]
    return [
        " + ".join(map(str, way)) + f" #{whole[:part].count((root, way))}" for part, (root, way) in enumerate(whole)
    ]


def _sample(sample: Sample, name: str, backend: Backend) -> Sample:
    """Placed in the target's bucket."""
    raw = backend.read(name)
    width, height = upright_size(raw) or decode(raw).size
    bucket = sample.placement.bucket
    scale = max(bucket[0] / width, bucket[1] / height)
    resize = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    crop = (resize[0] - bucket[0]) // 2, (resize[1] - bucket[1]) // 2
    digest = hashlib.sha256(raw).hexdigest()
    placed = Placement(bucket, resize, crop)
    return replace(sample, name=name, path=backend.path(name), sha256=digest, size=(width, height), placement=placed)


def _by_stem(entries: Iterable[Entry]) -> dict[str, str]:
    return {stem(entry.name): entry.name for entry in entries}
