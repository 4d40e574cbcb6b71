"""What is trained on, as a small value: parts that are chained into one dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..spec import Advanced, Choice, Doc, Range, Text
from .degradation import steps_of

CAPTIONS = ("textfile", "filename", "instance prompt")
SEVERAL = "||"  # between instance prompts: a field of one line has no line breaks


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """A local folder of images: the widgets of DatasetBackend."""

    PATHS: ClassVar = ("folder", "references", "masks")
    LATER: ClassVar = (
        ("references",),
        ("tag_orders", "kept_tags"),
        ("masks", "unmasked_weight"),
        ("prior_preservation",),
        ("degrade",),
    )

    folder: Annotated[
        str,
        Text(placeholder="folder of images"),
        Doc(
            "Folder of images, with subfolders. A name is looked up in ComfyUI's input folder and in the datasets folders; "
            "an absolute path must lie under one of them."
        ),
    ] = "neon-emoji"
    captions: Annotated[
        str,
        Choice(*CAPTIONS),
        Doc(
            "Where captions come from: a .txt beside each image (one caption a line, one of them drawn each time), the file's name, or the one instance prompt."
        ),
    ] = "textfile"
    instance_prompt: Annotated[
        str,
        Text(),
        Doc(
            "The caption of every image when captions is 'instance prompt'. Several are separated by two vertical bars; one of them is drawn each time."
        ),
    ] = ""
    trigger: Annotated[
        str,
        Text(),
        Doc(
            "Word that calls up what is learnt. Put in front of every caption that lacks it, and recorded in the LoRA file. May be empty."
        ),
    ] = ""
    resolution: Annotated[
        float,
        Range(0.01, 8192, 0.01),
        Doc("Size to train at, read by resolution_type: 1024 as pixel or pixel_area, 1.0 as area."),
    ] = 1024
    resolution_type: Annotated[
        str,
        Choice("pixel_area", "pixel", "area"),
        Doc(
            "pixel_area: area of a square with this edge. pixel: length of the shorter edge. area: megapixels (1.0 = 1024 x 1024)."
        ),
    ] = "pixel_area"
    crop: Annotated[
        bool,
        Doc(
            "Crop to the bucket's shape. Off: the whole image is resized to the nearest bucket, slightly out of proportion."
        ),
    ] = True
    crop_style: Annotated[
        str,
        Choice("center", "random", "corner"),
        Doc("Which part is kept: the centre, a part drawn by the seed, or the upper left corner."),
    ] = "center"
    crop_aspect: Annotated[
        str,
        Choice("preserve", "square"),
        Doc("preserve: the bucket whose shape is nearest to the image's. square: every image becomes a square."),
    ] = "preserve"
    repeats: Annotated[int, Range(1, 10000), Doc("How many times each image is seen in an epoch; 1 is once.")] = 1
    min_size: Annotated[
        int, Range(0, 8192), Doc("Images whose shorter edge has fewer pixels are skipped; 0 keeps all.")
    ] = 0
    bucket_step: Annotated[
        str,
        Choice("auto", "64", "32", "16"),
        Advanced(),
        Doc("Bucket edges are multiples of this many pixels. auto: 64, and 16 below 256 px."),
    ] = "auto"
    on_broken: Annotated[
        str,
        Choice("skip", "stop"),
        Doc(
            "What an unreadable image or a missing caption does: it is skipped and reported, or it stops the run before it starts."
        ),
    ] = "skip"
    references: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "For Flux kontext alone: the folder of pictures to start from. Each has the name of the picture that is to become of it; its ending may be "
            "another, and it is cropped to the same shape."
        ),
    ] = ""
    tag_orders: Annotated[
        int,
        Range(0, 64),
        Advanced(),
        Doc(
            "For captions made of tags: adds this many other orders of the comma-separated tags to each caption, of which one is drawn each time. The trigger stays in front. Each order is encoded and cached. 0: captions stay as they are."
        ),
    ] = 0
    kept_tags: Annotated[
        int, Range(0, 64), Advanced(), Doc("With tag_orders: this many tags after the trigger keep their place.")
    ] = 0
    masks: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "Folder of masks, outside the folder of images: white places of a picture are learnt, black ones are not, grey ones in between. Each mask has the name "
            "and the shape of its picture; its ending may be another. A picture without one is treated as on_broken says."
        ),
    ] = ""
    unmasked_weight: Annotated[
        float,
        Range(0, 1, 0.01),
        Advanced(),
        Doc("With masks: how much black places count, where white ones count 1. 0: not at all."),
    ] = 0.0
    prior_preservation: Annotated[
        bool,
        Advanced(),
        Doc(
            "These pictures keep the model as it is: they are trained towards what the base predicts without the LoRA, not towards themselves. For a second folder with what must not change, such as other people. A batch with such pictures takes one more forward pass."
        ),
    ] = False
    degrade: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "For Flux kontext, instead of references: each picture starts from itself made worse, which it learns to mend. jpeg 10-30 (quality), blur 1-3 (pixels), "
            "noise 0.02-0.1, shrink 2-4 (times smaller, and enlarged again); a strength of the range is drawn for each picture. Several with +: shrink 4 + jpeg 20-40."
        ),
    ] = ""

    @property
    def instance_prompts(self) -> list[str]:
        return [text.strip() for text in self.instance_prompt.split(SEVERAL) if text.strip()]

    def problems(self) -> list[Problem]:
        found = []
        if self.kept_tags and not self.tag_orders:
            found.append(
                Problem(
                    "kept_tags", f"is {self.kept_tags}, but tag_orders is 0 and moves no tag; set tag_orders, or use 0"
                )
            )
        if self.unmasked_weight and not self.masks.strip():
            told = f"is {self.unmasked_weight:g}, but masks names no folder; name one, or use 0"
            found.append(Problem("unmasked_weight", told))
        if self.degrade.strip() and self.references.strip():
            found.append(
                Problem(
                    "degrade",
                    f"is {self.degrade!r}, but references names a folder of pictures to start from; empty one of the two",
                )
            )
        try:
            steps_of(self.degrade)
        except ValueError as error:
            found.append(Problem("degrade", str(error)))
        if self.captions == "instance prompt" and not self.instance_prompts:
            found.append(
                Problem(
                    "instance_prompt",
                    "is empty, but captions is 'instance prompt'; write the caption of every image here",
                )
            )
        if self.resolution_type != "area" and not 16 <= self.resolution <= 8192:
            found.append(
                Problem(
                    "resolution",
                    f"{self.resolution:g} is out of range; {self.resolution_type} wants pixels, 16 to 8192",
                )
            )
        if self.resolution_type == "area" and self.resolution > 16:
            found.append(
                Problem(
                    "resolution",
                    f"{self.resolution:g} megapixels are too many; area wants at most 16 (1.0 is 1024 x 1024)",
                )
            )
        return found


@dataclass(frozen=True)
class DatasetConfig:
    """Parts in the order in which they are chained; each is trained on in every epoch.

    roots: the folder each part was found at, absolute. reference_roots: the same of the pictures to start from, "" for none. mask_roots: the same of masks.
    """

    UNRECORDED: ClassVar = ("roots", "reference_roots", "mask_roots")

    parts: tuple[FolderConfig, ...]
    roots: tuple[str, ...]
    reference_roots: tuple[str, ...] = ()
    mask_roots: tuple[str, ...] = ()

    @property
    def has_references(self) -> bool:
        """Whether pictures of a part have others to start from."""
        return any(self.reference_roots) or self.has_degraded

    @property
    def has_degraded(self) -> bool:
        return any(part.degrade.strip() for part in self.parts)
