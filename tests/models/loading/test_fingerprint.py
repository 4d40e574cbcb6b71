"""The identity of weights: every byte counts, a large file is read once, and older runs go on."""

from __future__ import annotations

import os

import pytest
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import Paths, PhaseProgress, SinkHost
from chroma_trainer.trainer_core.models.loading import fingerprint
from chroma_trainer.trainer_core.models.loading.fingerprint import content_digest, remembering, sampling
from chroma_trainer.trainer_core.train import prepare
from chroma_trainer.trainer_core.train.run import run


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Files of a few kB are large here."""
    monkeypatch.setattr(fingerprint, "SMALL_BYTES", 512)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 64)
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(fingerprint, "_remembered", {})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "merge.safetensors"
    path.write_bytes(bytes(range(256)) * 20)
    settle(path)
    return path


def settle(path, seconds: float = 60.0) -> None:
    """As if it was written a minute ago."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - int(seconds * 1e9)))


def host_at(folder, events, cancelled: bool = False) -> SinkHost:
    return SinkHost(
        paths=Paths(output=folder, cache=folder), sinks=(events.append,), is_cancelled=lambda: cancelled
    )  # fmt: skip


def test_every_byte_counts(file):
    data = bytearray(file.read_bytes())
    before, seen = content_digest(file), set()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        file.write_bytes(changed)
        seen.add(content_digest(file))
    assert len(seen) == len(range(0, len(data), 97)) and before not in seen
    with sampling():
        sampled = content_digest(file)
        file.write_bytes(data)
        assert content_digest(file) == sampled  # two merges of one size: what the samples miss


def test_small_files_have_the_identity_they_had(tmp_path):
    (tmp_path / "vae").write_bytes(b"abc" * 100)
    here = content_digest(tmp_path / "vae")
    with sampling():
        assert content_digest(tmp_path / "vae") == here


def test_a_large_file_is_read_once(file, tmp_path, monkeypatch):
    events: list = []
    host = host_at(tmp_path, events)
    with remembering(host):
        first = content_digest(file)
    progress = [event for event in events if isinstance(event, PhaseProgress)]
    assert [event.phase for event in progress] == ["identify"] * 5 and first == content_digest(file)
    monkeypatch.setattr(fingerprint, "_remembered", {})  # another process
    with monkeypatch.context() as patch, remembering(host):
        patch.setattr(fingerprint, "_digest_all", lambda *_: pytest.fail("read again"))
        assert content_digest(file) == first
    file.write_bytes(file.read_bytes()[::-1])  # of the same size
    settle(file, 30)
    with remembering(host):
        assert content_digest(file) != first


def test_a_file_that_has_just_changed_is_not_remembered(file, tmp_path):
    file.write_bytes(file.read_bytes()[::-1])
    with remembering(host_at(tmp_path, [])):
        content_digest(file)
    assert not (tmp_path / fingerprint.MEMORY).exists()


@pytest.mark.parametrize("text", ["", "[[1, 2]]", '{"a": 1}', "[5]"])
def test_a_damaged_memory_is_ignored(file, tmp_path, text):
    (tmp_path / fingerprint.MEMORY).write_text(text, encoding="utf-8")
    with remembering(host_at(tmp_path, [])):
        assert content_digest(file) == content_digest(file)


def test_it_can_be_canceled(file, tmp_path):
    with pytest.raises(Cancelled), remembering(host_at(tmp_path, [], cancelled=True)):
        content_digest(file)


@pytest.mark.slow
def test_a_run_with_the_sampled_identity_is_resumed(workshop, plain_run, monkeypatch):
    """It continues in its own folder, to the bytes of a run that was never interrupted; the next one has its own name."""
    whole = plain_run[1]
    host = workshop.host()
    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(prepare, "remembering", lambda host: sampling())
        run(workshop.request(), host.cancelling_at(3))
    before = host.run_folder
    again = workshop.host(host.paths.output)
    result = run(workshop.request(), again)
    assert result.report["resumed_from"] == 3 and result.lora.sha256 == whole.lora.sha256
    assert again.run_folder == before


def test_only_what_has_changed_is_named_of_a_run_with_the_sampled_identity(workshop, monkeypatch):
    host = workshop.host()
    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(prepare, "remembering", lambda host: sampling())
        run(workshop.request(), host.cancelling_at(3))
    with pytest.raises(Exception, match="learning_rate was") as caught:
        run(workshop.request(learning_rate=0.02), workshop.host(host.paths.output))
    assert "weights" not in str(caught.value)
