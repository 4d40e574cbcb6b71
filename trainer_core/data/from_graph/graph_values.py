"""What other ComfyUI nodes give as images, masks and captions: batches and lists, as single images in 8 bits.

An image is (H, W, C) with values from 0 to 1, a batch is (B, H, W, C), and lists hold batches of any sizes. Masks have
no channels. Torch tensors and arrays are taken alike; one image at a time is converted, because a list may fill the
RAM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...config.dataset import SEVERAL
from ...errors import Problem
from ..masks import is_same_shape

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by channels
OVERSHOOT = 0.5  # resizing and sharpening leave 0 to 1 by less; values beyond are on another scale, such as 0 to 255
NUM_SHOWN = 5  # indices in an error message


@dataclass(frozen=True)
class GraphImage:
    """One image or mask of a batch.

    Attributes:
        values: (H, W, C) or, of a mask, (H, W).
        is_mask: Whether it is a mask.
    """

    values: Any
    is_mask: bool = False

    @cached_property
    def size(self) -> tuple[int, int]:
        """Return (width, height)."""
        return int(self.values.shape[1]), int(self.values.shape[0])

    def fault(self) -> str:
        """Return why it can't be used; "" if it can."""
        if 0 in self.values.shape:
            return "no pixels (empty)"
        if not self.is_mask and self.values.shape[2] not in MODES:
            return "not 1, 3 or 4 channels; connect an output of type IMAGE"
        values = as_array(self.values)
        if not np.isfinite(values).all():
            return "values that are NaN or infinite; look at the node that makes them (a VAE in fp16 may do this)"
        if values.min() < -OVERSHOOT or values.max() > 1 + OVERSHOOT:
            return "values far outside of 0 to 1; scale them"
        if self.is_mask and not self.pixels().any():
            return (
                "entirely black, so that nothing of the image would be trained (Load Image gives such a mask for "
                "images without transparency); disconnect masks, or use Invert Mask"
            )
        return ""

    def pixels(self) -> np.ndarray:
        """Return the image in 8 bits, without a channel axis if it is gray."""
        values = np.rint(np.clip(as_array(self.values), 0, 1) * 255).astype(np.uint8)
        return values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values

    @cached_property
    def digest(self) -> str:
        """The hash of the pixels and their shape."""
        pixels = self.pixels()
        return hashlib.sha256(f"{pixels.shape}\n".encode() + pixels.tobytes()).hexdigest()

    def png(self) -> bytes:
        """Return it as a PNG file without metadata."""
        from io import BytesIO

        from PIL import Image

        stream = BytesIO()
        Image.fromarray(self.pixels()).save(stream, "PNG", compress_level=4)
        return stream.getvalue()


def as_array(values: Any) -> np.ndarray:
    """Return a tensor or array as a float32 array in RAM."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def list_images(values: Any, field: str, problems: list[Problem], is_mask: bool = False) -> list[GraphImage]:
    """Return the single images of a batch, or of a list of images and batches, in order.

    Args:
        values: What the node received.
        field: Name of its input.
        problems: Receives what is not an image.
        is_mask: Whether these are masks.
    """
    images: list[GraphImage] = []
    items = values if isinstance(values, list | tuple) else [values]
    for number, item in enumerate(items, 1):
        shape: tuple[int, ...] = tuple(getattr(item, "shape", ()))
        if is_mask and len(shape) == 4 and shape[1] == 1:  # some nodes give masks a channel axis
            item, shape = item[:, 0], (shape[0], *shape[2:])
        axes = len(shape) + is_mask
        if axes not in (3, 4):
            what = f"has the shape {list(shape)}" if shape else f"is of type {type(item).__name__}"
            kind = "a MASK (batch, height, width)" if is_mask else "an IMAGE (batch, height, width, channels)"
            problems.append(Problem(field, f"item {number} of {len(items)} {what}, expected {kind}"))
            continue
        images += (GraphImage(part, is_mask) for part in (item if axes == 4 else [item]))
    return images


def list_captions(values: Any) -> list[Any]:
    """Return the captions of a text or of nested lists of texts, in order. Nothing at all is no caption."""
    if not isinstance(values, list | tuple):
        return [] if values is None else [values]
    return [caption for value in values for caption in list_captions(value)]


def caption_lines(caption: str) -> tuple[str, ...]:
    """Return the lines of a caption file: each is one caption.

    Captioners write paragraphs, so that a line break separates no captions here; two vertical bars do.
    """
    parts = (" ".join(part.split()) for part in caption.split(SEVERAL))
    return tuple(part for part in parts if part)


def caption_fault(caption: Any) -> str:
    """Return why a value can't be a caption; "" if it can."""
    if not isinstance(caption, str):
        return "not a text; connect an output of type STRING"
    try:
        raw = caption.encode("utf-8")
    except UnicodeEncodeError:
        return "not valid Unicode; look at the node that makes it"
    return "a NUL character; look at the node that makes it" if b"\0" in raw else ""


def group_faults(field: str, noun: str, items: Sequence[Any], fault_of: Callable[[Any], str]) -> list[Problem]:
    """Return a problem for each kind of fault, with the indices of the items that have it, counted from 1."""
    numbers: dict[str, list[int]] = {}
    for number, item in enumerate(items, 1):
        if fault := fault_of(item):
            numbers.setdefault(fault, []).append(number)
    return [
        Problem(field, f"{noun}{'s' * (len(indices) > 1)} {join(indices)} of {len(items)}: {fault}")
        for fault, indices in numbers.items()
    ]


def join(numbers: Sequence[int]) -> str:
    """Return the first numbers, and how many more there are."""
    shown = ", ".join(map(str, numbers[:NUM_SHOWN]))
    return f"{shown} and {len(numbers) - NUM_SHOWN} more" if len(numbers) > NUM_SHOWN else shown


def spread(field: str, noun: str, values: Sequence[Any], count: int, problems: list[Problem]) -> Iterator[Any]:
    """Yield one value for each image: the same for all if there is one, and none if there are none.

    Args:
        field: Name of the input.
        noun: What the values are.
        values: The values.
        count: Number of images.
        problems: Receives a mismatch.
    """
    if len(values) not in (0, 1, count):
        text = f"{len(values)} {noun} for {count} images; connect one for all, or one for each image in the same order"
        problems.append(Problem(field, text))
        values = ()
    yield from (values if len(values) == count else list(values or [None]) * count)


def shape_fault(image: GraphImage, mask: GraphImage) -> str:
    """Return a fault if a mask has another aspect ratio than its image."""
    if is_same_shape(mask.size, image.size):
        return ""
    return "another aspect ratio than the image has; resize it to the image"
