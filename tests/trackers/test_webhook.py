"""The webhook: what arrives in each form, servers that fail in every way, and an address that stands in no file."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import (
    CheckpointSaved,
    EvalCompared,
    EvalReport,
    LoraSaved,
    Notice,
    PreviewReady,
    StepReport,
)
from chroma_trainer.trainer_core.trackers import webhook as module
from chroma_trainer.trainer_core.trackers.dispatch import TrackerSink
from chroma_trainer.trainer_core.trackers.tracker import Opening
from chroma_trainer.trainer_core.trackers.webhook import ADDRESS, FORM, Webhook, form_of
from chroma_trainer.trainer_core.train.run import run
from PIL import Image, PngImagePlugin

from tests.workshop import EVALUATED

SECRET = "token-of-the-webhook"
LOCAL_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


class Server(ThreadingHTTPServer):
    """Records what is posted. answers: HTTP statuses of the next requests, 204 after them."""

    daemon_threads = True

    def __init__(self):
        self.posts, self.answers, self.headers, self.waits = [], [], {}, threading.Event()
        self.waits.set()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api/{SECRET}"

    @property
    def messages(self) -> list[dict]:
        return [json.loads(body) for _, body in self.posts]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.waits.wait(20)
        status = self.server.answers.pop(0) if self.server.answers else 204
        if status < 300:
            self.server.posts.append((self.headers["Content-Type"], body))
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in LOCAL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv(ADDRESS, found.address)
    monkeypatch.delenv(FORM, raising=False)
    yield found
    found.waits.set()
    found.shutdown()
    found.server_close()


def picture(folder: Path) -> Path:
    """A validation image that contains the workflow, as ours do."""
    about = PngImagePlugin.PngInfo()
    about.add_text("prompt", "the workflow")
    path = folder / "validation" / "step-000002-64x64.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path, pnginfo=about)
    return path


def events_of(folder: Path) -> list:
    return [
        EvalReport(0, 0.6, 0.1, held_out=True),
        StepReport(1, 9, 0.5, 1e-4, 0.1, 0.2),
        StepReport(2, 9, float("nan"), 1e-4, 0.1, 0.2),
        EvalReport(2, 0.5, 0.1, held_out=True),
        EvalCompared(2, 0, -0.1, 0.01, 0.4, (0.5,), 0, (0.1,), (0.02,), 0, False),
        CheckpointSaved(2, folder / "checkpoints" / "step-000002"),
        PreviewReady(2, picture(folder)),
        Notice("of no importance"),
        Notice("<@everyone> & all", "warning"),
        LoraSaved(Path("/home/somebody/loras/cat.safetensors"), "ab", 7, 7),
    ]


def sent(folder: Path, sleeps: list | None = None) -> list[str]:
    """Send all kinds of events, and return what the user is told."""
    told: list[str] = []
    folder.mkdir(exist_ok=True)
    opening = Opening(folder, "cat", {"training": {"rank": 4}})
    webhook = Webhook(opening, told.append, (sleeps if sleeps is not None else []).append)
    for event in events_of(folder):
        webhook.event(event)
    webhook.close(False)
    return told


def test_raw_messages_are_our_events(server, tmp_path):
    told = sent(tmp_path / "cat-12345678")
    kinds = [message["kind"] for message in server.messages]
    assert kinds == [
        "RunStarted", "EvalReport", "StepReport", "EvalReport", "EvalCompared", "CheckpointSaved", "PreviewReady", "Notice",
        "LoraSaved", "RunEnded",
    ]  # fmt: skip
    assert {message["run"] for message in server.messages} == {"cat-12345678"}
    by_kind = dict(zip(kinds, server.messages, strict=True))
    assert by_kind["RunStarted"]["settings"] == {"training": {"rank": 4}}
    assert by_kind["CheckpointSaved"]["path"] == "checkpoints/step-000002"
    assert by_kind["LoraSaved"]["path"] == "cat.safetensors"  # nobody's folders
    assert by_kind["EvalCompared"]["gaps"] == [0.1]
    raw = base64.b64decode(by_kind["PreviewReady"]["image"]["base64"])
    assert b"the workflow" not in raw and Image.open(io.BytesIO(raw)).size == (64, 48)
    assert told == ["webhook: messages are sent in the form raw"]


def test_discord_gets_lines_and_the_grid(server, tmp_path, monkeypatch):
    monkeypatch.setenv(FORM, "discord")
    sent(tmp_path / "cat")
    kinds = [kind.partition(";")[0] for kind, _ in server.posts]
    (form,) = [i for i, kind in enumerate(kinds) if kind == "multipart/form-data"]
    head, body = server.posts[form]
    parts = message_from_bytes(f"Content-Type: {head}\r\n\r\n".encode() + body).get_payload()
    payload, file = (bytes(part.get_payload(decode=True)) for part in parts)  # type: ignore[union-attr, arg-type]
    assert json.loads(payload)["content"] == "cat: step 2: validation images"
    assert parts[1].get_filename() == "validation.jpg" and Image.open(io.BytesIO(file)).format == "JPEG"  # type: ignore[union-attr]
    others = [json.loads(body) for kind, body in server.posts if kind == "application/json"]
    assert all(message["allowed_mentions"] == {"parse": []} for message in others)
    assert [message["content"] for message in others] == [
        "cat: training starts", "cat: step 0: held-out loss 0.6000", "cat: step 2: held-out loss 0.5000",
        "cat: warning: <@everyone> & all", "cat: LoRA cat.safetensors is saved", "cat: training has ended",
    ]  # fmt: skip


def test_slack_gets_escaped_lines(server, tmp_path, monkeypatch):
    monkeypatch.setenv(FORM, "slack")
    sent(tmp_path / "cat")
    assert all(set(message) == {"text"} for message in server.messages)
    assert "cat: warning: &lt;@everyone&gt; &amp; all" in [message["text"] for message in server.messages]


@pytest.mark.parametrize(
    ("address", "form"),
    [
        ("https://discord.com/api/webhooks/1/x", "discord"), ("https://ptb.discord.com/api/webhooks/1/x", "discord"),
        ("https://hooks.slack.com/services/T/B/x", "slack"), ("https://notdiscord.com/x", "raw"), ("http://10.0.0.1/discord.com", "raw"),
    ],
)  # fmt: skip
def test_the_form_follows_the_address(address, form):
    assert form_of({ADDRESS: address}) == form and form_of({ADDRESS: address, FORM: "raw"}) == "raw"


def test_a_server_that_recovers_gets_the_later_messages(server, tmp_path):
    """Three tries for the first message; the wait that it asks for is kept, up to a bound."""
    server.answers, server.headers, sleeps = [503, 429, 500], {"Retry-After": "7"}, []
    told = sent(tmp_path / "cat", sleeps)
    assert sleeps == [7.0, 7.0] and len(told) == 2
    assert "HTTP status 500" in told[1] and "dropped" in told[1]
    kinds = [message["kind"] for message in server.messages]
    assert kinds[0] == "EvalReport" and "StepReport" not in kinds and kinds[-1] == "RunEnded"
    server.answers, server.headers, sleeps = [503], {"Retry-After": "99999"}, []
    sent(tmp_path / "cat", sleeps)
    assert sleeps == [30.0]


def test_nobody_at_the_address_is_told_once(tmp_path, monkeypatch, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv(ADDRESS, f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}")
    told = sent(tmp_path / "cat")
    assert len(told) == 2 and "can't be reached" in told[1] and SECRET not in told[1]


def driven(folder: Path, seconds: float = 20.0) -> list[Notice]:
    folder.mkdir(exist_ok=True)
    sink = TrackerSink(("webhook",), Opening(folder, "cat", {}), lambda: ("RAM", 1))
    sink.begin(0, 9, [])
    for event in events_of(folder):
        sink(event)
    sink.close(False, seconds)
    return sink.take_notices()


@pytest.mark.parametrize("status", [401, 404, 410, 302])
def test_a_server_that_refuses_ends_the_tracker_with_one_warning(server, tmp_path, status):
    """A redirect is not followed: the message would arrive elsewhere, or nowhere."""
    server.answers = [status] * 50
    server.headers = {"Location": server.address} if status == 302 else {}
    warnings = [notice.text for notice in driven(tmp_path / "cat") if notice.level == "warning"]
    assert len(warnings) == 1 and f"HTTP status {status}" in warnings[0] and SECRET not in warnings[0]
    assert server.posts == [] and len(server.answers) == 49


def test_a_slow_server_is_not_waited_for(server, tmp_path):
    server.waits.clear()
    (warning,) = [notice for notice in driven(tmp_path / "cat", 0.2) if notice.level == "warning"]
    assert "has not finished" in warning.text


def test_a_server_that_never_answers_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.05)
    server.waits.clear()
    told: list[str] = []
    Webhook(Opening(tmp_path, "cat", {}), told.append, lambda _: None)
    assert len(told) == 2 and "dropped" in told[1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "has no address; set the environment variable"), ({ADDRESS: "ftp://x/y"}, "is not a web address"),
        ({ADDRESS: "file:///etc/passwd"}, "is not a web address"), ({ADDRESS: "https://x/a b"}, "is not a web address"),
        ({ADDRESS: "http://[x"}, "is not a web address"), ({ADDRESS: "https://x/y", FORM: "teams"}, "use raw, discord, slack"),
        ({ADDRESS: "https://x/y"}, ""),
    ],
)  # fmt: skip
def test_a_wrong_address_is_reported_before_the_run(monkeypatch, values, text):
    for name in (ADDRESS, FORM):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    problem = Webhook.missing()
    assert (text in problem) if text else problem == ""


def test_a_run_needs_the_address(workshop, monkeypatch):
    monkeypatch.delenv(ADDRESS, raising=False)
    with pytest.raises(UserError, match="CHROMA_TRAINER_WEBHOOK"):
        run(workshop.request(trackers="webhook"), workshop.host())


def test_a_run_sends_its_events_and_writes_its_address_nowhere(server, workshop):
    host = workshop.host()
    validation = ValidationConfig(prompts="a cat", resolutions="32x32", steps=1, cfg=1.0)
    request = workshop.request(
        validation, trackers="webhook", steps=2, checkpoint_every=0, validate_every=0, **EVALUATED
    )
    run(request, host)
    kinds = [message["kind"] for message in server.messages]
    assert kinds[0] == "RunStarted" and kinds[-1] == "RunEnded" and not server.messages[-1]["failed"]
    assert {"EvalReport", "PreviewReady", "StepReport", "LoraSaved"} <= set(kinds)
    files = [path for path in host.paths.output.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(SECRET.encode() in path.read_bytes() for path in files)
