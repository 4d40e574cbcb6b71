"""The table of a trainer: which of its options is which field of a node, and how its value is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .source_files import ConfigFile, SourceFiles

LOAD = "Load"  # LoadChroma or LoadFlux, by family


class NotThere(Exception):
    """This value has no equivalent here. str() says what is used instead, or what the value would have done."""


class NothingToSet(Exception):
    """This value needs no setting here. str() says why."""


class Wrong(Exception):
    """This value can't be read. str() says what is wanted."""


@dataclass(frozen=True)
class Values:
    """Values of several fields of one node, or a value with a note for the report."""

    fields: Mapping[str, Any]
    note: str = ""


Convert = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Row:
    """One option.

    Args:
        theirs: its name there, with dots for sections; alternatives are separated by |, the first that is set counts.
        node: type of the node, or LOAD.
        field: name of the node's field.
        convert: convert(value, all options of the same section) returns the value here, or Values.
    """

    theirs: str
    node: str
    field: str
    convert: Convert

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.theirs.split("|"))


@dataclass(frozen=True)
class Table:
    """The options of a trainer, or those of one of its folders.

    Args:
        rows: options with an equivalent.
        equal: name -> why it needs no setting here. A name that ends with * is a prefix.
        missing: name -> what it would have done. Listed only where it is set.
        usual: name -> the value that is the same here; any other is missing.
        defaults: values that apply where the file leaves an option out, and that differ from the defaults here.
    """

    rows: tuple[Row, ...]
    equal: Mapping[str, str]
    missing: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Folder:
    """A folder of images in a configuration: its name for the report, and its options."""

    label: str
    options: Mapping[str, Any]


@dataclass
class Settings:
    """A configuration as flat options.

    Args:
        family: "chroma" or "flux".
        options: name -> value.
        folders: the folders, in order.
        equal, missing: lines (name, text) of the report that reading the files has given already.
    """

    family: str
    options: dict[str, Any]
    folders: list[Folder] = field(default_factory=list)
    equal: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Trainer:
    """Another trainer.

    Args:
        title: its name.
        detect: detect(value) tells whether a parsed file is its main configuration.
        read: read(file, files) returns the settings, with the files that the main file names.
        table: its options.
        folders: the options of its folders.
    """

    title: str
    detect: Callable[[Any], bool]
    read: Callable[[ConfigFile, SourceFiles], Settings]
    table: Table
    folders: Table
