"""Stores that speak the protocol of Amazon S3: AWS, Cloudflare R2, Backblaze B2, MinIO, Ceph.

Requests are signed here (AWS Signature Version 4, docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html).
Keys come from the environment alone; without keys, requests are not signed, as public buckets want them.
"""

from __future__ import annotations

import hashlib
import hmac
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from .http_client import Client, Status, copy_body, copy_from, environment, proxy_free_host
from .store import Missing, StoredFile, Temporary, store_fault

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
MAX_LISTING = 32 << 20  # bytes of one page; a page has at most 1,000 files
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN)"


@dataclass(frozen=True)
class S3Settings:
    """How a store is reached, from the environment.

    Attributes:
        endpoint: Its address; "" for AWS.
        region: Such as eu-central-1.
        key: Access key; "" for none.
        secret: Secret key.
        token: Of a session; "" for none.
    """

    endpoint: str
    region: str
    key: str
    secret: str
    token: str

    @classmethod
    def of_environment(cls) -> S3Settings:
        """Read the variables that AWS's own tools read."""
        return cls(
            environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL").rstrip("/"),
            environment("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1",
            environment("AWS_ACCESS_KEY_ID"),
            environment("AWS_SECRET_ACCESS_KEY"),
            environment("AWS_SESSION_TOKEN"),
        )


class S3Store:
    """The files of a bucket below a prefix.

    Args:
        url: s3://bucket/prefix.
        hosts: Hosts that the user has named; that of the endpoint is one of them.
    """

    def __init__(self, url: str, hosts: frozenset[str]):
        self.place = url
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        self._settings = S3Settings.of_environment()
        self._client = Client({*hosts, proxy_free_host(self._settings.endpoint)} - {""}, redirects=False)

    def page(self, token: str) -> tuple[list[StoredFile], str]:
        query = {"list-type": "2", "prefix": self._prefix} | ({"continuation-token": token} if token else {})
        page = _parse(self._read(query), self.place)
        following = page.findtext("NextContinuationToken", "")
        if page.findtext("IsTruncated", "false") == "true" and following in ("", token):
            raise Temporary("the list of files has no continuation")
        files = [_file_of(item, self._prefix) for item in page.iter("Contents")]
        return [file for file in files if file], following

    def download(self, file: StoredFile, target: IO[bytes], start: int) -> None:
        def fetch() -> None:
            url = self._url(self._prefix + file.name)
            headers = signed_headers(self._settings, url, {"Range": f"bytes={start}-"} if start else {})
            copy_from(self._client, url, headers, target, start, file.size, file.stamp)

        self._ask(fetch)

    def _read(self, query: Mapping[str, str]) -> bytes:
        import io

        def fetch() -> bytes:
            url = f"{self._url('')}?{urlencode(sorted(query.items()), quote_via=quote, safe='-_.~')}"
            body = io.BytesIO()
            with self._client.open(url, signed_headers(self._settings, url, {})) as response:
                copy_body(response, body, MAX_LISTING)
            return body.getvalue()

        return self._ask(fetch)

    def _url(self, key: str) -> str:
        """Return the address of a file: below the endpoint, or at AWS below the host of the bucket."""
        path = quote(key, safe="/-_.~")
        settings = self._settings
        if settings.endpoint:
            return f"{settings.endpoint}/{self._bucket}/{path}"
        if "." in self._bucket:  # the certificate of AWS is not for names with dots
            return f"https://s3.{settings.region}.amazonaws.com/{self._bucket}/{path}"
        return f"https://{self._bucket}.s3.{settings.region}.amazonaws.com/{path}"

    def _ask(self, fetch: Callable[[], Any]) -> Any:
        """Send a request; once more if the bucket is in another region.

        Raises:
            UserError: The store refuses the user.
        """
        try:
            return fetch()
        except Status as error:
            region = error.headers.get("x-amz-bucket-region", "") or _text_of(error.body, "Region")
            if error.status in (301, 307, 400) and region and region != self._settings.region:
                self._settings = replace(self._settings, region=region)
                return fetch()
            raise self._fault(error) from error

    def _fault(self, error: Status) -> Exception:
        code, message = _text_of(error.body, "Code"), _text_of(error.body, "Message")
        reason = f"{error}{f' {code}' if code else ''}{f': {message}' if message else ''}"
        if error.status in (401, 403) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            how = "are read from the environment" if self._settings.key else "are not set in the environment"
            return store_fault(self.place, reason, f"{KEYS} {how}; check them, and the rights of that user")
        if code == "NoSuchBucket":
            return store_fault(self.place, reason, "check the name of the bucket and AWS_ENDPOINT_URL")
        return Missing(reason)


def _file_of(item: ElementTree.Element, prefix: str) -> StoredFile | None:
    """Return a file of a listing; None for a folder, as some programs write it."""
    key, size = item.findtext("Key", ""), item.findtext("Size", "0")
    if key.endswith("/") or not key.startswith(prefix):
        return None
    return StoredFile(key[len(prefix) :], int(size) if size.isdecimal() else 0, item.findtext("ETag", "").strip('"'))


def _parse(raw: bytes, place: str) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise store_fault(
            place, f"the list of files is not XML ({error})", "is AWS_ENDPOINT_URL an S3 store?"
        ) from error
    for element in root.iter():  # without their namespace, which some stores leave out
        element.tag = element.tag.rpartition("}")[2]
    return root


def _text_of(body: bytes, tag: str) -> str:
    """Return a text in an answer that may be XML."""
    try:
        return _parse(body, "").findtext(tag, "")[:200]
    except Exception:  # any other answer
        return ""


def signed_headers(
    settings: S3Settings, url: str, headers: Mapping[str, str], now: datetime | None = None
) -> dict[str, str]:
    """Return the headers of a GET request with its signature; unchanged without a key.

    Args:
        settings: Keys and region.
        url: With a query whose names are in order, and which is encoded as in `quote`.
        headers: Further headers, which are signed too.
        now: Time of the signature; None: now.
    """
    if not settings.key:
        return dict(headers)
    parts = urlsplit(url)
    time = (now or datetime.now(timezone.utc)).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{time[:8]}/{settings.region}/s3/aws4_request"
    session = {"x-amz-security-token": settings.token} if settings.token else {}
    values = {**headers, "x-amz-date": time, "x-amz-content-sha256": EMPTY_SHA256, **session}
    signed = sorted({**{name.lower(): text for name, text in values.items()}, "host": parts.netloc}.items())
    names = ";".join(name for name, _ in signed)
    request = "\n".join(
        (
            "GET",
            parts.path or "/",
            parts.query,
            *(f"{name}:{text.strip()}" for name, text in signed),
            "",
            names,
            EMPTY_SHA256,
        )
    )
    text = "\n".join(("AWS4-HMAC-SHA256", time, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{settings.secret}".encode()
    for part in (time[:8], settings.region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={settings.key}/{scope},SignedHeaders={names},Signature={signature}"
    return {**values, "Authorization": credential}
