"""Addresses of stores: which ones a user has allowed, and which a workflow may not name.

A workflow may come from a stranger. It must not read the user's private buckets or the machines of the user's network,
so it can only name what the user has allowed, with --allow-url or CHROMA_TRAINER_URLS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote, urlsplit

VARIABLE = "CHROMA_TRAINER_URLS"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PORTS = {"http": 80, "https": 443}
# Other names for files of this machine, and addresses that contain addresses: the folders of datasets are the way to them.
LOCAL_SCHEMES = frozenset(
    {"file", "local", "dir", "reference", "filecache", "simplecache", "blockcache", "cached", "data"}
)


def is_url(text: str) -> bool:
    """Return whether a text is an address rather than a path. `C:/cats` is a path."""
    return bool(URL.match(text.strip()))


def normal_url(text: str) -> str:
    """Return an address in its normal form: scheme and host in lower case, no slash at the end.

    Raises:
        ValueError: It can't be the address of a dataset. str() is the reason.
    """
    url = text.strip()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a valid address ({error})") from error
    scheme = parts.scheme.lower()
    if "::" in url.replace("://", "", 1).partition("[")[0] or scheme in LOCAL_SCHEMES:
        raise ValueError("names files of this machine, or an address within an address; enter a folder's path instead")
    if parts.username is not None or parts.password is not None:
        raise ValueError("contains a user name or password; set them in the environment, because a workflow is shared")
    if any(ord(letter) < 33 for letter in url):
        raise ValueError("contains spaces or control characters")
    if {".", ".."} & set(re.split(r"[/\\]", unquote(parts.path))):  # servers decode %2e%2e before they resolve it
        raise ValueError("contains . or .. as a folder; write the address without them")
    if scheme not in PORTS and (parts.query or parts.fragment or "?" in url or "#" in url):
        raise ValueError("contains ? or #, which addresses of stores do not have")
    netloc = parts.netloc
    if scheme in PORTS:
        name = (parts.hostname or "").rstrip(".")
        netloc = (f"[{name}]" if ":" in name else name) + (f":{port}" if port and port != PORTS[scheme] else "")
    path = parts.path.rstrip("/")
    if scheme == "hf" and netloc == "datasets":  # as the Hub's own file system writes it
        netloc, _, path = path.lstrip("/").partition("/")
        path = f"/{path}" if path else ""
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{netloc}{path}{query}"


def environment_urls() -> list[str]:
    """Return the addresses in the environment variable, separated by spaces or commas."""
    return [part for part in re.split(r"[\s,]+", os.environ.get(VARIABLE, "")) if part]


def is_allowed(url: str, allowed: Iterable[str]) -> bool:
    """Return whether an address, in its normal form, is one of the allowed ones or below one.

    Args:
        url: Such as s3://bucket/cats.
        allowed: Such as s3://bucket, https://example.com/images/ or, for everything of a kind, hf://.
    """
    return any(_is_below(url, entry) for entry in allowed)


def _is_below(url: str, entry: str) -> bool:
    if not is_url(entry):
        return False
    try:
        top = normal_url(entry)
    except ValueError:
        return False
    if top.endswith("://"):  # everything of a kind
        return url.startswith(top)
    return url == top or url.startswith((f"{top}/", f"{top}?", f"{top}@"))  # hf://user/name@revision


def named_hosts(allowed: Iterable[str]) -> frozenset[str]:
    """Return the hosts that the user has named: only those may be on this machine or in its network."""
    return frozenset(host for entry in allowed if is_url(entry) and (host := urlsplit(entry.strip()).hostname))


def check_entries(entries: Sequence[str]) -> list[str]:
    """Return what is wrong with the addresses that a user allows, one line each."""
    faults = []
    for entry in entries:
        try:
            fault = (
                ""
                if is_url(entry) and normal_url(entry)
                else "is not an address, such as s3://bucket or hf://user/name"
            )
        except ValueError as error:
            fault = str(error)
        faults += [f"{entry[:80]!r} {fault}"] if fault else []
    return faults
