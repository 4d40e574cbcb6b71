"""Dataset settings: image folders, chained into one dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem
from ..spec import Advanced, Choice, Doc, Range, Text
from .degradation import steps_of

CAPTIONS = ("textfile", "filename", "instance prompt", "table", "json file")
CROP_STYLES = ("center", "random", "corner", "boxes", "mask")
CROP_ASPECTS = ("preserve", "square", "random", "closest")
LARGEST_ASPECT = 4.0  # buckets from 1:4 to 4:1
MAX_RESOLUTIONS = 16  # in one node
SEVERAL = "||"  # separates instance prompts, because a single-line widget has no line breaks


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """A folder of images: the widgets of DatasetBackend."""

    PATHS: ClassVar[tuple[str, ...]] = ("folder", "references", "masks", "table")
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("references",),
        ("tag_orders", "kept_tags"),
        ("masks", "unmasked_weight"),
        ("prior_preservation",),
        ("degrade",),
        ("table",),
        ("caption_column",),
        ("file_column",),
        ("caption_prefix",),
        ("caption_suffix",),
        ("tag_dropout",),
        ("class_word",),
        ("aspects",),
        ("min_aspect",),
        ("max_aspect",),
        ("max_upscale",),
        ("flip",),
        ("resolutions",),
    )

    folder: Annotated[
        str,
        Text(placeholder="folder of images"),
        Doc(
            "Folder of images or archives, including subfolders. A relative name is looked up in ComfyUI's input folder "
            "and in the datasets folders. An absolute path must be inside one of them. Also an address that you have "
            "allowed (s3://bucket/cats, hf://user/name), or a table with the addresses of images."
        ),
    ] = "neon-emoji"
    captions: Annotated[
        str,
        Choice(*CAPTIONS),
        Doc(
            "Where captions come from. textfile: a .txt file next to each image; of several lines, one is picked at "
            "random each time. filename: the name of the image file, with spaces for underscores and without a counter "
            "at its end: _001, -3 or (2) is cut, the number in Porsche 911 is not. instance prompt: the text of "
            "instance_prompt. table: one file with the captions of all images, see table. json file: a .json file next "
            "to each image."
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
        Choice(*CROP_STYLES),
        Doc(
            "Part of the image to keep. center: the middle. random: picked by the seed. corner: the upper left corner. "
            "boxes: around the boxes in the table, such as faces. mask: around the white area of "
            "the image's mask."
        ),
    ] = "center"
    crop_aspect: Annotated[
        str,
        Choice(*CROP_ASPECTS),
        Doc(
            "preserve: use the bucket with the aspect ratio nearest to the image. square: crop every image to a "
            "square. closest: crop to the aspect ratio in aspects that is nearest to the image. random: crop to one "
            "of aspects, picked by the seed for each image."
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
        int,
        Range(0, 64),
        Advanced(),
        Doc("With tag_orders or tag_dropout: number of tags after the trigger that are neither shuffled nor left out."),
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
    table: Annotated[
        str,
        Text(placeholder="empty: found in the folder"),
        Advanced(),
        Doc(
            "File with one row for each image: csv, tsv, jsonl, json or parquet, relative to folder. Empty: the first "
            "of metadata.jsonl, metadata.csv, metadata.parquet, captions.* and meta_cap.json in the folder. A column "
            "loss_weight multiplies the loss of its image; a column boxes is for crop_style boxes."
        ),
    ] = ""
    caption_column: Annotated[
        str,
        Text(placeholder="empty: caption, text, prompt ..."),
        Advanced(),
        Doc(
            "With captions table or json file: column of the caption. Empty: the first of caption, text, prompt, "
            "caption_or_tags and tags. Several separated by commas are several captions, of which one is picked at "
            "random each time. With a vertical bar between two: the first that is not empty; with a plus: both, with "
            "a comma between them."
        ),
    ] = ""
    file_column: Annotated[
        str,
        Text(placeholder="empty: file_name, filename, image, id ..."),
        Advanced(),
        Doc(
            "Column of the table with the name of the image file, with or without its extension. Empty: the first of "
            "file_name, filename, image, file, path, image_path, key and id."
        ),
    ] = ""
    caption_prefix: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc("Text in front of every caption of this folder, and of its trigger. It is never shuffled or left out."),
    ] = ""
    caption_suffix: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc("Text at the end of every caption of this folder. It is never shuffled or left out."),
    ] = ""
    tag_dropout: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Advanced(),
        Doc(
            "Probability with which each comma-separated tag of a caption is left out, in every variant of the caption "
            "but the written one. The trigger and kept_tags stay. tag_orders is the number of variants; if it is 0 or "
            "1, there are 8, with the tags in their written order. 0: off."
        ),
    ] = 0.0
    class_word: Annotated[
        str,
        Text(placeholder="empty: no caption at all"),
        Advanced(),
        Doc(
            "With preservation of LoRATrainer: what the trigger stands for, such as person. The prediction for the "
            "caption with this word in place of the trigger is held at that of the base model. Empty: the prediction "
            "for an empty caption is."
        ),
    ] = ""
    aspects: Annotated[
        str,
        Text(placeholder="such as 1:1, 2:3, 16:9"),
        Advanced(),
        Doc("With crop_aspect random or closest: the aspect ratios (width:height), separated by commas."),
    ] = ""
    min_aspect: Annotated[
        float,
        Range(0.0, 100.0, 0.01),
        Advanced(),
        Doc("Skip images that are narrower than this aspect ratio (width / height), such as 0.5 for 1:2. 0: no limit."),
    ] = 0.0
    max_aspect: Annotated[
        float,
        Range(0.0, 100.0, 0.01),
        Advanced(),
        Doc("Skip images that are wider than this aspect ratio (width / height), such as 2 for 2:1. 0: no limit."),
    ] = 0.0
    max_upscale: Annotated[
        float,
        Range(0.0, 100.0, 0.01),
        Advanced(),
        Doc(
            "Skip images that would be enlarged by more than this factor to fill their bucket. 1: never enlarge. "
            "0: no limit."
        ),
    ] = 0.0
    flip: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        Advanced(),
        Doc(
            "Probability with which an image is trained mirrored, left to right, picked by the seed each time. Masks "
            "and references are mirrored with it. The latents of both are cached. Not for text, logos or faces whose "
            "sides differ. 0: off."
        ),
    ] = 0.0
    resolutions: Annotated[
        str,
        Text(placeholder="empty: resolution alone"),
        Advanced(),
        Doc(
            "Several resolutions separated by commas, in place of resolution: 512, 768, 1024. Every image is trained "
            "at each of them, as with one node for each."
        ),
    ] = ""

    @property
    def instance_prompts(self) -> list[str]:
        """The instance prompts, split at the separator."""
        return [text.strip() for text in self.instance_prompt.split(SEVERAL) if text.strip()]

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        problems = [*self._shape_problems(), *self._table_problems()]
        if self.kept_tags and self.tag_orders < 2 and not self.tag_dropout:
            problems.append(
                Problem(
                    "kept_tags",
                    f"is {self.kept_tags}, but tag_orders is {self.tag_orders} and tag_dropout is 0, so no tags are "
                    "shuffled or left out; set tag_orders to 2 or more, or use 0",
                )
            )
        if self.class_word.strip() and not self.trigger.strip():
            text = "is set, but trigger is empty, so there is nothing that it stands for; set trigger, or empty it"
            problems.append(Problem("class_word", text))
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

    def _table_problems(self) -> list[Problem]:
        problems = []
        if self.caption_column.strip() and self.captions not in ("table", "json file"):
            text = f"is {self.caption_column!r}, but captions is {self.captions!r}; set captions to table or json file"
            problems.append(Problem("caption_column", text))
        if self.file_column.strip() and not self.needs_table:
            text = f"is {self.file_column!r}, but no table is read; set captions to table, or empty it"
            problems.append(Problem("file_column", text))
        return problems

    def _shape_problems(self) -> list[Problem]:
        problems = []
        for name, read in (("aspects", self.aspect_ratios), ("resolutions", self.resolution_list)):
            try:
                read()
            except ValueError as error:
                problems.append(Problem(name, str(error)))
        if self.takes_aspects and not self.aspects.strip():
            text = f"is empty, but crop_aspect is {self.crop_aspect}; enter aspect ratios, such as 1:1, 2:3, 16:9"
            problems.append(Problem("aspects", text))
        if self.aspects.strip() and not self.takes_aspects:
            text = f"is {self.aspects!r}, but crop_aspect is {self.crop_aspect}; set it to closest or random"
            problems.append(Problem("aspects", text))
        if self.takes_aspects and not self.crop:
            text = f"is {self.crop_aspect}, but crop is off; turn crop on, or use preserve"
            problems.append(Problem("crop_aspect", text))
        if self.max_aspect and self.min_aspect > self.max_aspect:
            text = f"is {self.min_aspect:g}, above max_aspect {self.max_aspect:g}: every image would be skipped"
            problems.append(Problem("min_aspect", f"{text}; both are width / height"))
        if 0 < self.max_upscale < 1:
            text = f"is {self.max_upscale:g}; it is a factor: use 1 to never enlarge, 1.5 for half as much again, or 0"
            problems.append(Problem("max_upscale", text))
        if self.crop_style == "mask" and not self.masks.strip():
            problems.append(Problem("crop_style", "is mask, but masks is empty; set masks to a folder, or use center"))
        return problems

    @property
    def takes_aspects(self) -> bool:
        """Whether images are cropped to the aspect ratios of `aspects`."""
        return self.crop_aspect in ("random", "closest")

    @property
    def needs_table(self) -> bool:
        """Whether a table is read, for captions or for the boxes or weights of images."""
        return self.captions == "table" or self.crop_style == "boxes" or bool(self.table.strip())

    def aspect_ratios(self) -> tuple[float, ...]:
        """Return `aspects` as width / height.

        Raises:
            ValueError: One of them is no aspect ratio, or outside of the buckets. str() is the reason.
        """
        return tuple(_aspect_of(text.strip()) for text in self.aspects.split(",") if text.strip())

    def resolution_list(self) -> tuple[float, ...]:
        """Return the resolutions that every image is trained at.

        Raises:
            ValueError: One of them is no number, there are too many, or two are equal. str() is the reason.
        """
        texts = [text.strip() for text in self.resolutions.split(",") if text.strip()]
        values = tuple(map(_resolution_of, texts))
        if len(set(values)) < len(values):
            raise ValueError(f"{self.resolutions!r} names a resolution twice; use repeats to train images more often")
        if len(values) > MAX_RESOLUTIONS:
            raise ValueError(f"has {len(values)} resolutions; use at most {MAX_RESOLUTIONS}")
        return values or (self.resolution,)


def _aspect_of(text: str) -> float:
    """Return width / height of "16:9", "16x9", "16/9" or "1.78"."""
    width, _, height = text.replace("/", ":").replace("x", ":").partition(":")
    try:
        value = float(width) / float(height or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 1 / LARGEST_ASPECT <= value <= LARGEST_ASPECT:
        raise ValueError(f"{text[:40]!r} is not an aspect ratio from 1:4 to 4:1; write width:height, such as 2:3")
    return value


def _resolution_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 8192:
        raise ValueError(f"{text[:40]!r} is not a resolution from 0.01 to 8192; write numbers, such as 512, 768, 1024")
    return value


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of one or more folders. Every epoch trains on all of them.

    Args:
        parts: settings of each folder, in the order in which they are chained.
        roots: absolute path of each folder.
        reference_roots: absolute path of each folder of reference images, "" for none.
        mask_roots: absolute path of each folder of masks, "" for none.
        tables: absolute path of each folder's table, "" for none.
    """

    UNRECORDED: ClassVar[tuple[str, ...]] = ("roots", "reference_roots", "mask_roots", "tables")

    parts: tuple[FolderConfig, ...]
    roots: tuple[str, ...]
    reference_roots: tuple[str, ...] = ()
    mask_roots: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    @property
    def has_references(self) -> bool:
        """Whether any images have reference images, from a folder or by degradation."""
        return any(self.reference_roots) or self.has_degraded

    @property
    def has_degraded(self) -> bool:
        """Whether any reference images are degraded copies of their targets."""
        return any(part.degrade.strip() for part in self.parts)
