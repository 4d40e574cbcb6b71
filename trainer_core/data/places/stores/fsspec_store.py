"""Any other store for which fsspec has a package: Google Cloud (gs://), Azure (az://), SFTP, SMB, WebDAV."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from ....errors import UserError, reason_of
from .store import Missing, StoredFile, Temporary, store_fault

CHUNK_BYTES = 1 << 20
STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "checksum",
    "generation",
    "last_modified",
    "LastModified",
    "mtime",
    "updated",
    "created",
)
ADVICE = "check the address, and the keys that its package reads from the environment"


class FsspecStore:
    """The files below an address.

    Args:
        url: The address.
        hosts: Not used: the package of the store makes the connections.
    Raises:
        UserError: There is no package for it.
    """

    def __init__(self, url: str, hosts: frozenset[str] = frozenset()):
        self.place = url
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(url)
        except ImportError as error:
            reason = f"it needs a package ({reason_of(error)})"
            raise store_fault(
                url, reason, 'run pip install "chroma-trainer[stores]" and the package of that store'
            ) from error
        except ValueError as error:  # an unknown scheme
            raise UserError.at("folder", f"{url!r} is no address that fsspec knows: {reason_of(error)}") from error
        except Exception as error:  # keys that are missing: every package has errors of its own
            raise store_fault(url, reason_of(error), ADVICE) from error

    def page(self, token: str) -> tuple[list[StoredFile], str]:
        with self._as_our_errors():
            self._system.invalidate_cache()
            details: dict[str, dict[str, Any]] = self._system.find(self._root, detail=True)
        return [self._file_of(path, item) for path, item in details.items() if item.get("type", "file") == "file"], ""

    def _file_of(self, path: str, details: dict[str, Any]) -> StoredFile:
        prefix = self._root.rstrip("/") + "/"
        stamp = next((str(details[name]) for name in STAMPS if details.get(name)), "")
        name = path[len(prefix) :] if path.startswith(prefix) else path.rpartition("/")[2]
        return StoredFile(name, int(details.get("size") or 0), hashlib.sha256(stamp.encode()).hexdigest()[:16])

    def download(self, file: StoredFile, target: IO[bytes], start: int) -> None:
        with self._as_our_errors(), self._system.open(f"{self._root.rstrip('/')}/{file.name}", "rb") as source:
            source.seek(start)
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)

    @contextmanager
    def _as_our_errors(self) -> Iterator[None]:
        """Turn the errors of the store's package into ours: it has many, so that most are tried again."""
        try:
            yield
        except FileNotFoundError as error:
            raise Missing(f"it is not there ({reason_of(error)})") from error
        except PermissionError as error:
            raise store_fault(self.place, reason_of(error), ADVICE) from error
        except (Missing, UserError):
            raise
        except Exception as error:
            raise Temporary(reason_of(error)) from error
