"""Requests to web servers that a workflow names: only to public addresses, unless the user has named the host.

The address is checked where the connection is made, so that neither a redirect nor a name that points into the local
network leads there.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from ....errors import reason_of
from ....version import VERSION
from .store import Changed, Missing, Temporary

TIMEOUT_SECONDS = 60.0
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which another try may succeed
SENT = "%/:?@!$&'()*+,;=-._~[]|"  # characters of an address that are sent as they are
NAT64 = ipaddress.ip_network("64:ff9b::/96")
KEPT_SECRETS = ("authorization", "cookie", "x-amz-security-token")  # headers that another host must not get


class Refused(Missing):
    """An address is in the local network, and the user has not named it."""


class Client:
    """Sends requests.

    Args:
        hosts: Hosts that the user has named, which may be anywhere.
        redirects: Follow redirects. A signed request can't be redirected.
    """

    def __init__(self, hosts: Iterable[str], redirects: bool = True):
        proxies = (
            urlsplit(url if "://" in url else f"//{url}").hostname for url in urllib.request.getproxies().values()
        )
        self.hosts = frozenset(hosts) | {host for host in proxies if host}
        self._opener = urllib.request.build_opener(
            _Http(self.hosts), _Https(self.hosts), _Redirects() if redirects else _NoRedirects()
        )

    @contextmanager
    def open(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Open an address for reading. The response has a status below 400.

        Raises:
            Temporary: Try again.
            Missing: The server refuses, or the address can't be reached by right. See Status for its answer.
        """
        request = urllib.request.Request(_as_ascii(url), headers={"User-Agent": f"chroma-trainer/{VERSION}", **headers})
        with _as_our_errors(), self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            yield response


def _as_ascii(url: str) -> str:
    """Return an address as it is sent: other characters than those of ASCII are encoded.

    Raises:
        Missing: The name of its host can't be encoded.
    """
    parts = urlsplit(url)
    try:
        host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    except UnicodeError as error:
        raise Missing("the name of its host is not valid") from error
    return urlunsplit((parts.scheme, host, quote(parts.path, SENT), quote(parts.query, SENT), ""))


class Status(Missing):
    """The answer of a server that is no success.

    Attributes:
        status: HTTP status.
        headers: Of the answer.
        body: The first bytes of the answer.
    """

    def __init__(self, status: int, reason: str, headers: Any, body: bytes):
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status, self.headers, self.body = status, headers, body


@contextmanager
def _as_our_errors() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        body = b"" if error.fp is None else error.read(CHUNK_BYTES)
        if error.code in TEMPORARY:
            raise Temporary(f"HTTP {error.code} {error.reason}", _seconds(error.headers.get("Retry-After"))) from error
        raise Status(error.code, " ".join(str(error.reason).split()), error.headers, body) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, Refused):
            raise error.reason from error
        raise Temporary(_describe(error.reason)) from error
    except (Missing, Temporary, Changed):
        raise
    except (OSError, http.client.HTTPException) as error:  # such as a connection that is reset in the middle
        raise Temporary(_describe(error)) from error


def _describe(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "the server does not answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was closed in the middle"
    return reason_of(error) if isinstance(error, Exception) else str(error)


def _seconds(text: str | None) -> float:
    """Return the seconds of a header Retry-After, which is a number or a date; 0 if it is neither."""
    if not text:
        return 0.0
    if text.strip().isdigit():
        return float(text.strip()[:6])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def copy_body(response: http.client.HTTPResponse, target: IO[bytes], max_bytes: int) -> None:
    """Append the body of a response to a stream.

    Raises:
        Temporary: It ends too early.
        Missing: It is larger than the bound.
    """
    expected = response.headers.get("Content-Length", "")
    size = 0
    with _as_our_errors():
        while chunk := response.read(CHUNK_BYTES):
            size += len(chunk)
            if size > max_bytes:
                raise Missing(f"it has more than {max_bytes >> 20} MiB")
            target.write(chunk)
    if expected.isdigit() and size < int(expected):
        raise Temporary("the connection was closed in the middle")


def copy_from(
    client: Client, url: str, headers: Mapping[str, str], target: IO[bytes], start: int, size: int, etag: str = ""
) -> None:
    """Append the bytes of a file from `start` on to a stream.

    Args:
        client: Sends the request.
        url: Of the file.
        headers: Of the request.
        target: Receives the bytes.
        start: Number of bytes that are there.
        size: Of the whole file.
        etag: What the server must still call the file; "" if that is not known.
    Raises:
        Changed: The file was replaced, or the server does not continue downloads.
    """
    part = {"Range": f"bytes={start}-"} if start else {}
    with client.open(url, {**headers, **part}) as response:
        if start and response.status != http.client.PARTIAL_CONTENT:
            raise Changed
        answer = response.headers.get("ETag", "").removeprefix("W/").strip('"')
        if etag and answer and answer != etag:
            raise Changed
        copy_body(response, target, size - start)


def check_address(host: str, address: str, named: Iterable[str]) -> None:
    """Check that a connection may be used.

    Args:
        host: Name by which it was opened.
        address: Of the other side.
        named: Hosts that the user has named.
    Raises:
        Refused: The address is in the local network.
    """
    if host.lower().strip("[]") in named:
        return
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    if not ip.is_global or ip.is_multicast:
        text = f"{host} is {ip}, an address of this machine or its network, which only the user may name"
        raise Refused(f"{text}; allow it with --allow-url, by its name")


def _connect(connection: http.client.HTTPConnection, named: frozenset[str]) -> Any:
    """Return a function in place of socket.create_connection that checks who answers, before anything is sent."""

    def create(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        sock = socket.create_connection(address, *arguments, **options)
        try:
            check_address(address[0], sock.getpeername()[0], named)
        except BaseException:
            sock.close()
            raise
        return sock

    return create


def _checked(kind: type, named: frozenset[str]) -> Any:
    def make(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
        connection = kind(*arguments, **options)
        connection._create_connection = _connect(connection, named)
        return connection

    return make


class _Http(urllib.request.HTTPHandler):
    def __init__(self, named: frozenset[str]):
        super().__init__()
        self._named = named

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_checked(http.client.HTTPConnection, self._named), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, named: frozenset[str]):
        super().__init__()
        self._named = named

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_checked(http.client.HTTPSConnection, self._named), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to web addresses only, never from https to http, and without secrets to another host."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise Missing(f"it redirects to {new.scheme}://, which is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            for header in [name for name in request.headers if name.lower() in KEPT_SECRETS]:
                request.remove_header(header)
        return request


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        return None  # an HTTPError, with the status of the redirect


def proxy_free_host(url: str) -> str:
    """Return the host of an address that stands in the environment, and that the user has thereby named."""
    return (urlsplit(url).hostname or "") if url else ""


def environment(*names: str) -> str:
    """Return the first of these environment variables that is set; "" if none is."""
    return next((value.strip() for name in names if (value := os.environ.get(name, "").strip())), "")
