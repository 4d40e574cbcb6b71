"""Reference images: for each image that is trained on, one of the same name in another folder, or a degraded copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..config.dataset import DatasetConfig
from ..config.degradation import Step, steps_of
from ..errors import Problem, UserError, quoted
from ..storage.atomic import sha256_text, sha256_texts
from ..storage.digest_table import Numbers
from ..storage.stored_names import key_text
from .buckets import Placement
from .cache.latents import LatentCache
from .dataset import Index
from .degradation import degrade
from .masks import is_same_shape
from .sample_table import Sample, SampleTable, TableWriter
from .source.backend import Backend, Entry, printable_name, same_name, stem
from .source.decode import BrokenImage
from .source.folder import FolderBackend
from .source.scan import scan_bytes

FIELD = "references"
NUM_SHOWN = 5  # names in an error message


@dataclass(frozen=True)
class References:
    """An index of the reference images, each in the bucket of its target image.

    Attributes:
        index: The reference images.
        numbers: Index of the reference by key of the target.
        steps: For each part, how references are made from their targets; () if they are files of their own.
        descriptions: For each part, a text that identifies its steps.
    """

    index: Index
    numbers: Numbers
    steps: tuple[tuple[Step, ...], ...]
    descriptions: tuple[str, ...]

    def of(self, sample: Sample) -> Sample:
        """Return the reference of a sample."""
        number = self.numbers.of(sample.key)
        assert number is not None, sample.key
        return self.index.samples[number]

    def change(self, image: Image.Image, start: Sample) -> Image.Image:
        """Return the reference image, made from its file (or its target's) at the training size.

        Args:
            image: Image at its training size.
            start: The reference's sample in `index`.
        """
        return degrade(image, self.steps[start.part], start.sha256)

    def identify(self, digest: str, start: Sample) -> str:
        """Return the sha256 of the reference that is made of a file with this sha256."""
        return _degraded(digest, self.descriptions[start.part]) if self.steps[start.part] else digest


class Targeted(SampleTable):
    """Samples that carry the keys of their targets, so that the pair is skipped if a reference can't be decoded."""

    def __init__(self, table: SampleTable, targets: Sequence[Sample]):
        super().__init__(table.rows, table.texts, table.path_of)
        self._table, self._targets = table, targets  # keep the table: it owns the open files

    def _between(self, begin: int, end: int) -> Iterator[Sample]:
        keys = (self._targets[i].key for i in range(begin, end))
        return (replace(sample, key=key) for sample, key in zip(super()._between(begin, end), keys, strict=True))


class ReferenceLatents:
    """Latents of the reference images."""

    def __init__(self, references: References, latents: LatentCache):
        self._references, self._latents = references, latents

    def get(self, sample: Sample) -> Tensor:
        """Return the latent, (channels, height / factor, width / factor) of the sample's bucket, fp32, normalized."""
        return self._latents.get(replace(self._references.of(sample), is_mirrored=sample.is_mirrored))


def find_references(index: Index, config: DatasetConfig) -> References:
    """Read and place the reference images. Those that are files are read on every start.

    Raises:
        UserError: A folder is missing, or images are missing or broken.
    """
    problems: list[Problem] = []
    roots = config.reference_roots or ("",) * len(config.parts)
    steps = tuple(steps_of(part.degrade) for part in config.parts)
    backends = tuple(
        FolderBackend(Path(root)) if root else own for root, own in zip(roots, index.backends, strict=True)
    )
    names: list[dict[str, str]] = []
    for part, backend, root in zip(config.parts, backends, roots, strict=True):
        by_stem, copy = _index_by_stem(backend.entries()) if root else ({}, "")
        names.append(by_stem)
        if copy:
            text = f"{quoted(part.references)} has two images named {stem(copy)}, one of them {copy}; remove one"
            problems.append(Problem(FIELD, text))
    for part, root, degradations in zip(config.parts, roots, steps, strict=True):
        if not root and not degradations:
            message = (
                f"is empty for {quoted(part.folder)}; set it to the folder of reference images, or set degrade to make them "
                "from the images"
            )
            problems.append(Problem(FIELD, message))
    descriptions = _describe_steps(config, steps)
    table = TableWriter()
    faults: list[str] = []
    for sample in index.samples if not problems else ():
        if steps[sample.part]:
            table.append(replace(sample, sha256=_degraded(sample.sha256, descriptions[sample.part])))
            continue
        name = names[sample.part].get(same_name(stem(sample.name)))
        if name is None:
            faults.append(f"{printable_name(sample.name)} (no file with that name)")
            continue
        try:
            table.append(_place_reference(sample, name, backends[sample.part]))
        except (OSError, BrokenImage) as error:
            faults.append(f"{printable_name(name)} ({error})")
    if faults:
        more = f" and {len(faults) - NUM_SHOWN} more" if len(faults) > NUM_SHOWN else ""
        message = (
            f"every image needs a reference image with the same name; missing or broken: "
            f"{', '.join(faults[:NUM_SHOWN])}{more}"
        )
        problems.append(Problem(FIELD, message))
    if problems:
        raise UserError(problems)
    samples = Targeted(table.finish(lambda part, name: backends[part].path(name)), index.samples)
    digest = sha256_texts(f"{s.key} {s.sha256} {key_text(s.placement)}" for s in samples)
    numbers = Numbers(sample.key for sample in index.samples)
    return References(Index(samples, digest, {}, backends), numbers, steps, tuple(descriptions))


def _degraded(sha256: str, description: str) -> str:
    return sha256_text("degraded", sha256, description)


def _describe_steps(config: DatasetConfig, steps: Sequence[tuple[Step, ...]]) -> list[str]:
    """Return, for each part, a text that identifies how its references are made.

    If the same folder is used in several parts, the counter gives each of them its own references.
    """
    whole = [(root, way) for root, way in zip(config.roots, steps, strict=True)]
    return [
        " + ".join(map(str, way)) + f" #{whole[:part].count((root, way))}" for part, (root, way) in enumerate(whole)
    ]


def _place_reference(sample: Sample, name: str, backend: Backend) -> Sample:
    """Return the sample of a reference file, placed in its target's bucket.

    One of the target's shape is resized and cropped exactly as the target, so that both show the same part. Another one
    is cropped around its middle.
    """
    scan = scan_bytes(backend.read(name))
    width, height = scan.width, scan.height
    placed = sample.placement if is_same_shape((width, height), sample.size) else _around_middle(sample, width, height)
    path, digest = backend.path(name), scan.pixels_sha256
    return replace(sample, name=name, path=path, sha256=digest, size=(width, height), placement=placed)


def _around_middle(sample: Sample, width: int, height: int) -> Placement:
    bucket = sample.placement.bucket
    scale = max(bucket[0] / width, bucket[1] / height)
    resize = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    return Placement(bucket, resize, ((resize[0] - bucket[0]) // 2, (resize[1] - bucket[1]) // 2))


def _index_by_stem(entries: Iterable[Entry]) -> tuple[dict[str, str], str]:
    """Return {name without extension: name}, and an entry whose name without extension another one has; "" if none."""
    names: dict[str, str] = {}
    copy = ""
    for entry in entries:
        if names.setdefault(same_name(stem(entry.name)), entry.name) != entry.name:
            copy = copy or printable_name(entry.name)
    return names, copy
