"""The start page says the same in every language: commands, settings, nodes, links and the order of the parts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from chroma_trainer.nodes import ALL_NODES

START = Path(__file__).resolve().parents[1] / "docs" / "start"
ENGLISH = (START / "en.md").read_text("utf-8")
OTHERS = sorted(path.stem for path in START.glob("*.md") if path.stem != "en")
CODE_BLOCK = re.compile(r"^```\n(.*?)^```$", re.M | re.S)


def test_the_languages_of_the_guides_are_there():
    assert OTHERS == ["hi", "ja", "pt-BR", "zh"]


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_has_all_that_the_english_page_has(language):
    text = (START / f"{language}.md").read_text("utf-8")
    assert CODE_BLOCK.findall(text) == CODE_BLOCK.findall(ENGLISH)
    for part in (r"`[^`\n]+`", r"\*\*[^*\n]+\*\*", r"\]\((\.\./[^)]+)\)", r"(?<!\*)\*[^*\n]+\*(?!\*)"):
        assert Counter(re.findall(part, text)) == Counter(re.findall(part, ENGLISH)), part
    assert re.findall(r"^(?:#+|\|(?:-+\|)?|\d\.)", text, re.M) == re.findall(r"^(?:#+|\|(?:-+\|)?|\d\.)", ENGLISH, re.M)
    numbers = re.compile(r"\d+(?:\.\d+)*")
    assert Counter(numbers.findall(text)) == Counter(numbers.findall(ENGLISH))


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_every_page_links_all_others_which_are_there(language):
    text = (START / f"{language}.md").read_text("utf-8")
    others = {f"{other}.md" for other in ("en", *OTHERS)} - {f"{language}.md"}
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert others <= links
    assert all((START / link).is_file() for link in links)


def test_settings_and_nodes_exist():
    titles = {spec.title for spec in ALL_NODES.values()} | {"ChromaTrainer", "Run", "Load LoRA"}
    assert set(re.findall(r"\*\*([^*\n]+)\*\*", ENGLISH)) <= titles
    quick = {field.name for field in ALL_NODES["QuickLora"].fields()}
    assert {"model", "images", "learn", "trigger"} <= quick
