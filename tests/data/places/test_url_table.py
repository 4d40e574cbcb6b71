"""Tables with the addresses of images, against a web server."""

from __future__ import annotations

import json

import pytest
from chroma_trainer.trainer_core.data.places.stores.http_client import Client
from chroma_trainer.trainer_core.data.places.url_table import MOST_FAILURES
from chroma_trainer.trainer_core.errors import UserError

from .conftest import Service, captions, index_of, png


@pytest.fixture
def write(tmp_path):
    def call(*rows):
        path = tmp_path / "urls.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return call


@pytest.fixture
def table(write, web):
    """A table of four images."""
    for number in range(4):
        web.files[f"img/{number}.png"] = png(number)
    return write(*({"url": f"{web.url}/img/{number}.png", "caption": f"cat {number}"} for number in range(4)))


def test_images_and_captions(table, web, host):
    index = index_of(host(web.url), table)
    name = web.url.removeprefix("http://")
    assert captions(index) == {f"{name}/img/{number}.png": (f"cat {number}",) for number in range(4)}
    assert index.samples[1].path == f"{web.url}/img/1.png" and index.read(index.samples[1]) == png(1)
    count = len(web.log)
    assert index_of(host(web.url), table, captions="table").digest == index.digest
    assert len(web.log) == count, "an address is downloaded once"


def test_a_csv_with_weights(tmp_path, web, host, table):
    path = tmp_path / "urls.csv"
    path.write_text(f"image_url,prompt,loss_weight\n{web.url}/img/1.png,one,0.5\n", "utf-8")
    for where in ("table", "textfile", "json file"):
        (sample,) = index_of(host(web.url), path, captions=where).samples
        assert sample.captions == ("one",) and sample.loss_weight == 0.5
    (sample,) = index_of(host(web.url), path, captions="filename").samples
    assert sample.captions == ("1",)


def test_only_addresses_that_the_user_allowed(write, table, web, host):
    path = write({"url": f"{web.url}/img/0.png", "text": "a"}, {"url": "https://example.com/1.png", "text": "b"})
    index = index_of(host(web.url), path)
    assert len(index.samples) == 1
    (skipped,) = index.report["skipped"]
    assert "urls.jsonl, row 2" in skipped["image"] and "--allow-url https://example.com" in skipped["reason"]
    with pytest.raises(UserError, match="is not allowed"):
        index_of(host(), path)
    assert not any(path.startswith("/img/1") for path, _ in web.log)


def test_a_whole_kind_of_address_does_not_open_the_own_network(write, table, web, host):
    """http:// allows every public server, but not this machine, whatever its name."""
    path = write(
        {"url": f"{web.url}/img/0.png", "text": "a"}, {"url": f"http://localhost:{web.port}/img/1.png", "text": "a"}
    )
    with pytest.raises(UserError, match=r"none of 2 images.*which only the user may name"):
        index_of(host("http://"), path)
    assert not web.log


def test_a_redirect_does_not_lead_into_the_own_network(write, table, web, host, monkeypatch):
    answer = web.answer
    targets = {
        "/r0.png": f"http://127.0.0.1:{web.port}/img/0.png", "/r1.png": "file:///etc/passwd",
        "/r2.png": f"http://localhost:{web.port}/img/2.png", "/r3.png": f"http://localhost:{web.port}/r3.png",
    }  # fmt: skip
    web.answer = lambda path, headers: (
        (302, b"", {"Location": targets[path]}) if path in targets else answer(path, headers)
    )
    path = write(*({"url": f"http://localhost:{web.port}{name}", "text": "a"} for name in targets))
    index = index_of(host(f"http://localhost:{web.port}"), path)
    assert [sample.path.rpartition("/")[2] for sample in index.samples] == ["r2.png"]
    reasons = {entry["image"].rpartition("/")[2]: entry["reason"] for entry in index.report["skipped"]}
    assert "127.0.0.1, an address of this machine" in reasons["r0.png"]
    assert "not allowed" in reasons["r1.png"] and "infinite loop" in reasons["r3.png"]


def test_secrets_do_not_follow_a_redirect_to_another_host(web):
    other = Service()
    other.files["a.png"] = png(0)
    other.start()
    web.answer = lambda path, headers: (302, b"", {"Location": f"{other.url}/a.png"})
    with Client({"127.0.0.1"}).open(f"{web.url}/a", {"Authorization": "secret", "Accept": "x"}) as response:
        assert response.read() == png(0)
    other.stop()
    assert web.log[0][1]["authorization"] == "secret"
    assert "authorization" not in other.log[0][1] and other.log[0][1]["accept"] == "x"


def test_what_is_no_image(table, web, host):
    web.files |= {"img/1.png": b"<html>", "img/2.png": b"not an image"}
    answer = web.answer

    def as_page(path, headers):
        status, body, fields = answer(path, headers)
        return status, body, {**fields, "Content-Type": "text/html; charset=utf-8"} if body == b"<html>" else fields

    web.answer = as_page
    del web.files["img/3.png"]
    index = index_of(host(web.url), table)
    reasons = {entry["image"][-5:]: entry["reason"] for entry in index.report["skipped"]}
    assert len(index.samples) == 1 and index.report["found"] == 4
    assert "a web page in place of an image" in reasons["1.png"] and "HTTP 404" in reasons["3.png"]
    assert "not an image" in reasons["2.png"]


def test_rows_that_can_not_be_used(write, table, web, host):
    url = f"{web.url}/img/0.png"
    path = write(
        {"url": url, "text": "a"}, {"url": url, "text": "b"}, {"url": "ftp://x/y.png", "text": "c"}, {"url": "", "text": "d"},
        {"url": "https://user:secret@example.com/a.png", "text": "e"}, {"url": f"{web.url}/img/1.png"},
    )  # fmt: skip
    index = index_of(host(web.url), path)
    reasons = [entry["reason"] for entry in index.report["skipped"]]
    assert len(index.samples) == 1 and len(reasons) == 5 == index.report["found"] - 1
    for text in ("same address", "not the address of a web server", "user name or password", "its row: has none"):
        assert any(text in reason for reason in reasons), (text, reasons)


def test_addresses_with_other_letters(write, table, web, host):
    web.files["bilder/käse 雪.png"] = png(1)
    path = write(
        {"url": f"{web.url}/bilder/käse%20雪.png", "text": "a"},
        {"url": "https://bü" + "x" * 80 + ".de/a.png", "text": "b"},
    )
    index = index_of(host(web.url, "https://"), path)
    assert len(index.samples) == 1 and "host is not valid" in index.report["skipped"][0]["reason"]


def test_queries_make_different_names(write, table, web, host):
    web.files["view"] = png(1)
    path = write(*({"url": f"{web.url}/view?id={number}", "text": "a"} for number in range(3)))
    assert len({sample.name for sample in index_of(host(web.url), path).samples}) == 3


def test_a_dead_server_costs_its_images_and_a_dead_network_ends_the_run(write, table, web, host):
    web.fault = lambda number, path: 500 if "1.png" in path else None
    index = index_of(host(web.url), table)
    assert len(index.samples) == 3 and "HTTP 500" in index.report["skipped"][0]["reason"]
    path = write(*({"url": f"{web.url}/x/{number}.png", "text": "a"} for number in range(MOST_FAILURES + 2)))
    web.fault = lambda number, path: 503
    with pytest.raises(UserError, match=f"{MOST_FAILURES} images in a row could not be downloaded.*continues"):
        index_of(host(web.url), path)


def test_a_server_of_many_images_may_be_away_while_others_answer(table, write, web, host):
    other = Service()
    other.files["a.png"] = png(9)
    other.start()
    rows = [{"url": f"{web.url}/img/{number}.png", "text": "a"} for number in range(3 * MOST_FAILURES)]
    path = write(*rows, {"url": f"{other.url}/a.png", "text": "b"})
    web.fault = lambda number, path: 500
    index = index_of(host(web.url, other.url), path)
    other.stop()
    assert len(index.samples) == 1 and len(index.report["skipped"]) == len(rows)


def test_a_table_without_addresses(write, host):
    with pytest.raises(UserError, match=r"urls.jsonl has no column with addresses \('file', 'text'\)"):
        index_of(host(), write({"file": "a.png", "text": "a"}))
