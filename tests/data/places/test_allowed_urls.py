"""Which addresses a workflow may name: those that the user has allowed, and nothing of the user's own machine."""

from __future__ import annotations

import json

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.data.places.byte_cache import ByteCache, cache_bytes
from chroma_trainer.trainer_core.data.places.stores.http_client import Refused, check_address
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import PACKAGE, Paths
from chroma_trainer.trainer_core.storage.allowed_urls import is_allowed, normal_url

FIRST_LORA = PACKAGE / "workflows" / "api" / "first-lora.json"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("s3://Bucket/cats/", "s3://Bucket/cats"),
        ("HTTPS://Example.COM:443/a/", "https://example.com/a"),
        ("http://example.com.:8080/a?b=1", "http://example.com:8080/a?b=1"),
        ("hf://datasets/user/name", "hf://user/name"),
    ],
)
def test_normal_forms(text, expected):
    assert normal_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "file:///etc/passwd", "local:///etc", "simplecache::file:///etc/passwd", "s3://bucket::file://etc", "dir::x://y",
        "s3://key:secret@bucket/cats", "https://user@example.com/", "s3://bucket/../other", "https://example.com/cats/%2e%2E/private", "https://example.com/cats/..%2fprivate", "https://example.com/a b",
        "s3://bucket?list/cats", "s3://bucket/cats#x", "http://[::1", "http://example.com:99999999/",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(text):
    with pytest.raises(ValueError):
        normal_url(text)
    assert not is_allowed(text, [text])


@pytest.mark.parametrize(
    "url, entry, expected",
    [
        ("s3://bucket/cats", "s3://bucket", True),
        ("s3://bucket/cats", "s3://bucket/", True),
        ("s3://bucket-2/cats", "s3://bucket", False),
        ("s3://bucket/cats", "s3://bucket/cat", False),
        ("s3://bucket/cats", "s3://", True),
        ("gs://bucket/cats", "s3://", False),
        ("hf://user/name@main/sub", "hf://user/name", True),
        ("https://example.com/a", "http://example.com", False),
        ("https://example.com.evil.org/a", "https://example.com", False),
        ("https://example.com:8443/a", "https://example.com", False),
        ("s3://bucket/cats", "bucket", False),
    ],
)
def test_what_an_entry_allows(url, entry, expected):
    assert is_allowed(url, [entry]) is expected


@pytest.mark.parametrize(
    "address, is_public",
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("169.254.169.254", False), ("10.1.2.3", False),
        ("192.168.1.5", False), ("172.16.0.1", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("::1", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False), ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_addresses_of_the_own_network(address, is_public):
    if is_public:
        return check_address("example.com", address, ())
    with pytest.raises(Refused, match="which only the user may name"):
        check_address("example.com", address, ())
    check_address("example.com", address, ("example.com",))


def test_a_workflow_can_not_read_what_the_user_has_not_allowed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow = json.loads(FIRST_LORA.read_text("utf-8"))
    for node in workflow.values():
        if node["class_type"] == "DatasetBackend":
            node["inputs"]["folder"] = "s3://bucket/cats"
    (tmp_path / "w.json").write_text(json.dumps(workflow), "utf-8")
    assert main(["check", "w.json"]) == 2
    assert "--allow-url s3://bucket/cats, or if CHROMA_TRAINER_URLS" in capsys.readouterr().err
    assert main(["check", "w.json", "--allow-url", "s3://bucket"]) == 0
    monkeypatch.setenv("CHROMA_TRAINER_URLS", "hf://a, s3://bucket/cats")
    assert main(["check", "w.json"]) == 0
    assert main(["check", "w.json", "--allow-url", "bucket", "--allow-url", "s3://k:s@b"]) == 2
    assert "'bucket' is not an address" in (error := capsys.readouterr().err) and "user name or password" in error


def test_masks_and_references_stay_folders(tmp_path):
    paths = Paths(output=tmp_path, cache=tmp_path, datasets=(tmp_path,), urls=("s3://bucket",))
    assert paths.find_source("s3://bucket/cats/", "folder") == "s3://bucket/cats"
    with pytest.raises(UserError, match="only folder may be one"):
        paths.find_dataset("s3://bucket/masks", "masks")


def test_a_table_outside_of_the_allowed_folders(tmp_path):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        (folder / "urls.csv").write_text("url\n", "utf-8")
    paths = Paths(output=tmp_path, cache=tmp_path, datasets=(tmp_path / "in",))
    assert paths.find_source("urls.csv", "folder") == str((tmp_path / "in" / "urls.csv").resolve())
    for name in ("../urls.csv", str(tmp_path / "urls.csv"), "none.csv"):
        with pytest.raises(UserError):
            paths.find_source(name, "folder")


def test_the_cache_has_a_bound(tmp_path):
    cache = ByteCache(tmp_path / "places", 10_000)
    paths = [cache.path("a", str(number)) for number in range(20)]
    for number, path in enumerate(paths):
        cache.write(path, bytes(1000))
        if number > 5:
            assert cache.find(paths[2])  # used all the time
    size = sum(path.stat().st_size for path in (tmp_path / "places").rglob("*") if path.is_file())
    assert size <= 10_000 and cache.read(paths[19]) == bytes(1000) and cache.read(paths[0]) is None
    assert cache.read(paths[2]) == bytes(1000)
    with pytest.raises(UserError, match="CHROMA_TRAINER_URL_CACHE_GB"):
        cache.write(paths[0], bytes(10_001))
    again = ByteCache(tmp_path / "places", 3000)
    again.write(paths[0], bytes(1000))
    assert sum(path.stat().st_size for path in (tmp_path / "places").rglob("*") if path.is_file()) <= 3000


def test_the_bound_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CHROMA_TRAINER_URL_CACHE_GB", "0.5")
    assert cache_bytes() == 1 << 29
    for text in ("much", "-1", "nan", "0"):
        monkeypatch.setenv("CHROMA_TRAINER_URL_CACHE_GB", text)
        with pytest.raises(UserError, match="such as 20"):
            cache_bytes()
