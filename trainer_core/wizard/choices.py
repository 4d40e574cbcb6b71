"""What can be chosen, by name. Imports nothing heavy: the node QuickLora shows these names when ComfyUI starts."""

from __future__ import annotations

from ..config.flux import FLAVOURS
from ..config.model import CHROMA_REPOS

CHROMA, FLUX, NANO = "chroma", "flux", "nano"
FAMILIES = (CHROMA, FLUX, NANO)
FLAVOURS_OF = {CHROMA: tuple(CHROMA_REPOS), FLUX: tuple(name for name in FLAVOURS if name != "kontext"), NANO: (NANO,)}
STYLE, SUBJECT, CHARACTER = "style", "subject", "character"
LEARN = {
    STYLE: "how the images look: a technique, a material, a mood",
    SUBJECT: "a thing or an animal",
    CHARACTER: "a person or a figure",
}
QUICK, GOOD, BEST = "quick", "good", "best"
QUALITIES = {
    QUICK: "see within a short time whether the images work",
    GOOD: "the usual first LoRA",
    BEST: "more steps at full resolution",
}
TEXTFILE, FILENAME, TRIGGER = "textfile", "filename", "trigger"
CAPTIONS = {
    TEXTFILE: "only train the images that have a caption",
    FILENAME: "the name of the file as its caption",
    TRIGGER: "the trigger word alone as the caption of all images",
}
NO_TRIGGER = "none"
