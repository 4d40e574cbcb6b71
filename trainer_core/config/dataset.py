"""Dataset settings: image folders, chained into one dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..spec import Advanced, Choice, Doc, Range, Text
from .degradation import steps_of

CAPTIONS = ("textfile", "filename", "instance prompt")
SEVERAL = "||"  # separates instance prompts, because a single-line widget has no line breaks


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """A folder of images: the widgets of DatasetBackend."""

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
            "Folder of images, including subfolders. A relative name is looked up in ComfyUI's input folder and in the "
            "datasets folders. An absolute path must be inside one of them."
        ),
    ] = "neon-emoji"
    captions: Annotated[
        str,
        Choice(*CAPTIONS),
        Doc(
            "Where captions come from. textfile: a .txt file next to each image; of several lines, one is picked at "
            "random each time. filename: the name of the image file, with spaces for underscores and without a counter "
            "at its end: _001, -3 or (2) is cut, the number in Porsche 911 is not. instance prompt: the text of "
            "instance_prompt."
        ),
    ] = "textfile"
    instance_prompt: Annotated[
        str,
        Text(),
        Doc(
            "Caption of every image, if captions is 'instance prompt'. Separate several with two vertical bars; one of "
            "them is picked at random each time."
        ),
    ] = ""
    trigger: Annotated[
        str,
        Text(),
        Doc(
            "Trigger word of the LoRA. It is added to the front of every caption that lacks it, and recorded in the "
            "LoRA file. May be empty."
        ),
    ] = ""
    resolution: Annotated[
        float,
        Range(0.01, 8192, 0.01),
        Doc("Training resolution. Its unit depends on resolution_type: 1024 for pixel and pixel_area, 1.0 for area."),
    ] = 1024
    resolution_type: Annotated[
        str,
        Choice("pixel_area", "pixel", "area"),
        Doc(
            "Unit of resolution. pixel_area: edge of a square with the same area, in pixels. pixel: shorter edge, in "
            "pixels. area: megapixels (1.0 = 1024 x 1024)."
        ),
    ] = "pixel_area"
    crop: Annotated[
        bool,
        Doc(
            "Crop images to the aspect ratio of their bucket. Off: resize the whole image to the bucket, which "
            "slightly distorts it. Images that it would distort by more than 25 %, such as panoramas, are cropped "
            "nevertheless, and counted."
        ),
    ] = True
    crop_style: Annotated[
        str,
        Choice("center", "random", "corner"),
        Doc(
            "Part of the image to keep. center: the middle. random: picked by the seed. corner: the upper left corner."
        ),
    ] = "center"
    crop_aspect: Annotated[
        str,
        Choice("preserve", "square"),
        Doc(
            "preserve: use the bucket with the aspect ratio nearest to the image. square: crop every image to a square."
        ),
    ] = "preserve"
    repeats: Annotated[int, Range(1, 10000), Doc("Number of times each image is used per epoch. 1: once.")] = 1
    min_size: Annotated[
        int, Range(0, 8192), Doc("Skip images whose shorter edge has fewer pixels than this. 0: use all images.")
    ] = 0
    bucket_step: Annotated[
        str,
        Choice("auto", "64", "32", "16"),
        Advanced(),
        Doc("Bucket sizes are multiples of this many pixels. auto: 64, or 16 below 256 px."),
    ] = "auto"
    on_broken: Annotated[
        str,
        Choice("skip", "stop"),
        Doc(
            "What to do with unreadable images and missing captions. skip: skip the image and report it. stop: stop "
            "before the training starts."
        ),
    ] = "skip"
    references: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "Only for Flux kontext: folder of reference images. Each has the same name as its target image (the file "
            "extension may differ) and is cropped to the same aspect ratio."
        ),
    ] = ""
    tag_orders: Annotated[
        int,
        Range(0, 64),
        Advanced(),
        Doc(
            "Tag shuffling: number of orders of the comma-separated tags of each caption, the written order included; "
            "one of them is picked at random each time. The trigger stays in front. Every order is encoded and "
            "cached. 0 or 1: as written."
        ),
    ] = 0
    kept_tags: Annotated[
        int, Range(0, 64), Advanced(), Doc("With tag_orders: number of tags after the trigger that are not shuffled.")
    ] = 0
    masks: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "Folder of loss masks, outside the image folder, or the image folder itself if the masks are named like "
            "OneTrainer's (a-masklabel.png beside a.jpg). White areas are trained, black areas are not, gray "
            "areas in proportion. Each mask has the same name and aspect ratio as its image (the file extension may "
            "differ). Images without a mask are handled by on_broken."
        ),
    ] = ""
    unmasked_weight: Annotated[
        float,
        Range(0, 1, 0.01),
        Advanced(),
        Doc("With masks: loss weight of black areas; white areas have weight 1. 0: black areas are not trained."),
    ] = 0.0
    prior_preservation: Annotated[
        bool,
        Advanced(),
        Doc(
            "Use this folder to preserve the base model: the training target is the base model's prediction without "
            "the LoRA, not the image. For a second folder with content that must not change, such as other people. "
            "Batches with these images take one extra forward pass."
        ),
    ] = False
    degrade: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "Only for Flux kontext, instead of references: the reference is a degraded copy of the image, which the "
            "model learns to restore. jpeg 10-30 (quality), blur 1-3 (pixels), noise 0.02-0.1, shrink 2-4 (downscale "
            "factor; upscaled again). The strength is picked at random from the range for each image. Combine several "
            "with +: shrink 4 + jpeg 20-40."
        ),
    ] = ""

    @property
    def instance_prompts(self) -> list[str]:
        """The instance prompts, split at the separator."""
        return [text.strip() for text in self.instance_prompt.split(SEVERAL) if text.strip()]

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        problems = []
        if self.kept_tags and self.tag_orders < 2:
            problems.append(
                Problem(
                    "kept_tags",
                    f"is {self.kept_tags}, but tag_orders is {self.tag_orders}, so no tags are shuffled; set tag_orders to 2 or "
                    "more, or use 0",
                )
            )
        if self.unmasked_weight and not self.masks.strip():
            message = f"is {self.unmasked_weight:g}, but masks is empty; set masks to a folder, or use 0"
            problems.append(Problem("unmasked_weight", message))
        if self.degrade.strip() and self.references.strip():
            problems.append(
                Problem(
                    "degrade",
                    f"is {self.degrade!r}, but references is set to a folder of reference images; empty one of the two",
                )
            )
        try:
            steps_of(self.degrade)
        except ValueError as error:
            problems.append(Problem("degrade", str(error)))
        if self.captions == "instance prompt" and not self.instance_prompts:
            problems.append(
                Problem(
                    "instance_prompt",
                    "is empty, but captions is 'instance prompt'; write the caption of all images here",
                )
            )
        if self.resolution_type != "area" and not 16 <= self.resolution <= 8192:
            problems.append(
                Problem(
                    "resolution",
                    f"{self.resolution:g} is out of range; {self.resolution_type} is in pixels, use 16 to 8192",
                )
            )
        if self.resolution_type == "area" and self.resolution > 16:
            problems.append(
                Problem(
                    "resolution",
                    f"{self.resolution:g} megapixels is out of range; area is in megapixels, use at most 16 (1.0 is "
                    "1024 x 1024)",
                )
            )
        return problems


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of one or more folders. Every epoch trains on all of them.

    Args:
        parts: settings of each folder, in the order in which they are chained.
        roots: absolute path of each folder.
        reference_roots: absolute path of each folder of reference images, "" for none.
        mask_roots: absolute path of each folder of masks, "" for none.
    """

    UNRECORDED: ClassVar = ("roots", "reference_roots", "mask_roots")

    parts: tuple[FolderConfig, ...]
    roots: tuple[str, ...]
    reference_roots: tuple[str, ...] = ()
    mask_roots: tuple[str, ...] = ()

    @property
    def has_references(self) -> bool:
        """Whether any images have reference images, from a folder or by degradation."""
        return any(self.reference_roots) or self.has_degraded

    @property
    def has_degraded(self) -> bool:
        """Whether any reference images are degraded copies of their targets."""
        return any(part.degrade.strip() for part in self.parts)
