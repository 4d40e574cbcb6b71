"""ComfyUI's texts of our nodes in several languages: locales/LANGUAGE/nodeDefs.json, from the specs and tools/translations.

python tools/locales.py --check    say which translations are missing or left over; exit 1 for those left over

`python tools/node_docs.py` writes the files. Translations are found by their English text, so that a changed text counts as
missing rather than being wrong; what is missing stays English.
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


def locale_files() -> Iterator[tuple[Path, str]]:
    """Every file and its text."""
    for language, words in languages().items():
        nodes = {spec.id: node_texts(spec, words) for spec in ALL_NODES.values()}
        text = json.dumps(nodes, ensure_ascii=False, indent=2) + "\n"
        yield ROOT / "locales" / language / "nodeDefs.json", text


def main() -> int:
    stale = False
    for language, words in languages().items():
        for spec in ALL_NODES.values():
            node_texts(spec, words)
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
