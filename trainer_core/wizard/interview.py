"""The questions of `chroma-trainer new`, in their order: what an earlier answer says decides how the next one is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import Problem, UserError, printable
from ..host import SinkHost, collect
from ..storage.lora_name import faults_of_name
from .card import Card
from .choices import (
    CAPTIONS,
    FAMILIES,
    FILENAME,
    FLAVOURS_OF,
    GOOD,
    LEARN,
    NO_TRIGGER,
    QUALITIES,
    STYLE,
    TEXTFILE,
    TRIGGER,
)
from .image_folder import DEMO, ImageFolder, look_into, suggest_folders
from .model_offers import Found, Offer, describe_unusable, find_files, offer_named, offers
from .questions import Question, Terminal, one_of

NUM_SUGGESTED = 9
LONGEST_TRIGGER = 100
MOST_GB = 1024
DEFAULT_NAME = "my-lora"
ORDER = ("model", "images", "captions", "learn", "trigger", "vram", "quality", "name")


@dataclass(frozen=True)
class Answers:
    """What the user wants to train.

    Args:
        vram: memory of the accelerator in GB, 0 for none.
    """

    model: Offer
    images: ImageFolder
    captions: str
    learn: str
    trigger: str
    vram: float
    quality: str
    name: str

    @property
    def num_trained(self) -> int:
        """Number of images that have a caption, and are thus trained."""
        return self.images.num_captioned if self.captions == TEXTFILE else self.images.num_images


class Interview:
    """Collects the answers: from options, then from the terminal.

    Args:
        host: its paths are searched for models and images.
        terminal: where questions are asked.
        options: name in ORDER, or "family" -> the option's text.
        detect_card: returns the accelerator of this machine; called where it matters.
        keeps_scan: whether what is read of the images is kept in the host's cache, as a training keeps it.
    """

    def __init__(
        self,
        host: SinkHost,
        terminal: Terminal,
        options: Mapping[str, str],
        detect_card: Callable[[], Card],
        keeps_scan: bool = False,
    ):
        self.host, self.terminal, self.options, self.detect_card = host, terminal, options, detect_card
        self.keeps_scan = keeps_scan
        self.answers: dict[str, Any] = {}
        self.families: Sequence[str] = FAMILIES

    def run(self) -> Answers:
        """Return all answers.

        Raises:
            InputEnded: the input ended before all questions were answered.
        """
        for name in ORDER:
            if name not in self.answers:
                question: Question = getattr(self, f"_ask_{name}")()
                self.answers[name] = self.terminal.ask(question) if question.is_asked else question.answer("")
            self._confirm(name)
        return Answers(**self.answers)

    def check_options(self) -> None:
        """Read the answers that are options.

        Raises:
            UserError: some are wrong; all of them are listed.
        """
        problems: list[Problem] = []
        family = self.options.get("family")
        if family is not None:
            chosen = collect(problems, one_of("--family", FAMILIES), family)
            self.families = (str(chosen),) if chosen else FAMILIES
        for name in ORDER:
            text = self.options.get(name)
            if name == "model" and text is None and family is not None and not problems:
                text = self.families[0]
            if text is None:
                continue
            question: Question = getattr(self, f"_ask_{name}")()
            value = collect(problems, question.read, text.strip())
            if value is not None:
                self.answers[name] = value
        if problems:
            raise UserError(problems)

    def _confirm(self, name: str) -> None:
        """Say what an answer means, where that is not what was typed."""
        if name == "images":
            self.terminal.say(f"  {self.answers['images'].text()}")

    @cached_property
    def model_files(self) -> Found:
        return find_files(self.host.paths)

    @cached_property
    def card(self) -> Card:
        return self.detect_card()

    @property
    def has_card(self) -> bool:
        """Whether the memory is that of this machine's accelerator, and not typed."""
        return "vram" not in self.options and not self.answers["model"].is_tiny and bool(self.card.gigabytes)

    def _ask_model(self) -> Question:
        shown = [offer for offer in offers(self.host.paths, self.model_files) if offer.family in self.families]
        for line in describe_unusable(self.model_files):
            self.terminal.say(line)
        names = [name for family in self.families for name in FLAVOURS_OF[family]]
        unlisted = [name for name in names if all(name != offer.key for offer in shown)]
        others = f"Other flavors can be typed: {', '.join(unlisted)}." if unlisted else ""
        return Question(
            option="--model",
            text=f"Which model should the LoRA be for? {others}".strip(),
            default=self._default_model(shown),
            read=lambda text: offer_named(text, shown, self.families),
            choices=tuple((offer.key, offer.text) for offer in shown),
            is_numbered=True,
        )

    def _default_model(self, shown: Sequence[Offer]) -> str:
        """Return a model that is here, else the first released one; without an accelerator the tiny one."""
        is_given = "model" in self.options or "family" in self.options
        if is_given or shown[0].files or shown[0].is_tiny:
            return shown[0].key
        has_card = "vram" in self.options or self.card.gigabytes
        return shown[0].key if has_card or not shown[-1].is_tiny else shown[-1].key

    def _ask_images(self) -> Question:
        suggested = suggest_folders(self.host.paths)[:NUM_SUGGESTED]
        choices = [(printable(name), f"{count} image files") for name, count in suggested]
        return Question(
            option="--images",
            text="Which folder holds the images? Type its path, or choose one.",
            default=choices[0][0] if choices else DEMO,
            read=lambda text: look_into(text, self.host, self.keeps_scan),
            choices=(*choices, (DEMO, "28 images that come with the pack, to try it out")),
            is_numbered=True,
        )

    def _ask_captions(self) -> Question:
        images: ImageFolder | None = self.answers.get("images")
        captioned, total = (images.num_captioned, images.num_images) if images else (1, 2)
        names = tuple(name for name in CAPTIONS if captioned or name != TEXTFILE)
        default = TEXTFILE if 2 * captioned >= total else FILENAME if images and images.has_telling_names else TRIGGER
        return Question(
            option="--captions",
            text=f"{total - captioned} of {total} images have no caption (a text file of the same name). What instead?",
            default=default,
            read=lambda text: _read_captions(text, names),
            choices=tuple((name, CAPTIONS[name]) for name in names),
            is_numbered=True,
            is_asked=captioned < total,
        )

    def _ask_learn(self) -> Question:
        return Question(
            option="--learn",
            text="What should the LoRA learn?",
            default=STYLE,
            read=one_of("--learn", tuple(LEARN)),
            choices=tuple(LEARN.items()),
            is_numbered=True,
        )

    def _ask_trigger(self) -> Question:
        images: ImageFolder | None = self.answers.get("images")
        needs_one = self.answers.get("captions") == TRIGGER
        none = "" if needs_one else f" ({NO_TRIGGER}: no trigger)"
        return Question(
            option="--trigger",
            text=f"Which trigger word should call it? One made-up word, in front of every caption that lacks it{none}.",
            default=_made_up_word(images) if images else "",
            read=lambda text: _read_trigger(text, needs_one),
        )

    def _ask_vram(self) -> Question:
        is_tiny = "model" in self.answers and self.answers["model"].is_tiny
        card = Card() if is_tiny or "vram" in self.options else self.card
        if card.gigabytes:
            self.terminal.say(f"\n{card.name}: {card.gigabytes:g} GB")
        return Question(
            option="--vram",
            text="How much memory has the graphics card that will train, in GB as it is sold? 0: none, the processor "
            "trains.",
            default=f"{card.gigabytes:g}",
            read=read_gigabytes,
            is_asked=not (is_tiny or card.gigabytes),
        )

    def _ask_quality(self) -> Question:
        return Question(
            option="--quality",
            text="How thorough should the training be?",
            default=GOOD,
            read=one_of("--quality", tuple(QUALITIES)),
            choices=tuple(QUALITIES.items()),
            is_numbered=True,
        )

    def _ask_name(self) -> Question:
        images: ImageFolder | None = self.answers.get("images")
        name = re.sub(r"\s+", "-", images.root.name.strip()) if images else ""
        return Question(
            option="--name",
            text="What should the LoRA be called? It is saved as output/loras/NAME.safetensors.",
            default=name if name and not faults_of_name(name) and "%" not in name else DEFAULT_NAME,
            read=_read_name,
        )


def _read_captions(text: str, names: tuple[str, ...]) -> str:
    if text.lower() == TEXTFILE and TEXTFILE not in names:
        raise UserError.at("--captions", f"no image has a caption file, so use {' or '.join(names)}")
    return one_of("--captions", names)(text)


def _made_up_word(images: ImageFolder) -> str:
    """Return what all captions begin with already; else the letters of the folder's name and an x, which is no word."""
    letters = re.sub(r"[^a-z0-9]", "", images.root.name.lower())[:16]
    return images.common_tag or f"{letters or 'my'}x"


def _read_trigger(text: str, needs_one: bool) -> str:
    trigger = "" if text.lower() == NO_TRIGGER else text
    if needs_one and not trigger:
        raise UserError.at("--trigger", "is empty, but the captions are the trigger alone; write a made-up word")
    if len(trigger) > LONGEST_TRIGGER or printable(trigger) != trigger:
        raise UserError.at("--trigger", f"{trigger[:40]!r} is no trigger; write one made-up word, or a few words")
    return trigger


def read_gigabytes(text: str) -> float:
    """Return a number of GB, such as that of "12", "12 GB" or "12,5".

    Raises:
        UserError: it is not one.
    """
    number = re.sub(r"\s*(gb|gib|g)\Z", "", text.lower()).replace(",", ".")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST_GB:
        raise UserError.at("--vram", f"{text[:40]!r} is not a number of GB from 0 to {MOST_GB}; write for example 12")
    return value


def _read_name(text: str) -> str:
    faults = faults_of_name(text)
    if faults:
        raise UserError(Problem("--name", fault) for fault in faults)
    return text
