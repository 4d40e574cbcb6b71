"""Writes what is told of the nodes, from their specs: docs/nodes/*.md, ComfyUI's help pages js/docs/*.md, and locales/.

python tools/node_docs.py           write them
python tools/node_docs.py --check   exit 1 and name those that are stale
"""

from __future__ import annotations

import sys
from pathlib import Path

from chroma_trainer.nodes import ALL_NODES
from chroma_trainer.trainer_core.spec import Field, NodeSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))
from locales import locale_files

ROOT = Path(__file__).resolve().parents[1]
TIPS = ROOT / "docs" / "nodes" / "tips"


def pages() -> dict[Path, str]:
    """Every page and its text. A tip written by hand, docs/nodes/tips/<id>.md, follows the description; its pictures are in
    js/docs/images, where ComfyUI's page finds them."""
    found = {}
    for spec in ALL_NODES.values():
        text = page(spec)
        found[ROOT / "docs" / "nodes" / f"{spec.id}.md"] = text.replace("](images/", "](../../js/docs/images/")
        found[ROOT / "js" / "docs" / f"{spec.id}.md"] = text
    rows = "\n".join(f"| [{spec.id}]({spec.id}.md) | {spec.description} |" for spec in ALL_NODES.values())
    found[ROOT / "docs" / "nodes" / "README.md"] = f"# The nodes\n\n| node | what it does |\n|---|---|\n{rows}\n"
    return found | dict(locale_files())


def page(spec: NodeSpec) -> str:
    tip = TIPS / f"{spec.id}.md"
    parts = [f"# {spec.title}\n", f"{spec.description}\n"]
    if tip.is_file():
        parts.append(tip.read_text("utf-8"))
    sockets = [field for field in spec.fields() if field.socket]
    widgets = [field for field in spec.fields() if field.is_widget]
    if sockets:
        rows = (f"| `{f.name}` | {f.socket.type}{'' if f.required else ', optional'} | {f.doc} |" for f in sockets)  # type: ignore[union-attr]
        parts.append("## Connections\n\n| input | type | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    if widgets:
        rows = (f"| `{f.name}` | {_shown(f.initial)} | {_range(f)} | {f.doc} |" for f in widgets)
        parts.append("## Settings\n\n| setting | default | range | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    rows = (f"| `{output.name}` | {output.type} | {output.doc} |" for output in spec.outputs)
    parts.append("## Outputs\n\n| output | type | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _shown(value: object) -> str:
    if value == "":
        return "(empty)"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _range(field: Field) -> str:
    if field.choice:
        return ", ".join(f"`{name}`" for name in field.choice.options)
    if field.range:
        return (
            f"{field.range.low:g} to {field.range.high:g}"
            if field.kind is float
            else f"{field.range.low} to {field.range.high}"
        )
    if field.model_file:
        labels = ", ".join(f"`{label}`" for label in (field.model_file.none_label, *field.model_file.others))
        return f"{labels}, or a file of `models/{field.model_file.kind}`"
    return "true, false" if field.kind is bool else "text"


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
