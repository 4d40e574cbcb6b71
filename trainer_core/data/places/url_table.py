"""A dataset backend for a table with the addresses of images."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import UserError, printable
from ...storage.allowed_urls import is_allowed, is_url, named_hosts, normal_url
from ...storage.atomic import sha256_text
from ..source.backend import Entry, LeftOut, printable_name
from ..source.file_list import Entries
from ..source.formats import readable_suffixes
from ..tables.table_files import BadTable, Values, table_rows
from .archive_backend import Texts
from .byte_cache import ByteCache
from .image_rows import row_json
from .stores.http_client import Client, copy_body
from .stores.retry import ADVICE, with_retries
from .stores.store import Missing, Temporary
from .stores.store_files import LARGEST_FILE

URL_COLUMNS = ("url", "image_url", "img_url", "URL", "uri", "link", "image", "file", "file_name", "path")
MOST_FAILURES = 8  # images in a row that can't be had before other servers are asked whether the network is down
MOST_PROBES = 3  # of those other servers


class UrlTableBackend:
    """The images whose addresses are in a table. Captions are in its other columns.

    Args:
        path: The table.
        cache: Where images are stored. An address is downloaded once.
        allowed: Addresses that the user has allowed.
        check_cancelled: Raises if the user canceled.
    """

    def __init__(self, path: Path, cache: ByteCache, allowed: Sequence[str], check_cancelled: Callable[[], None]):
        self.has_rows = True
        self.left_out = LeftOut()
        self.encodings: Counter[str] = Counter()
        self._path, self._cache, self._allowed, self._check_cancelled = path, cache, allowed, check_cancelled
        self._client = Client(named_hosts(allowed))
        self._urls: dict[str, str] = {}
        self._texts = Texts()
        self._lock, self._failures = threading.Lock(), 0

    def entries(self) -> Sequence[Entry]:
        self.left_out, self._urls, self._texts = LeftOut(), {}, Texts()
        column = ""
        try:
            for number, values in table_rows(self._path):
                column = column or self._column_of(values)
                self._add(number, values, column)
        except BadTable as error:
            raise UserError.at("folder", f"{printable(self._path.name)} {error}") from error
        return Entries((name, sha256_text(url)[:16]) for name, url in sorted(self._urls.items()))

    def _column_of(self, values: Values) -> str:
        column = next((name for name in URL_COLUMNS if is_url(str(values.get(name) or ""))), "")
        if not column:
            names = ", ".join(map(repr, list(values)[:20]))
            raise UserError.at(
                "folder", f"{printable(self._path.name)} has no column with addresses ({names}); name it url"
            )
        return column

    def _add(self, number: int, values: Values, column: str) -> None:
        text = str(values.get(column) or "").strip()
        location = f"{self._path.name}, row {number}: {printable(text[:200])}"
        fault, url = self._fault_of(text)
        name = _name_of(url) if not fault else ""
        if not fault and name in self._urls:
            fault = "another row has the same address"
        if fault:
            self.left_out.add_unreadable(location, fault)
            return
        self._urls[name] = url
        self._texts.add(name, row_json({key: value for key, value in values.items() if key != column}))

    def _fault_of(self, text: str) -> tuple[str, str]:
        """Return why an address is not used, "" if it is, and its normal form."""
        try:
            url = normal_url(text) if is_url(text) else ""
        except ValueError as error:
            return f"the address {error}", ""
        if not url.startswith(("http://", "https://")):
            return "it is not the address of a web server (https://)", ""
        if not is_allowed(url, self._allowed):
            host = "{0.scheme}://{0.netloc}".format(urlsplit(url))
            return f"the address is not allowed; add --allow-url {host}", ""
        return "", url

    def read(self, name: str) -> bytes:
        url = self._urls[name]
        path = self._cache.path("url", url)
        raw = self._cache.read(path)
        if raw is None:
            raw = self._download(url)
            self._cache.write(path, raw)
        return raw

    def _download(self, url: str) -> bytes:
        """Return an image. An address that fails is one image less; if no server answers any more, the run ends."""

        def fetch() -> bytes:
            body = io.BytesIO()
            with self._client.open(url, {"Accept": "image/*,*/*;q=0.5"}) as response:
                kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                if kind in ("text/html", "application/xhtml+xml"):
                    raise Missing("the server sent a web page in place of an image")
                copy_body(response, body, LARGEST_FILE)
            return body.getvalue()

        try:
            raw = with_retries(url, fetch, self._check_cancelled)
        except UserError as error:
            reason = error.problems[0].message
            if self._count_failure() >= MOST_FAILURES and not self._answers_elsewhere(url):
                text = f"{MOST_FAILURES} images in a row could not be downloaded, the last one {reason}"
                raise UserError.at("folder", text) from error
            raise Missing(reason.removesuffix(f"; {ADVICE}")) from error
        with self._lock:
            self._failures = 0
        return raw

    def _answers_elsewhere(self, url: str) -> bool:
        """Return whether another server of the table answers: then only that of this address is away."""
        others: dict[str, str] = {}
        for other in self._urls.values():
            others.setdefault(urlsplit(other).netloc, other)
        others.pop(urlsplit(url).netloc, None)
        for other in list(others.values())[:MOST_PROBES]:
            self._check_cancelled()
            try:
                with self._client.open(other, {}):
                    pass
            except Temporary:
                continue
            except Missing:  # an answer too
                pass
            with self._lock:
                self._failures = 0
            return True
        return False

    def _count_failure(self) -> int:
        with self._lock:
            self._failures += 1
            return self._failures

    def caption_text(self, name: str) -> tuple[str | None, str]:
        return None, ""  # it is in the row

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        return self._texts.get(name) if suffix == ".json" else None

    def path(self, name: str) -> str:
        return printable_name(self._urls.get(name, name))


def _name_of(url: str) -> str:
    """Return the name of an image: its address without the scheme, and with a digest of its query."""
    parts = urlsplit(url)
    folder, _, file = f"{parts.netloc}{parts.path}".replace("\0", "").rpartition("/")
    base, dot, ending = file.rpartition(".")
    if not dot or f".{ending.lower()}" not in readable_suffixes():
        base, dot, ending = file, "", ""
    query = f"-{sha256_text(parts.query)[:8]}" if parts.query else ""
    return f"{folder}/{base}{query}{dot}{ending}"
