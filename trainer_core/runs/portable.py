"""What may be published with a LoRA: names instead of paths of a machine, no secrets, and values that are JSON.

The workflow and the request are written into LoRA files, images and request.json. A path in them would tell a user's
name, and equal data at another place would give other bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import printable
from ..host import ASSETS, Paths, extra_roots

MAX_DEPTH = 60  # levels of nesting that are recorded
ABSOLUTE = re.compile(
    r"""~[\w.-]*(?:[\\/].*)?  # ~, ~/cats, ~user/cats
    | [A-Za-z]:[\\/].*         # C:\cats
    | \\\\[^\\]+\\.*           # \\server\share
    | \\\w[\w. -]*\\\w.*      # \Users\cats, on the current drive; but not "\(series\)"
    | file://.*
    | /[^/\s]+                 # /cats, but not "/imagine a cat"
    | /[^/]+/.*                # /data/my cats
    """,
    re.VERBOSE,
)
SECRET_NAME = re.compile(r"(?:^|[_-])(?:api[_-]?key|secret|password|passwd|token|credentials?)$", re.IGNORECASE)
SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[bp]-|AKIA)[A-Za-z0-9_-]{16,}")
MARKS = " \t\"'"  # that a pasted path may be wrapped in
HOME = "home"  # name of a home folder itself, whose last component is the user's name
SHORTEST_HOME = 4  # a home folder such as / is no secret


def portable(value: Any, paths: Paths) -> Any:
    """Return a JSON value as it may be published.

    - Each line of a text that is an absolute path becomes a name, see portable_path; the home folder becomes ~.
    - Secrets become empty: values whose name says so, such as api_key, and tokens of the usual forms.
    - NaN and infinite numbers become null, as does what is nested too deeply; halves of surrogate pairs are escaped.
    """
    return _publish(value, paths, 0)


def without_secrets(value: Any) -> Any:
    """Return a JSON value as portable does, but with its paths."""
    return _publish(value, None, 0)


def _publish(value: Any, paths: Paths | None, depth: int) -> Any:
    if isinstance(value, str):
        return _publish_text(value, paths)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list | tuple) and depth >= MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {
            _as_utf8(key): "" if _is_secret(key, item) else _publish(item, paths, depth + 1)
            for key, item in value.items()
        }
    return type(value)(_publish(item, paths, depth + 1) for item in value) if isinstance(value, list | tuple) else value


def _publish_text(text: str, paths: Paths | None) -> str:
    if paths and ("/" in text or "\\" in text or "~" in text):
        home = os.path.expanduser("~")
        lines = text.split("\n")
        text = "\n".join(portable_path(line, paths) if is_absolute(line) else line for line in lines)
        text = _without_home(text, home) if len(home) >= SHORTEST_HOME else text
    return _as_utf8(SECRET.sub("", text))


def _without_home(text: str, home: str) -> str:
    """Replace the home folder by ~, with slashes of either kind, and on Windows in any case."""
    separator = r"[\\/]+"
    pattern = separator.join(map(re.escape, re.split(separator, home)))
    return re.sub(pattern, "~", text, flags=re.IGNORECASE if home[1:2] == ":" else 0)


def _as_utf8(text: Any) -> Any:
    try:
        text.encode("utf-8")
    except (UnicodeEncodeError, AttributeError):
        return printable(text) if isinstance(text, str) else text
    return text


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(value, str) and isinstance(name, str) and bool(SECRET_NAME.search(name))


def is_absolute(text: str) -> bool:
    """Return whether a line is an absolute path of any system, or one in a home folder."""
    return bool(ABSOLUTE.fullmatch(text.strip(MARKS)))


def portable_path(text: str, paths: Paths) -> str:
    """Return the name of an absolute path: relative to a datasets or models folder, else its last component.

    The working directory does not count, although datasets are searched there: its relative paths may begin with a
    home folder. Other texts are returned unchanged.
    """
    if not is_absolute(text):
        return text
    path = os.path.expanduser(text.strip(MARKS).removeprefix("file://")).replace("\\", "/").rstrip("/")
    for candidate in dict.fromkeys((path, _resolve(path))):
        for root in _roots(paths):
            if _fold(candidate).startswith(f"{_fold(root)}/"):
                return candidate[len(root) + 1 :]
    return HOME if path == os.path.expanduser("~").replace("\\", "/") else path.rsplit("/", 1)[-1]


def _roots(paths: Paths) -> Iterator[str]:
    """Yield the folders that names are relative to, the longest first, as they are and with links resolved."""
    datasets = list(paths.datasets)
    if Path.cwd() in datasets:
        datasets.remove(Path.cwd())
    folders = [*datasets, ASSETS, *extra_roots(), *(root for roots in paths.models.values() for root in roots)]
    texts = {text for folder in folders for text in (_absolute(folder), _resolve(str(folder)))}
    yield from sorted(texts - {""}, key=lambda text: (-len(text), text))


def _absolute(path: Path) -> str:
    return os.path.abspath(path).replace("\\", "/").rstrip("/")


def _resolve(path: str) -> str:
    try:
        return os.path.realpath(path).replace("\\", "/").rstrip("/")
    except (OSError, ValueError):
        return path


def _fold(path: str) -> str:
    return path.casefold() if os.name == "nt" else path
