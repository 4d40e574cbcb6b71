"""MkDocs hooks. docs/ is written to be read on GitHub: this makes its links to other files of the repository work on the site."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
HELP_IMAGES = "js/docs/images"  # shown by ComfyUI's help pages and by docs/nodes
log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config: Any) -> Any:
    """Fill the sections of the navigation that consist of a folder."""
    for section in config.nav:
        ((title, entries),) = section.items()
        if entries == "decisions/*":
            section[title] = [
                {f"{path.name[:4]} {title_of(path)}": f"decisions/{path.name}"}
                for path in sorted((ROOT / "docs/decisions").glob("*.md"))
            ]
        elif entries == "nodes/*":
            index = ROOT / "docs/nodes/README.md"
            section[title] = ["nodes/README.md", *(f"nodes/{name}" for name in LINK.findall(index.read_text("utf-8")))]
    return config


def title_of(path: Path) -> str:
    """The heading of a decision, without its number."""
    return path.read_text("utf-8").partition("\n")[0].lstrip("# 0123456789:")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / HELP_IMAGES).iterdir()):
        files.append(File.generated(config, f"nodes/images/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the site's copy of an image, or to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        if "://" in match[1] or target.startswith("docs/"):
            return match[1]
        if posixpath.dirname(target) == HELP_IMAGES:
            return posixpath.relpath(f"docs/nodes/images/{posixpath.basename(target)}", f"docs/{folder}")
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match[1])
        return f"{config.repo_url}/blob/main/{target}"

    return LINK.sub(replace, markdown)
