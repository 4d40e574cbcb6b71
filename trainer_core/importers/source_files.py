"""Read configuration files of any of the formats, within bounds: JSON, TOML, YAML, .env files and command lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError
from ..storage.bounded_files import Unusable, check_values, parse_json, path_fault, read_regular
from ..storage.bounded_yaml import parse_yaml

MAX_BYTES = 1 << 20
NUM_PARENTS = 4  # a path in a configuration may be relative to any of so many folders above it
TOKEN = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
# A text, a comment, or a comma before a closing bracket.
JSON_EXTRAS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|,(?=(?:\s|//[^\n]*\n)*[}\]])', re.DOTALL)
ASSIGNMENT = re.compile(r"\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)")
CONTINUED = re.compile(r"[\\^`]\r?\n")
COMMENT = re.compile(r"^\s*(?:#|::|rem\b).*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class ConfigFile:
    """A file.

    Args:
        path: its path, or only its name if it was dropped on the page.
        value: its content. A command line is a dict of its arguments without the dashes.
        text: the same as text.
    """

    path: Path
    value: Any
    text: str = ""


@dataclass
class SourceFiles:
    """The files that the user named, and those that these name.

    Args:
        files: the files of the command line, or those that were dropped on the page.
        dropped: nothing else is read: a page must not choose files on the disk of the server.
        used: paths of those that belong to the configuration.
        absent: those that were named and are not there.
    """

    files: Sequence[ConfigFile]
    dropped: bool = False
    used: set[Path] = field(default_factory=set)
    absent: list[Problem] = field(default_factory=list)

    def referenced(self, name: Any, owner: ConfigFile, option: str) -> ConfigFile:
        """Return the file that an option of another file names.

        It is one of the user's files with that name, or lies relative to the other file's folder or a folder above it.
        If there is none, `absent` has a line for it, and the file is empty: a later one may be absent as well.

        Raises:
            UserError: the name is not that of a file, or the file can't be read.
        """
        if not isinstance(name, str) or not name.strip() or path_fault(name):
            raise UserError.at(f"{owner.path.name}: {option}", f"{str(name)[:60]!r} is not the path of a file")
        relative = Path(name.strip().replace("\\", "/"))
        if file := self._given(relative.name, owner):
            return file
        for base in () if self.dropped else _folders(owner):
            for candidate in (base / relative, base / relative.name):
                if candidate.is_file():
                    return read_config(candidate)
        self.absent.append(Problem(f"{owner.path.name}: {option}", self._absence(name, owner, relative.name)))
        return ConfigFile(relative, None)

    def lines(self, name: str, owner: ConfigFile) -> list[str]:
        """Return the lines of a text file that an option of another file names.

        Raises:
            OSError, Unusable, UnicodeDecodeError: it can't be read.
        """
        relative = Path(name.strip().replace("\\", "/"))
        if file := self._given(relative.name, owner):
            return file.text.splitlines()
        if self.dropped:
            raise Unusable("was not dropped as well")
        return read_regular(owner.path.resolve().parent / relative, MAX_BYTES).decode("utf-8-sig").splitlines()

    def _given(self, name: str, owner: ConfigFile) -> ConfigFile | None:
        file = next((file for file in self.files if file.path.name == name and file is not owner), None)
        self.used.update([file.path] if file else [])
        return file

    def _absence(self, name: str, owner: ConfigFile, short: str) -> str:
        if self.dropped:
            return f"names {name[:200]!r}; drop that file as well, together with {owner.path.name}"
        return (
            f"names {name[:200]!r}, which is not beside it or in a folder above; give that file as well: "
            f"chroma-trainer import {owner.path.name} {short}"
        )


def _folders(owner: ConfigFile) -> list[Path]:
    """Return the folders in which a file that another one names may be."""
    folder = owner.path.resolve().parent
    return [folder, *list(folder.parents)[:NUM_PARENTS]]


def read_config(path: Path) -> ConfigFile:
    """Return a file with its content.

    Raises:
        UserError: it can't be read, or is not of its format.
    """
    try:
        return parse_config(path, read_regular(path, MAX_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError.at(str(path), f"is not UTF-8 text (byte {error.start})") from error
    except Unusable as error:
        raise UserError.at(str(path), str(error)) from error
    except OSError as error:
        raise UserError.at(str(path), f"can't be read: {error.strerror or error}") from error


def parse_config(path: Path, text: str) -> ConfigFile:
    """Return a file with the content of this text.

    Raises:
        UserError: it is not of its format.
    """
    try:
        value = parse(text, path.suffix.lower())
        check_values(value)
    except Unusable as error:
        raise UserError.at(str(path), str(error)) from error
    return ConfigFile(path, value, text)


def parse(text: str, suffix: str) -> Any:
    """Return the content of a text, by the ending of its file.

    Raises:
        Unusable: it is not of this format.
    """
    if suffix in (".yaml", ".yml"):
        return parse_yaml(text)
    if suffix == ".toml":
        return parse_toml(text)
    if suffix in (".json", ".jsonc", ".example") or text.lstrip().startswith(("{", "[")):
        return parse_lenient_json(text)
    if suffix == ".env" or not re.search(r"\s--\w", text):
        return parse_env(text)
    return parse_command(text)


def parse_lenient_json(text: str) -> Any:
    """Parse JSON, which may have comments and commas after the last entry, as in the examples of some trainers."""
    try:
        return parse_json(text)
    except Unusable:
        return parse_json(JSON_EXTRAS.sub(lambda match: match[0] if match[0].startswith('"') else "", text))


def parse_toml(text: str) -> Any:
    try:
        return _toml_reader().loads(text)
    except RecursionError as error:
        raise Unusable("is nested too deeply") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise Unusable(f"is not valid TOML: {' '.join(str(error).split())[:300]}") from error


def _toml_reader() -> Any:
    """Return Python's module, or tomli where an older Python has it: neither is a dependency for one format alone."""
    for name in ("tomllib", "tomli"):
        with suppress(ImportError):
            return import_module(name)
    raise Unusable("is TOML, which needs Python 3.11 or the package tomli; run: pip install tomli")


def parse_env(text: str) -> dict[str, Any]:
    """Return the assignments of a shell file. A `$NAME` or `${NAME}` of an earlier one is replaced."""
    values: dict[str, Any] = {}
    for line in CONTINUED.sub(" ", COMMENT.sub("", text)).splitlines():
        if match := ASSIGNMENT.fullmatch(line):
            value = _unquote(re.sub(r"\s+#.*$", "", match[2]).strip())
            value = re.sub(r"\$\{?(\w+)\}?", lambda m: str(values.get(m[1], m[0]))[:2000], value)
            values[match[1]] = value
    return values


def parse_command(text: str) -> dict[str, Any]:
    """Return the arguments of a command line: `--a=b`, `--a b`, `--a b c` (a list) and `--a` (True).

    Works for a pasted line and for .sh, .bat and .ps1 files. Arguments before a script's name are left out.
    """
    words = [_unquote(word) for word in TOKEN.findall(CONTINUED.sub(" ", COMMENT.sub("", text)))]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    return parse_words(words[scripts[-1] + 1 :] if scripts else words)


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments in a list of words. See parse_command."""
    arguments: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            arguments[name] = [_unquote(value)] if equals else []
        elif name:
            arguments[name].append(word)
    return {
        name: True if not values else values[0] if len(values) == 1 else values for name, values in arguments.items()
    }


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
