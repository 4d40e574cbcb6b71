"""The nodes' texts in other languages: every node and input has an entry, nothing is left over, what is missing is counted."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from chroma_trainer.nodes import ALL_NODES

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "ja", "pt-BR", "zh")


def tool():
    return load_script("tools/locales.py")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_input_has_its_texts(language):
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    assert set(nodes) == set(ALL_NODES)
    for node_id, spec in ALL_NODES.items():
        texts = nodes[node_id]
        assert texts["display_name"] and texts["description"]
        assert set(texts["inputs"]) == {field.name for field in spec.fields()}
        assert set(texts["outputs"]) == {str(slot) for slot in range(len(spec.outputs))}
        assert all(
            entry["name"] and entry["tooltip"] for part in ("inputs", "outputs") for entry in texts[part].values()
        )


def test_english_is_what_the_specs_say():
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    for node_id, spec in ALL_NODES.items():
        assert nodes[node_id]["display_name"] == spec.title
        assert {name: entry["tooltip"] for name, entry in nodes[node_id]["inputs"].items()} == {
            field.name: field.doc for field in spec.fields()
        }


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_what_is_not_translated_yet_is_counted(language):
    """New fields stay English until somebody translates them: told, not refused. Most must be translated."""
    module = tool()
    words = module.languages()[language]
    module.ask_all(words)
    missing = set(words.missing)
    if missing:
        warnings.warn(f"{language}: {len(missing)} texts are still English, see python tools/locales.py", stacklevel=1)
    assert len(missing) < 0.25 * len(words.used)


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_keep_names_and_numbers(language):
    """Names of settings that a text quotes, and numbers, are the same in every language."""
    words = tool().languages()[language]
    for english, translated in words.texts.items():
        wanted = set(re.findall(r"`[^`]+`|[a-z]+_[a-z_]+[a-z]|\d+(?:\.\d+)?(?:e-\d+)?", english)) - {"1"}
        lost = {part for part in wanted if part not in translated}
        assert not lost, (english, lost)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_have_no_sign_that_a_front_end_would_carry_out(language):
    """vue-i18n, which ComfyUI 0.8's Nodes 2.0 hands tooltips to, reads braces, bars and @ as its own: the node was not drawn."""
    written: list[str] = []

    def read(value):
        if isinstance(value, dict):
            for inner in value.values():
                read(inner)
        elif set(value) & set("{}|@"):
            written.append(value)

    for path in (ROOT / "locales" / language).glob("*.json"):
        read(json.loads(path.read_text("utf-8")))
    assert not written


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_has_a_title(language):
    titles = json.loads((ROOT / "locales" / language / "main.json").read_text("utf-8"))["templateWorkflows"]["template"]
    names = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert all(set(texts) == names for texts in titles.values()) and "chroma-trainer" in titles


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_every_node_has_a_help_page_and_every_tip_is_translated(language):
    for node_id in ALL_NODES:
        text = (ROOT / "js" / "docs" / node_id / f"{language}.md").read_text("utf-8")
        assert "## Settings" not in text and f"`{next(iter(ALL_NODES[node_id].fields())).name}`" in text
    tips = ROOT / "docs" / "nodes" / "tips"
    assert {path.name for path in (tips / language).glob("*.md")} == {path.name for path in tips.glob("*.md")}


def test_every_picture_of_the_help_pages_is_there():
    """Links of pages in other languages count from js/docs as well, where ComfyUI's page looks."""
    for folder in (ROOT / "js" / "docs", ROOT / "docs" / "nodes"):
        for page in folder.rglob("*.md") if folder.name == "docs" else folder.glob("*.md"):
            for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text("utf-8")):
                assert (folder / target).is_file(), (page, target)


def test_colours_are_of_nodes_and_types_that_there_are():
    text = (ROOT / "js" / "colours.js").read_text("utf-8").split("app.registerExtension")[0]
    links, nodes = (set(re.findall(r"^  (\w+): \"", part, re.M)) for part in text.split("const NODES"))
    assert nodes and nodes <= set(ALL_NODES)
    assert links and links <= {output.type for spec in ALL_NODES.values() for output in spec.outputs}


def test_every_template_is_listed_in_the_docs():
    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) == {
        path.stem for path in (ROOT / "workflows").glob("*.json")
    }
