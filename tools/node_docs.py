"""Writes what is told of the nodes, from their specs: docs/nodes/*.md, ComfyUI's help pages js/docs/*.md, and locales/.

python tools/node_docs.py           write them
python tools/node_docs.py --check   exit 1 and name those that are stale
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from chroma_trainer.nodes import ALL_NODES
from chroma_trainer.trainer_core.spec import Field, NodeSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))
from locales import English, Translation, languages, locale_files

ROOT = Path(__file__).resolve().parents[1]
TIPS = ROOT / "docs" / "nodes" / "tips"


def pages() -> dict[Path, str]:
    """Every page and its text. A tip written by hand, docs/nodes/tips/<id>.md, follows the description; its pictures are in
    js/docs/images, where ComfyUI's page finds them."""
    found = {}
    others = {language: words for language, words in languages().items() if language != "en"}
    for spec in ALL_NODES.values():
        for language, words in others.items():
            found[ROOT / "js" / "docs" / spec.id / f"{language}.md"] = page(spec, words, language)
        text = page(spec, English())
        found[ROOT / "docs" / "nodes" / f"{spec.id}.md"] = text.replace("](images/", "](../../js/docs/images/")
        found[ROOT / "js" / "docs" / f"{spec.id}.md"] = text
    rows = "\n".join(f"| [{spec.id}]({spec.id}.md) | {spec.description} |" for spec in ALL_NODES.values())
    found[ROOT / "docs" / "nodes" / "README.md"] = f"# The nodes\n\n| node | what it does |\n|---|---|\n{rows}\n"
    return found | dict(locale_files())


def page(spec: NodeSpec, words: Translation, language: str = "en") -> str:
    """A node's page in a language: names stay as they are in files, so that a text in another language finds them."""
    say = words.text
    tips = TIPS if language == "en" else TIPS / language
    tip = tips / f"{spec.id}.md"
    parts = [f"# {say(spec.title)}\n", f"{say(spec.description)}\n"]
    if tip.is_file():
        parts.append(tip.read_text("utf-8"))
    sockets = [field for field in spec.fields() if field.socket]
    widgets = [field for field in spec.fields() if field.is_widget]
    if sockets:
        rows = (
            f"| `{f.name}` | {f.socket.type}{'' if f.required else ', ' + say('optional')} | {say(f.doc)} |"  # type: ignore[union-attr]
            for f in sockets
        )
        parts.append(_table(say, "Connections", ("input", "type"), rows))
    if widgets:
        rows = (f"| `{f.name}` | {_shown(f.initial, say)} | {_range(f, say)} | {say(f.doc)} |" for f in widgets)
        parts.append(_table(say, "Settings", ("setting", "default", "range"), rows))
    rows = (f"| `{output.name}` | {output.type} | {say(output.doc)} |" for output in spec.outputs)
    parts.append(_table(say, "Outputs", ("output", "type"), rows))
    return "\n".join(parts)


def _table(say: Callable[[str], str], title: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"| {say(column)} " for column in columns)
    return f"## {say(title)}\n\n{head}| |\n{'|---' * (len(columns) + 1)}|\n" + "\n".join(rows) + "\n"


def _shown(value: object, say: Callable[[str], str]) -> str:
    if value == "":
        return say("(empty)")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _range(field: Field, say: Callable[[str], str]) -> str:
    if field.choice:
        return ", ".join(f"`{name}`" for name in field.choice.options)
    if field.range:
        low, high = (
            f"{bound:g}" if field.kind is float else str(bound) for bound in (field.range.low, field.range.high)
        )
        return say("{low} to {high}").format(low=low, high=high)
    if field.model_file:
        text = say("`{none}`, or a file of `models/{kind}`")
        labels = "`, `".join((field.model_file.none_label, *field.model_file.others))
        return text.format(none=labels, kind=field.model_file.kind)
    return "true, false" if field.kind is bool else say("text")


def main() -> int:
    wanted = pages()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"stale: {path.relative_to(ROOT).as_posix()}; run python tools/node_docs.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wanted[path].encode("utf-8"))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
