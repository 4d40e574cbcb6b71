"""Texts in several languages, from the specs, js/texts/en.js and tools/translations:

    locales/LANGUAGE/nodeDefs.json   the nodes
    locales/LANGUAGE/main.json       the titles of the templates
    js/texts/LANGUAGE.js             the panel, the sidebar and the buttons

python tools/locales.py --check    say which translations are missing or left over; exit 1 for those left over

`python tools/node_docs.py` writes the files. Translations are found by their English text, so that a changed text
counts as missing rather than being wrong; what is missing stays English.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chroma_trainer.nodes import ALL_NODES
from chroma_trainer.trainer_core.spec import NodeSpec

ROOT = Path(__file__).resolve().parents[1]
TRANSLATIONS = ROOT / "tools" / "translations"
PAGE_TEXTS = ROOT / "js" / "texts"
FOLDERS = (
    "chroma-trainer",
    "ChromaTrainer",
    "chroma_trainer",
)  # the pack's, by which ComfyUI's page names our templates
HELP_WORDS = (  # of the help pages that tools/node_docs.py writes
    "Connections", "Settings", "Outputs", "input", "type", "output", "setting", "default", "range", "optional", "(empty)",
    "text", "{low} to {high}", "`{none}`, or a file of `models/{kind}`",
)  # fmt: skip
TEMPLATES = {
    "first-lora": "First LoRA: a tiny Chroma, on any machine",
    "first-flux-lora": "First Flux LoRA",
    "quick-lora": "A LoRA from a few choices",
    "caption-then-train": "Caption with any captioner, look, train",
    "low-vram": "Chroma on a small card",
    "style-with-regularisation": "A style that stays behind its trigger",
    "compare-checkpoints": "Compare checkpoints by strengths",
    "train-then-sample": "Train a LoRA, then sample with it",
    "full-rank": "Train the whole model",
    "kontext-pairs": "Teach Kontext an edit, from pairs of images",
    "merge-loras": "Two LoRAs made one",
    "adaptive-guider": "Adaptive Guider: CFG that stops when it no longer matters",
}


@dataclass
class Translation:
    """Names of inputs and outputs, and texts, by their English. Remembers what it was asked in vain, and what was used."""

    names: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def name(self, english: str) -> str:
        return self._find(self.names, english)

    def text(self, english: str) -> str:
        return self._find(self.texts, english)

    def left_over(self) -> list[str]:
        return sorted((self.names.keys() | self.texts.keys()) - self.used)

    def _find(self, known: dict[str, str], english: str) -> str:
        self.used.add(english)
        if english not in known:
            self.missing.append(english)
        return known.get(english, english)


class English(Translation):
    """Everything as it is."""

    def _find(self, known: dict[str, str], english: str) -> str:
        return english


def languages() -> dict[str, Translation]:
    """en first, then those that are translated."""
    found: dict[str, Translation] = {"en": English()}
    for path in sorted(TRANSLATIONS.glob("*.json")):
        found[path.stem] = Translation(**json.loads(path.read_text("utf-8")))
    return found


def node_texts(spec: NodeSpec, words: Translation) -> dict[str, Any]:
    """One node as ComfyUI's page wants it. A name's dots would be taken for levels; ours have none."""
    inputs = {item.name: {"name": words.name(item.name), "tooltip": words.text(item.doc)} for item in spec.fields()}
    outputs = {
        str(slot): {"name": words.name(item.name), "tooltip": words.text(item.doc)}
        for slot, item in enumerate(spec.outputs)
    }
    return {
        "display_name": words.text(spec.title),
        "description": words.text(spec.description),
        "inputs": inputs,
        "outputs": outputs,
    }


def page_texts() -> dict[str, Any]:
    """The English texts of the page, by key. A text that depends on a number is an object of its forms."""
    text = (PAGE_TEXTS / "en.js").read_text("utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def translate_page(words: Translation) -> dict[str, Any]:
    """The texts of the page in a language."""
    return {
        key: {form: words.text(text) for form, text in entry.items()} if isinstance(entry, dict) else words.text(entry)
        for key, entry in page_texts().items()
    }


def template_titles(words: Translation) -> dict[str, Any]:
    """The titles of the templates as ComfyUI's page looks them up: by the folder of the pack."""
    titles = {name: words.text(title) for name, title in TEMPLATES.items()}
    return {"templateWorkflows": {"template": {folder: titles for folder in FOLDERS}}}


def locale_files() -> Iterator[tuple[Path, str]]:
    """Every file and its text."""
    for language, words in languages().items():
        nodes = {spec.id: node_texts(spec, words) for spec in ALL_NODES.values()}
        text = json.dumps(nodes, ensure_ascii=False, indent=2) + "\n"
        yield ROOT / "locales" / language / "nodeDefs.json", text
        main = json.dumps(template_titles(words), ensure_ascii=False, indent=2) + "\n"
        yield ROOT / "locales" / language / "main.json", main
        if language != "en":
            page = json.dumps(translate_page(words), ensure_ascii=False, indent=2)
            yield PAGE_TEXTS / f"{language}.js", f"// Written by tools/locales.py.\nexport default {page};\n"


def ask_all(words: Translation) -> None:
    """Look up every text, so that words knows what is missing and what is left over."""
    for spec in ALL_NODES.values():
        node_texts(spec, words)
    translate_page(words)
    template_titles(words)
    for english in HELP_WORDS:
        words.text(english)


def main() -> int:
    stale = False
    for language, words in languages().items():
        ask_all(words)
        missing = list(dict.fromkeys(words.missing))
        print(f"{language}: {len(missing)} missing, they stay English; {len(words.left_over())} left over")
        for english in missing:
            print(f"  missing: {english}")
        for english in words.left_over():
            print(f"  left over: {english}")
        stale |= bool(words.left_over())
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
