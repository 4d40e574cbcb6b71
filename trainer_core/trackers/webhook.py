"""Send messages about a run to a web address: JSON of our events, or the form of Discord or Slack.

The address is read from the environment variable CHROMA_TRAINER_WEBHOOK only. It is a secret: whoever knows it can
post. So it is in no workflow, no file and no message.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..host import (
    CheckpointSaved,
    EvalCompared,
    EvalReport,
    Event,
    ImagesScored,
    LeakMeasured,
    LoraSaved,
    Notice,
    PreviewReady,
    StepReport,
    event_kind,
)
from ..storage.stored_names import stored_values
from ..version import VERSION
from .tracker import Opening

ADDRESS, FORM = "CHROMA_TRAINER_WEBHOOK", "CHROMA_TRAINER_WEBHOOK_FORM"
FORMS = ("raw", "discord", "slack")
SENT = (
    StepReport, EvalReport, EvalCompared, LeakMeasured, ImagesScored, PreviewReady, CheckpointSaved, LoraSaved, Notice,
)  # fmt: skip
STEP_SECONDS = 30.0  # between two messages about steps, and only in the raw form
TIMEOUT_SECONDS = 20.0
TRIES, WAIT_SECONDS = 3, (1.0, 4.0)  # of a message, and before the second and the third try
LONGEST_WAIT = 30.0  # seconds that a server may ask for
REST_SECONDS = 60.0  # after a message that could not be sent: until then only important ones are tried
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which another try may succeed
LONGEST_TEXT = 1800  # characters: Discord takes 2000
LARGEST_EDGE, QUALITY = 2048, 85  # of an image that is sent


class Webhook:
    """A tracker that posts messages.

    Args:
        opening: the run.
        log: shows a line of text to the user.
        sleep: waits for some seconds.
    """

    def __init__(self, opening: Opening, log: Callable[[str], None], sleep: Callable[[float], None] = time.sleep):
        self._address, self._form = os.environ.get(ADDRESS, "").strip(), form_of(os.environ)
        self._opening, self._log, self._sleep = opening, log, sleep
        self._step_due = self._rest_until = 0.0
        self._warned = False
        self._held_out: EvalReport | None = None
        log(f"webhook: messages are sent in the form {self._form}")
        how = f"resumes from step {opening.step}" if opening.step else "starts"
        self._send({"kind": "RunStarted", "step": opening.step, "settings": opening.settings}, f"training {how}")

    @staticmethod
    def missing() -> str:
        address = os.environ.get(ADDRESS, "").strip()
        if not address:
            return f"webhook has no address; set the environment variable {ADDRESS} to it (never in a workflow)"
        try:
            parts = urlsplit(address)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_usable = False
        if not is_usable or any(ord(letter) <= 32 or ord(letter) > 126 for letter in address):
            return f"{ADDRESS} is not a web address; it must begin with https:// (or http://)"
        if os.environ.get(FORM, "raw") not in FORMS:
            return f"{FORM} is {os.environ[FORM][:40]!r}; use {', '.join(FORMS)}, or leave it unset"
        return ""

    def event(self, event: Event) -> None:
        """Send an event, if it is one that is sent in this form."""
        if not isinstance(event, SENT):
            return
        if isinstance(event, StepReport) and not self._takes_step(event):
            return
        if isinstance(event, Notice) and event.level != "warning":
            return
        value = {"kind": event_kind(event), **_values(event, self._opening.folder)}
        image = _jpeg(event.path) if isinstance(event, PreviewReady) else None
        self._send(value, self._text(event), image, is_important=not isinstance(event, StepReport))

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Send nothing: the events say it."""

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """Send nothing: the event says it."""

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        """Send nothing: the result is in report.json."""

    def close(self, failed: bool) -> None:
        self._send({"kind": "RunEnded", "failed": failed}, "training failed" if failed else "training has ended")

    def _takes_step(self, event: StepReport) -> bool:
        now = time.monotonic()
        if self._form != "raw" or (now < self._step_due and event.step < event.total):
            return False
        self._step_due = now + STEP_SECONDS
        return True

    def _text(self, event: Event) -> str:
        """Return an event as a line for people; "" for one that they are not told."""
        if isinstance(event, EvalReport):
            self._held_out = event if event.held_out else None
            if event.held_out and event.step:
                return ""  # the comparison follows
            return f"step {event.step}: {'held-out loss' if event.held_out else 'loss'} {event.loss:.4f}"
        if isinstance(event, EvalCompared):
            if self._held_out is None or self._held_out.step != event.step:
                return ""
            since = f", {event.change:+.4f} ± {event.change_error:.4f} since step {event.best}" if event.waiting else ""
            return f"step {event.step}: held-out loss {self._held_out.loss:.4f}{since}"
        if isinstance(event, PreviewReady):
            return f"step {event.step}: validation images" if event.step else "validation images before training"
        if isinstance(event, ImagesScored):
            return f"step {event.step}: CLIP score {event.clip:.2f} ± {event.clip_error:.2f}" if event.is_shown else ""
        if isinstance(event, LoraSaved):
            return f"{event.what} {event.path.name} is saved"
        return f"warning: {event.text}" if isinstance(event, Notice) else ""

    def _send(self, value: Mapping[str, Any], text: str, image: bytes | None = None, is_important: bool = True) -> None:
        """Post one message. One that can't be sent is dropped: that is reported once.

        Raises:
            Refused: the server will not take any message.
        """
        if self._form != "raw" and not text:
            return
        if not is_important and time.monotonic() < self._rest_until:
            return
        name = self._opening.folder.name
        kind, body = body_of(self._form, {"run": name, **value}, f"{name}: {text}", image)
        try:
            post(self._address, kind, body, self._sleep)
        except Unreachable as error:
            self._rest_until = time.monotonic() + REST_SECONDS
            if not self._warned:
                self._warned = True
                self._log(f"webhook: {error}; this message is dropped, later ones are tried")


class Refused(Exception):
    """The server refuses every message: an unknown address, or no permission."""


class Unreachable(Exception):
    """A message could not be sent, and a later one may be."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A POST that is redirected would lose its body, or bring it elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def form_of(environment: Mapping[str, str]) -> str:
    """Return the form of the messages: as asked for, else that of the address."""
    if environment.get(FORM) in FORMS:
        return environment[FORM]
    host = (urlsplit(environment.get(ADDRESS, "").strip()).hostname or "").lower()
    services = {"discord": ("discord.com", "discordapp.com"), "slack": ("hooks.slack.com",)}
    for form, names in services.items():
        if any(host == name or host.endswith(f".{name}") for name in names):
            return form
    return "raw"


def body_of(form: str, value: Mapping[str, Any], text: str, image: bytes | None) -> tuple[str, bytes]:
    """Return the content type and the body of a message."""
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
    if form == "slack":  # an incoming webhook of Slack takes no files
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return "application/json", _json({"text": escaped})
    if form == "discord":
        message = {"content": text, "allowed_mentions": {"parse": []}}  # a prompt may contain @everyone
        return _multipart(message, image) if image else ("application/json", _json(message))
    picture = {"image": {"type": "image/jpeg", "base64": base64.b64encode(image).decode()}} if image else {}
    return "application/json", _json({**value, **picture, "time": round(time.time(), 3)})


def post(address: str, kind: str, body: bytes, sleep: Callable[[float], None] = time.sleep) -> None:
    """Send a POST request, again where that may help.

    Raises:
        Refused: the server refuses it for good.
        Unreachable: no try succeeded. No message contains the address.
    """
    headers = {"Content-Type": kind, "User-Agent": f"chroma-trainer/{VERSION}"}
    opener = urllib.request.build_opener(_NoRedirects)
    reason = ""
    for number in range(TRIES):
        wait = WAIT_SECONDS[min(number, len(WAIT_SECONDS) - 1)]
        try:
            request = urllib.request.Request(address, body, headers, method="POST")
            with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                answer.read(1 << 16)
                return
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answered with HTTP status {error.code}"
            if error.code not in TEMPORARY:
                raise Refused(f"{reason}; check the address in {ADDRESS}") from None
            wait = _parse_retry_after(error.headers.get("Retry-After"), wait)
        except urllib.error.URLError as error:
            reason = f"the server can't be reached ({type(error.reason).__name__})"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"the server can't be reached ({type(error).__name__})"
        if number < TRIES - 1:
            sleep(wait)
    raise Unreachable(reason)


def _parse_retry_after(text: str | None, default: float) -> float:
    try:
        seconds = float(text or "")
    except ValueError:  # a date
        return default
    return min(seconds, LONGEST_WAIT) if 0 <= seconds < math.inf else default


def _values(event: Event, folder: Path) -> dict[str, Any]:
    """Return an event's fields as JSON values. Of a path only what lies in the run's folder, or its last component."""

    def portable(value: Any) -> Any:
        if isinstance(value, Path):
            return value.relative_to(folder).as_posix() if value.is_relative_to(folder) else value.name
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return [portable(item) for item in value] if isinstance(value, tuple) else value

    return {name: portable(value) for name, value in stored_values(event).items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()  # lone surrogates are escaped


def _jpeg(path: Path) -> bytes | None:
    """Return the pixels of an image as JPEG, without the workflow that its file contains; None if it can't be read."""
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except OSError:
        return None
    pixels.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _multipart(message: Mapping[str, Any], image: bytes) -> tuple[str, bytes]:
    """Return the content type and the body of a form with a JSON part and a file."""
    mark = uuid.uuid4().hex
    parts = (
        ('name="payload_json"', "application/json", _json(message)),
        ('name="files[0]"; filename="validation.jpg"', "image/jpeg", image),
    )
    body = b"".join(
        f"--{mark}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {kind}\r\n\r\n".encode() + data + b"\r\n"
        for name, kind, data in parts
    )
    return f"multipart/form-data; boundary={mark}", body + f"--{mark}--\r\n".encode()
