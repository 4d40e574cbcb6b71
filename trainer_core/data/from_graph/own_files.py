"""The files that SaveDataset wrote into a folder, by name: only these does it replace, or set aside.

The list is a hidden file in the folder. It says first which files will be there, and last that all are: after a crash
the files that were written are still known as the node's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, reason_of
from ...storage.atomic import rename, sha256_of, write_json
from ...storage.bounded_files import Unusable, read_json
from ..source.backend import stem

LIST = ".chroma-trainer-dataset.json"  # hidden: the scan of a dataset leaves such names out
EARLIER = ".earlier"  # folder of images that are no longer made
MAX_LIST_BYTES = 256 << 20  # 170 bytes for each file
MASK_END = "-masklabel.png"
UNFINISHED = ""  # hash of a file that a run was about to write


@dataclass(frozen=True)
class OwnFile:
    """A file of the node.

    Attributes:
        content: Hash of the pixels or the text.
        sha256: Hash of the file when it was written. A file with another one was edited.
    """

    content: str
    sha256: str


@dataclass(frozen=True)
class OwnFiles:
    """The list.

    Attributes:
        folder: The dataset.
        files: The node's files by name.
        is_complete: Whether the last run wrote all of them.
        exists: Whether there is a list.
    """

    folder: Path
    files: dict[str, OwnFile] = field(default_factory=dict)
    is_complete: bool = True
    exists: bool = False

    @classmethod
    def read(cls, folder: Path, field_name: str) -> OwnFiles:
        """Return the list of a folder, an empty one if it has none.

        Raises:
            UserError: The list can't be read.
        """
        try:
            value = read_json(folder / LIST, MAX_LIST_BYTES)
            files = {name: OwnFile(**entry) for name, entry in value["files"].items() if _is_name(name)}
            if not all(isinstance(part, str) for file in files.values() for part in (file.content, file.sha256)):
                raise Unusable("its hashes are not texts")
            return cls(folder, files, value["complete"] is True, True)
        except FileNotFoundError:
            return cls(folder)
        except (OSError, Unusable, KeyError, TypeError, AttributeError) as error:
            fix = "so it is not known which files SaveDataset may replace; enter another name, or delete this file"
            raise UserError.at(field_name, f"{folder / LIST} can't be read ({reason_of(error)}), {fix}") from error

    def write(self) -> None:
        """Write the list."""
        entries = {name: {"content": file.content, "sha256": file.sha256} for name, file in sorted(self.files.items())}
        value: dict[str, Any] = {"version": 1, "complete": self.is_complete, "files": entries}
        write_json(self.folder / LIST, value)

    def images(self) -> list[str]:
        """Return the names of the images."""
        return [name for name in self.files if name.endswith(".png") and not name.endswith(MASK_END)]

    @property
    def has_masks(self) -> bool:
        return any(name.endswith(MASK_END) for name in self.files)

    def is_edited(self, name: str) -> bool:
        """Return whether a file that is there is not as the node wrote it, or not the node's."""
        file = self.files.get(name)
        return file is None or file.sha256 not in (UNFINISHED, sha256_of(self.folder / name))

    def set_aside(self, name: str) -> None:
        """Move a file to the folder EARLIER, in place of one of its name."""
        (self.folder / EARLIER).mkdir(exist_ok=True)
        rename(self.folder / name, self.folder / EARLIER / name)


def _is_name(name: str) -> bool:
    """Return whether this is the name of a file in the folder itself."""
    return "/" not in name and "\\" not in name and name not in ("", ".", "..")


def stem_of(name: str) -> str:
    """Return the name of the image that a file belongs to, without its ending."""
    return stem(name.removesuffix(MASK_END))
