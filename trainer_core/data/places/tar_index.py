"""The members of tar archives, as WebDataset writes them: 0001.jpg, 0001.txt, 0001.json, 0002.jpg ..."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_MEMBERS = 10_000_000


@dataclass(frozen=True)
class TarMember:
    """A file in an archive.

    Attributes:
        name: Its name.
        offset: Where its bytes begin in the archive.
        size: In bytes.
        fault: Why it can't be read; "" if it can.
    """

    name: str
    offset: int = 0
    size: int = 0
    fault: str = ""


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the regular files of an archive, in order. Only headers are read, so it takes a read for each member.

    An archive that is damaged or cut off ends with a member without a name, whose fault says so.

    Raises:
        OSError: The archive can't be read.
    """
    count, size, last = 0, path.stat().st_size, -1
    try:
        with tarfile.open(path, "r:") as archive:
            while member := archive.next():
                count += 1
                # They are collected otherwise: a million of them take 1 GB.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.offset <= last or member.size < 0:
                    raise tarfile.TarError("a header points backwards")
                last = member.offset
                if count > MAX_MEMBERS:
                    yield TarMember("", fault=f"it has more than {MAX_MEMBERS:,} members; the rest is not read")
                    return
                if not member.isreg() and not member.isdir():
                    kind = "a link" if member.issym() or member.islnk() else "no regular file"
                    yield TarMember(member.name, fault=f"it is {kind} in the archive")
                elif member.issparse():
                    yield TarMember(member.name, fault="it is a sparse file in the archive")
                elif member.isreg() and member.offset_data + member.size > size:
                    yield TarMember(member.name, fault="the archive is cut off in the middle of it")
                elif member.isreg():
                    yield TarMember(member.name, member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:  # tarfile checks no sizes
        yield TarMember("", fault=f"the archive is damaged or cut off after {count} members ({error}), or compressed")
