"""A dataset backend for a local folder and its subfolders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from ...errors import quoted
from ...storage.bounded_files import Unusable, read_regular
from .backend import Entry, LeftOut, printable_name, stem
from .file_list import Entries
from .formats import AVIF, SUFFIXES, is_readable, readable_suffixes, why_unreadable
from .text_encoding import MAX_BYTES, UnreadableText, decode_regional, decode_unicode, encoding_of

# Folders that systems, NAS and other tools add: name in lower case -> what is in it.
TOOL_FOLDERS = {
    "@eadir": "thumbnails of a Synology NAS",
    ".@__thumb": "thumbnails of a QNAP NAS",
    ".thumbnails": "thumbnails",
    "#recycle": "the recycle bin of a NAS",
    "@recycle": "the recycle bin of a NAS",
    "#snapshot": "snapshots of a NAS",
    "@recently-snapshot": "snapshots of a NAS",
    "$recycle.bin": "the recycle bin of Windows",
    "recycler": "the recycle bin of Windows",
    "system volume information": "a folder of Windows",
    "__macosx": "metadata of a macOS archive",
    ".appledouble": "metadata of macOS",
    "lost+found": "recovered files of the file system",
}
TRASH = re.compile(r"\.trash(es|-\d+)?", re.IGNORECASE)
MASK_LABEL = re.compile(r"-masklabel$", re.IGNORECASE)  # OneTrainer's masks: a-masklabel.png beside a.jpg
CONDITION_LABEL = re.compile(r"-condlabel$", re.IGNORECASE)  # its conditioning images
MASKS = "OneTrainer's masks (*-masklabel): to use them, set masks to the folder of the images"
CONDITIONS = "OneTrainer's conditioning images (*-condlabel)"
MAX_CAPTIONS_READ = 5000  # to tell the encoding of a folder


class FolderBackend:
    """The images below a folder. A caption is the .txt file of the same name.

    Args:
        root: The folder.
        only_masks: Take OneTrainer's masks, which are left out otherwise, and nothing else.
    """

    def __init__(self, root: Path, only_masks: bool = False):
        self.has_rows = False
        self.root = str(root)  # strings: creating a Path for each of 10,000 names takes 0.25 s
        self.only_masks = only_masks
        self.left_out = LeftOut()
        self.encodings: Counter[str] = Counter()

    def entries(self) -> Sequence[Entry]:
        self.left_out = LeftOut()
        return Entries(_images(self.root, "", Rules(self.left_out, self.only_masks)))

    def has_images(self) -> bool:
        """Return whether there is an image, without listing all."""
        return any(True for _ in _walk(self.root, Rules(LeftOut(), self.only_masks)))

    def read(self, name: str) -> bytes:
        with open(self._location(name), "rb") as file:
            return file.read()

    def caption_text(self, name: str) -> tuple[str | None, str]:
        try:
            raw, stamp = self._caption_bytes(name)
        except FileNotFoundError:
            return None, ""
        except Unusable as error:
            if os.path.isdir(stem(self._location(name)) + ".txt"):
                return None, ""
            raise UnreadableText(str(error)) from error
        except OSError:
            if os.path.isdir(stem(self._location(name)) + ".txt"):
                return None, ""
            raise
        text = decode_unicode(raw)
        if text is None:
            text, encoding = decode_regional(raw, self._encoding)
            self.encodings[encoding] += 1
        return text, stamp

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        try:
            return read_regular(stem(self._location(name)) + suffix, MAX_BYTES)
        except FileNotFoundError:
            return None
        except Unusable as error:
            raise UnreadableText(str(error)) from error

    def path(self, name: str) -> str:
        return printable_name(self._location(name))

    def _location(self, name: str) -> str:
        return os.path.join(self.root, *name.split("/"))

    def _caption_bytes(self, name: str) -> tuple[bytes, str]:
        path = stem(self._location(name)) + ".txt"
        return read_regular(path, MAX_BYTES), _stamp(os.stat(path))

    @cached_property
    def _encoding(self) -> str:
        """Encoding of the captions that are not Unicode, told by all of them together; "" if it is in doubt."""
        return encoding_of(self._regional_captions())

    def _regional_captions(self) -> Iterator[bytes]:
        names = (name for name, _ in _images(self.root, "", Rules(LeftOut(), self.only_masks)))
        for name, _ in zip(names, range(MAX_CAPTIONS_READ), strict=False):
            try:
                raw, _ = self._caption_bytes(name)
                if decode_unicode(raw) is None:
                    yield raw
            except (OSError, Unusable):
                continue


class Rules:
    """Tell images from what else is in a dataset's folder.

    Args:
        left_out: Receives everything that could be an image and is not used.
        only_masks: See FolderBackend.
    """

    def __init__(self, left_out: LeftOut, only_masks: bool = False):
        self.left_out, self.only_masks = left_out, only_masks
        self.suffixes = readable_suffixes()

    def list_entry(self, entry: os.DirEntry[str]) -> str:
        """Return `name/` for a folder to search, `name NUL stamp` for an image, and "" for anything else."""
        name, suffix = os.path.splitext(entry.name)
        if entry.is_dir():
            return f"{entry.name}/" if self._is_searched(entry) else ""
        suffix = suffix.lower()
        if suffix not in self.suffixes or (suffix == AVIF and not is_readable(suffix)):
            self._note_unreadable(entry, why_unreadable(suffix))
            return ""
        if self.only_masks and not MASK_LABEL.search(name):
            return ""
        if reason := self._why_left_out(entry.name, name):
            self.left_out.add_by_rule(printable_name(entry.path), reason)
            return ""
        if not entry.is_file():
            is_dangling = entry.is_symlink() and not os.path.exists(entry.path)
            reason = "it is a link to a file that does not exist" if is_dangling else "it is not a regular file"
            self._note_unreadable(entry, reason)
            return ""
        return f"{entry.name}\0{_stamp(entry.stat())}"

    def _is_searched(self, folder: os.DirEntry[str]) -> bool:
        reason = _why_not_searched(folder)
        count = _count_images(folder.path, self.suffixes) if reason else 0
        if count:
            self.left_out.add_by_rule(printable_name(folder.path), reason, count)
        return not reason

    def _why_left_out(self, full_name: str, name: str) -> str:
        if full_name.startswith("."):
            return "hidden files (their names start with a dot)"
        if MASK_LABEL.search(name):
            return "" if self.only_masks else MASKS
        return CONDITIONS if CONDITION_LABEL.search(name) else ""

    def _note_unreadable(self, entry: os.DirEntry[str], reason: str) -> None:
        if reason and not entry.name.startswith("."):
            self.left_out.add_unreadable(printable_name(entry.path), reason)

    def note_folder(self, folder: str, error: OSError) -> None:
        """Add a folder that can't be listed."""
        self.left_out.add_unreadable(printable_name(folder), f"the folder can't be read ({error.strerror or error})")


def _why_not_searched(folder: os.DirEntry[str]) -> str:
    if what := TOOL_FOLDERS.get(folder.name.lower()):
        return what
    if TRASH.fullmatch(folder.name):
        return "a trash folder"
    if folder.name.startswith("."):
        return "hidden folders (their names start with a dot)"
    if folder.is_symlink():
        return "links to folders, which are not followed: add the folder itself with another DatasetBackend"
    return ""


def _count_images(folder: str, suffixes: frozenset[str]) -> int:
    """Return the number of files below a folder that are named like images."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(os.path.splitext(name)[1].lower() in suffixes for name in names)


def no_images(folder: str, backend: FolderBackend) -> str:
    """Return the message about a folder without images.

    Args:
        folder: Name of the folder, for the message.
        backend: The folder.
    """
    backend.entries()
    reasons = [f"{path}: {reason}" for path, reason in backend.left_out.unreadable[:3]]
    reasons += [f"{path}: {reason}" for reason, path in backend.left_out.by_rule.items()][:3]
    others = f" (left out: {'; '.join(reasons)})" if reasons else ""
    endings = " ".join(sorted(SUFFIXES))
    return f"no images in {quoted(folder)} or its subfolders{others}; put files there that end in {endings}"


def _walk(folder: str, rules: Rules) -> Iterator[str]:
    """Yield the images below a folder as they come."""
    folders: list[str] = [folder]
    while folders:
        current = folders.pop()
        for text in _list(current, rules):
            if text.endswith("/"):
                folders.append(os.path.join(current, text[:-1]))
            elif text:
                yield text


def _images(folder: str, prefix: str, rules: Rules) -> Iterator[tuple[str, str]]:
    """Yield the name and stamp of every image below a folder, sorted by name.

    Folders are sorted as `name/`, so that whole names come out in order without being in memory all at once. The sort
    key is one string per entry, `name NUL stamp`, because a NUL sorts before every character that can follow in a name.
    """
    for text in sorted(filter(None, _list(folder, rules))):
        name, _, stamp = text.partition("\0")
        if stamp:
            yield prefix + name, stamp
        else:
            yield from _images(os.path.join(folder, name[:-1]), prefix + name, rules)


def _list(folder: str, rules: Rules) -> Iterable[str]:
    try:
        listing = os.scandir(folder)
    except OSError as error:  # such as no permission
        rules.note_folder(folder, error)
        return
    with listing:
        yield from map(rules.list_entry, listing)


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"
