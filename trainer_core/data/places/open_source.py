"""Open what the field `folder` of a dataset names: a folder, archives in a folder, a store, or a table of addresses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...errors import UserError, quoted
from ...host import Host
from ...registry import load, names
from ...storage.allowed_urls import VARIABLE, is_allowed, is_url, named_hosts
from ...storage.atomic import sha256_text
from ..source.backend import Backend, Entry
from ..source.folder import FolderBackend, no_images
from .archive_backend import PARQUET, TAR, Archive, ParquetBackend, TarBackend
from .byte_cache import FOLDER, ByteCache, cache_bytes
from .store_backend import StoreBackend
from .stores.store import Store, store_fault
from .stores.store_files import StoreFiles

OTHER = "fsspec"  # the store for every other kind of address
TABLES = "place-tables"  # folder in the cache for tables of captions that lie in a store


def open_source(root: str, host: Host) -> Backend:
    """Return the images of a dataset.

    Args:
        root: See Paths.find_source.
        host: Its cache folder holds what is downloaded; it says which addresses are allowed.
    Raises:
        UserError: The place can't be used.
    """
    if not is_url(root):
        return _open_path(Path(root), host)
    if not is_allowed(root, host.paths.allowed_urls):
        raise UserError.at("folder", f"{root!r} is not allowed; use --allow-url {root}, or set {VARIABLE}")
    files = StoreFiles(_open_store(root, host), _cache(host), host.check_cancelled)
    return StoreSource(files, host.paths.cache / TABLES / sha256_text(root)[:16])


def is_remote(root: str) -> bool:
    """Return whether reading this place takes a network, so that a quick check leaves it out."""
    return is_url(root) or os.path.isfile(root)


def describe_empty(folder: str, root: str, backend: Backend) -> str:
    """Return the message about a place without images.

    Args:
        folder: As the user wrote it.
        root: See open_source.
        backend: The place.
    """
    if isinstance(backend, FolderBackend):
        return no_images(folder, FolderBackend(Path(root)))
    reasons = [f"{path}: {reason}" for path, reason in backend.left_out.unreadable[:3]]
    return f"no images in {quoted(folder)}{f' (left out: {chr(59).join(reasons)})' if reasons else ''}"


def _cache(host: Host) -> ByteCache:
    return ByteCache(host.paths.cache / FOLDER, cache_bytes())


def _open_path(path: Path, host: Host) -> Backend:
    if path.is_file():
        from .url_table import UrlTableBackend  # here, because checks of a workflow do without urllib

        return UrlTableBackend(path, _cache(host), host.paths.allowed_urls, host.check_cancelled)
    suffix, files = _archives_in(path)
    archives = [Archive(file.relative_to(path).as_posix(), _stamp(file), partial(Path, file)) for file in files]
    if suffix == TAR:
        return TarBackend(str(path), archives)
    return ParquetBackend(str(path), archives, _cache(host)) if archives else FolderBackend(path)


def _archives_in(folder: Path) -> tuple[str, list[Path]]:
    """Return the archives of a folder without images, and their ending. A folder with images is not searched through."""
    if FolderBackend(folder).has_images():
        return "", []
    for suffix in (TAR, PARQUET):
        paths = (path for path in folder.rglob(f"*{suffix}") if path.is_file() and not path.name.startswith("."))
        if files := sorted(paths):
            return suffix, files
    return "", []


def has_archives(folder: Path) -> bool:
    """Return whether a folder has no images, but archives, which are read then."""
    return bool(_archives_in(folder)[1])


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _open_store(url: str, host: Host) -> Store:
    scheme, hosts = url.partition("://")[0], named_hosts(host.paths.allowed_urls)
    if scheme in ("http", "https"):
        reason = "a web server has no list of its files"
        raise store_fault(url, reason, "use a table with the addresses of the images as folder (docs/datasets.md)")
    return load("store", scheme if scheme in names("store") else OTHER)(url, hosts)


class StoreSource(StoreBackend):
    """A store, with image files or, if it has none, with archives.

    Args:
        files: Its files.
        tables: See StoreBackend.
    """

    def __init__(self, files: StoreFiles, tables: Path):
        super().__init__(files, tables)
        self._archive: TarBackend | ParquetBackend | None = None

    def entries(self) -> Sequence[Entry]:
        images = super().entries()
        self._archive = None if images else self._open_archives()
        if self._archive is None:
            return images
        entries = self._archive.entries()
        self.has_rows, self.left_out = self._archive.has_rows, self._archive.left_out
        self.encodings = self._archive.encodings
        return entries

    def _open_archives(self) -> TarBackend | ParquetBackend | None:
        place = self._files.store.place
        for suffix in (TAR, PARQUET):
            files = [file for file in self._by_name.values() if file.name.lower().endswith(suffix)]
            archives = [
                Archive(file.name, f"{file.size}-{file.stamp}", partial(self._files.fetch, file)) for file in files
            ]
            if archives:
                return (
                    TarBackend(place, archives) if suffix == TAR else ParquetBackend(place, archives, self._files.cache)
                )
        return None

    def read(self, name: str) -> bytes:
        return self._archive.read(name) if self._archive else super().read(name)

    def caption_text(self, name: str) -> tuple[str | None, str]:
        return self._archive.caption_text(name) if self._archive else super().caption_text(name)

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        return self._archive.file_beside(name, suffix) if self._archive else super().file_beside(name, suffix)
