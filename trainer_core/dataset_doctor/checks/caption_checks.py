"""Check the captions of a dataset: missing, equal, without the trigger, longer than the text encoder takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ...config.dataset import FolderConfig
from ...data.captions import with_trigger
from ..findings import NOTE, WARNING, Case, Finding, count_of
from ..image_list import ImageList, ListedImage

CountTokens = Callable[[str], int]
LONGEST_SHOWN = 60  # characters of a caption
OWN_CAPTIONS = ("textfile", "table", "json file", "filename")  # where each image has a caption of its own


def check_captions(images: ImageList, limit: int = 0, count_tokens: CountTokens | None = None) -> list[Finding]:
    """Return what is wrong with the captions.

    Args:
        images: The images.
        limit: Tokens that the text encoder takes, with the end token.
        count_tokens: Returns the tokens of a caption, with the end token. None: the length is not checked.
    """
    groups = (
        _missing(images.images),
        _without_trigger(images),
        _equal(images),
        _too_long(images.images, limit, count_tokens) if count_tokens else (),
    )
    texts = (
        ("caption_missing", WARNING, "without a caption", "; they are not trained; write one for each"),
        ("trigger_missing", NOTE, "captions without the trigger", "; the training puts it in front of them"),
        ("caption_equal", WARNING, "with the same caption as others", "; it does not say how they differ"),
        ("caption_long", WARNING, f"captions longer than {limit} tokens", "; the text encoder cuts off what is beyond"),
    )
    return [
        Finding(kind, severity, f"{what}: {count_of(cases)}{advice}", tuple(cases), is_drawn=kind == "caption_equal")
        for (kind, severity, what, advice), cases in zip(texts, groups, strict=True)
        if cases
    ]


def _missing(images: Sequence[ListedImage]) -> list[Case]:
    return [case_of(image, image.caption_fault) for image in images if image.caption_fault and not image.fault]


def _without_trigger(images: ImageList) -> list[Case]:
    def lacks(settings: FolderConfig, caption: str) -> bool:
        trigger = settings.trigger.strip()
        return bool(trigger) and with_trigger(caption, trigger) != caption

    return [
        case_of(image, _shorten(caption))
        for image in images.images
        for caption in image.captions
        if lacks(images.parts[image.part], caption)
    ]


def _equal(images: ImageList) -> list[Case]:
    """Return the images whose captions are all those of another image, group by group."""
    groups: dict[tuple[str, ...], list[ListedImage]] = defaultdict(list)
    for image in images.images:
        if image.captions and images.parts[image.part].captions in OWN_CAPTIONS:
            groups[tuple(" ".join(text.split()).casefold() for text in image.captions)].append(image)
    repeated = [members for members in groups.values() if len(members) > 1]
    return [
        case_of(image, _shorten(image.captions[0]), group=number)
        for number, members in enumerate(repeated, 1)
        for image in members
    ]


def _too_long(images: Sequence[ListedImage], limit: int, count_tokens: CountTokens) -> list[Case]:
    # A token is at least one character, with a space in front and the end token.
    texts = ((image, text) for image in images for text in image.trained if len(text) + 2 > limit)
    counts = ((image, count_tokens(text)) for image, text in texts)
    return [case_of(image, f"{count} tokens") for image, count in counts if count > limit]


def case_of(image: ListedImage, value: str = "", box: tuple[float, ...] = (), group: int = 0) -> Case:
    """Return the case of an image."""
    return Case(image.number, image.path, image.label, value, box, group)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
