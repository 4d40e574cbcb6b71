"""Servers of stores on this machine, whose faults a test decides."""

from __future__ import annotations

import hashlib
import hmac
import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.data.dataset import Index, build_index
from chroma_trainer.trainer_core.data.places.stores import retry
from chroma_trainer.trainer_core.host import Paths, SinkHost
from PIL import Image

KEY, SECRET, REGION = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "eu-test-1"


def png(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A small image of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (seed * 37 % 256, seed * 59 % 256, seed * 83 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


class Service:
    """A web server with files. Subclasses say how they are listed.

    Attributes:
        files: Bytes by path.
        log: Method, path and headers of each request.
        fault: Called with the number of the request, from 1, and its path; returns a status to fail with, "cut" to
            close the connection after half of the body, or None.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, dict[str, str]]] = []
        self.fault: Callable[[int, str], int | str | None] = lambda number, path: None
        self._server: ThreadingHTTPServer | None = None
        self._lock = threading.Lock()
        self.port = 0

    def start(self) -> None:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                with service._lock:
                    service.log.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                    number = len(service.log)
                fault = service.fault(number, self.path)
                if isinstance(fault, int):
                    return self.reply(fault, b"<Error><Code>SlowDown</Code></Error>", {})
                status, body, headers = service.answer(self.path, service.log[number - 1][1])
                self.reply(status, body, headers, cut=fault == "cut")

            do_HEAD = do_GET

            def reply(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, target: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        path = unquote(urlsplit(target).path).lstrip("/")
        if path not in self.files:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        return self.send(self.files[path], headers)

    def send(self, raw: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        tag = {"ETag": f'"{hashlib.md5(raw).hexdigest()}"'}
        if start := headers.get("range", "").removeprefix("bytes=").rstrip("-"):
            return 206, raw[int(start) :], tag
        return 200, raw, tag

    def downloads(self, since: int = 0) -> list[str]:
        """The files that were asked for."""
        return [path for path, _ in self.log[since:] if "?" not in path]


class S3(Service):
    """As much of S3 as is used, with pages of 1,000 files and signatures that are checked."""

    page = 1000

    def answer(self, target: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if code := self.refuse(target, headers):
            return 403, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {}
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        if "list-type" not in query:
            return super().answer(target, headers)
        bucket = unquote(parts.path).strip("/")
        keys = sorted(path.partition("/")[2] for path in self.files if path.startswith(f"{bucket}/"))
        if not keys:
            return 404, b"<Error><Code>NoSuchBucket</Code></Error>", {}
        keys = [key for key in keys if key.startswith(query["prefix"])]
        start = int(query.get("continuation-token", "0"))
        page = keys[start : start + self.page]
        more = start + self.page < len(keys)
        entries = "".join(self.entry(key, self.files[f"{bucket}/{key}"]) for key in page)
        token = f"<NextContinuationToken>{start + self.page}</NextContinuationToken>" if more else ""
        text = f"{entries}<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return 200, f'<ListBucketResult xmlns="{namespace}">{text}</ListBucketResult>'.encode(), {}

    def entry(self, key: str, raw: bytes) -> str:
        tag = f"&quot;{hashlib.md5(raw).hexdigest()}&quot;"
        return f"<Contents><Key>{escape(key)}</Key><Size>{len(raw)}</Size><ETag>{tag}</ETag></Contents>"

    def refuse(self, target: str, headers: dict[str, str]) -> str:
        """The error code of a request whose signature is wrong, by the steps of AWS's documentation."""
        header = headers.get("authorization", "")
        if not header:
            return "AccessDenied"
        fields = dict(part.strip().split("=", 1) for part in header.removeprefix("AWS4-HMAC-SHA256 ").split(","))
        key, day, region, service, last = fields["Credential"].split("/")
        if key != KEY:
            return "InvalidAccessKeyId"
        path, _, query = target.partition("?")
        names = fields["SignedHeaders"].split(";")
        lines = [f"{name}:{headers[name].strip()}" for name in names]
        pairs = "&".join(
            f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
            for name, value in sorted(parse_qsl(query, keep_blank_values=True))
        )
        canonical = "\n".join(["GET", path, pairs, *lines, "", ";".join(names), headers["x-amz-content-sha256"]])
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{day}/{region}/{service}/{last}\n{digest}"
        secret = f"AWS4{SECRET}".encode()
        for part in (day, region, service, last):
            secret = hmac.digest(secret, part.encode(), "sha256")
        is_right = fields["Signature"] == hmac.new(secret, text.encode(), "sha256").hexdigest()
        return "" if is_right and {"host", "x-amz-date"} <= set(names) else "SignatureDoesNotMatch"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def web() -> Iterator[Service]:
    service = Service()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def s3(monkeypatch) -> Iterator[S3]:
    """A bucket `pictures` with a folder `cats`, whose keys are in the environment."""
    service = S3()
    for number in range(6):
        service.files[f"pictures/cats/{number}.png"] = png(number)
        service.files[f"pictures/cats/{number}.txt"] = f"cat {number}".encode()
    service.start()
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    yield service
    service.stop()


@pytest.fixture
def host(tmp_path) -> Callable[..., SinkHost]:
    def make(*urls: str) -> SinkHost:
        paths = Paths(output=tmp_path / "out", cache=tmp_path / "cache", datasets=(tmp_path,), urls=urls)
        return SinkHost(paths=paths, device="cpu")

    return make


def index_of(host: SinkHost, root: str | Path, table: str = "", **fields: Any) -> Index:
    part = FolderConfig(folder="cats", **{"resolution": 64, **fields})
    return build_index(DatasetConfig(parts=(part,), roots=(str(root),), tables=(table,)), host, 0)


def captions(index: Index) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in index.samples}
