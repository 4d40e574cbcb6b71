"""Object stores, against a server that checks signatures, has pages, and fails."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.data.places.open_source import open_source
from chroma_trainer.trainer_core.data.places.stores import retry
from chroma_trainer.trainer_core.data.places.stores.s3_store import S3Settings, signed_headers
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import PhaseProgress

from .conftest import SECRET, captions, index_of, png

CATS = "s3://pictures/cats"
EXAMPLE = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "path, headers, signature",
    [
        ("/test.txt", {"Range": "bytes=0-9"}, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("/?max-keys=2&prefix=J", {}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_the_signatures_of_amazons_documentation(path, headers, signature):
    settings = S3Settings("", "us-east-1", *EXAMPLE, "")
    now = datetime(2013, 5, 24, tzinfo=timezone.utc)
    result = signed_headers(settings, f"https://examplebucket.s3.amazonaws.com{path}", headers, now)
    assert result["Authorization"].endswith(f"Signature={signature}")


def test_a_bucket_trains_as_the_same_files_in_a_folder(s3, host, tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    for path, raw in s3.files.items():
        (folder / path.rpartition("/")[2]).write_bytes(raw)
    index, local = index_of(host("s3://pictures"), CATS), index_of(host(), folder)
    assert index.digest == local.digest and captions(index) == captions(local)
    assert index.read(index.samples[2]) == png(2)
    assert index.samples[0].path == "s3://pictures/cats/0.png"


def test_what_was_read_is_not_downloaded_again(s3, host):
    index_of(host("s3://pictures"), CATS)
    count = len(s3.log)
    index = index_of(host("s3://pictures"), CATS)
    assert s3.downloads(count) == [] and len(index.samples) == 6
    s3.files["pictures/cats/3.png"] = png(99)
    count = len(s3.log)
    index_of(host("s3://pictures"), CATS)
    assert s3.downloads(count) == ["/pictures/cats/3.png"]


def test_every_page_of_a_listing_is_read(s3, host):
    s3.files = {f"pictures/cats/{number:04}.png": b"" for number in range(2500)}
    s3.files["pictures/cats/nothing/"] = b""
    source = open_source(CATS, host("s3://pictures"))
    assert len(source.entries()) == 2500 and len(s3.log) == 3


def test_odd_names(s3, host):
    names = ["a b+c&d=e.png", "käse/雪.png", "100%.png", "it's (1).png"]
    s3.files = {f"pictures/cats/{name}": png(number) for number, name in enumerate(names)}
    index = index_of(host("s3://pictures"), CATS, captions="filename")
    assert {sample.name for sample in index.samples} == set(names)


def test_a_store_that_is_busy_is_asked_again(s3, host):
    asked = set()  # several threads download: each file is refused once, whatever their order
    s3.fault = lambda number, path: None if path in asked else asked.add(path) or 503
    assert len(index_of(host("s3://pictures"), CATS).samples) == 6
    assert len(s3.log) == 2 * 13  # the listing, 6 images and 6 captions


def test_a_connection_that_is_cut_is_continued(s3, host):
    s3.files["pictures/cats/0.png"] = big = png(0, (700, 500)) + bytes(100_000)
    s3.fault = lambda number, path: "cut" if path.endswith("0.png") and number < 4 else None
    index = index_of(host("s3://pictures"), CATS)
    assert index.read(index.samples[0]) == big
    ranges = [headers.get("range") for path, headers in s3.log if path.endswith("0.png")]
    assert ranges[0] is None and ranges[1] == f"bytes={len(big) // 2}-"


def test_a_download_is_continued_by_the_next_start(s3, host):
    """As after a kill: half of the file is there."""
    s3.files["pictures/cats/0.png"] = big = png(0, (700, 500)) + bytes(100_000)
    s3.fault = lambda number, path: "cut" if path.endswith("0.png") else None
    with pytest.raises(UserError, match="closed in the middle"):
        index_of(host("s3://pictures"), CATS)
    s3.fault = lambda number, path: None
    count = len(s3.log)
    index = index_of(host("s3://pictures"), CATS)
    assert index.read(index.samples[0]) == big
    (part,) = [headers["range"] for path, headers in s3.log[count:] if path.endswith("0.png")]
    assert int(part[6:-1]) > len(big) // 2


def test_a_file_that_is_replaced_while_it_is_read_starts_again(s3, host):
    big, other = png(0) + bytes(50_000), png(1) + bytes(50_000)
    s3.files["pictures/cats/0.png"] = big

    def fault(number, path):
        if path.endswith("0.png") and len([p for p, _ in s3.log if p == path]) == 1:
            return "cut"
        if path.endswith("0.png"):
            s3.files["pictures/cats/0.png"] = other
        return None

    s3.fault = fault
    index = index_of(host("s3://pictures"), CATS)
    skipped = {entry["image"]: entry["reason"] for entry in index.report["skipped"]}
    assert "replaced while it was downloaded" in skipped["s3://pictures/cats/0.png"]


def test_a_store_that_dies_in_the_middle_ends_the_run_and_the_next_one_continues(s3, host):
    read = []

    def fault(number, path):
        if path.endswith(".png"):
            read.append(path)
        return 500 if len(read) > 3 else None

    s3.fault = fault
    with pytest.raises(UserError, match=r"HTTP 500 .*another start continues"):
        index_of(host("s3://pictures"), CATS)
    s3.fault = lambda number, path: None
    count = len(s3.log)
    index = index_of(host("s3://pictures"), CATS)
    assert len(index.samples) == 6 and not index.report["skipped"]
    downloads = [path for path in s3.downloads(count) if path.endswith(".png")]
    assert len(downloads) == 3 and not set(downloads) & set(read[:3])


def test_a_server_that_is_not_there(s3, host):
    s3.stop()
    with pytest.raises(UserError, match=r"s3://pictures/cats.*refused.*4 tries"):
        index_of(host("s3://pictures"), CATS)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"AWS_ACCESS_KEY_ID": "WRONG"}, "InvalidAccessKeyId.*AWS_ACCESS_KEY_ID.*are read from the environment"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": ""}, "AccessDenied.*are not set in the environment"),
    ],
)
def test_wrong_keys_are_named_and_never_shown(s3, host, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        index_of(host("s3://pictures"), CATS)
    assert SECRET not in str(error.value)


def test_a_bucket_that_does_not_exist(s3, host):
    with pytest.raises(UserError, match=r"NoSuchBucket.*check the name of the bucket"):
        index_of(host("s3://dogs"), "s3://dogs/cats")


def test_an_image_that_is_gone_is_accounted_for(s3, host):
    s3.fault = lambda number, path: 404 if path.endswith("4.png") else None
    index = index_of(host("s3://pictures"), CATS)
    assert len(index.samples) == 5 and index.report["found"] == 6
    (skipped,) = index.report["skipped"]
    assert skipped["image"] == "s3://pictures/cats/4.png" and "HTTP 404" in skipped["reason"]


def test_what_is_no_image_of_the_dataset_is_left_out_as_in_a_folder(s3, host):
    s3.files |= {
        "pictures/cats/.hidden.png": png(1), "pictures/cats/@eaDir/0.png": png(1),
        "pictures/cats/0-masklabel.png": png(1), "pictures/cats/a.psd": b"x", "pictures/cats/notes.md": b"x",
    }  # fmt: skip
    index = index_of(host("s3://pictures"), CATS)
    assert len(index.samples) == 6
    assert len(index.report["left_out"]) == 3 and "a.psd" in index.report["skipped"][0]["image"]


def test_a_table_of_captions_in_the_bucket(s3, host):
    rows = "".join(f'{{"file_name": "{number}.png", "text": "row {number}"}}\n' for number in range(6))
    s3.files["pictures/cats/metadata.jsonl"] = rows.encode()
    index = index_of(host("s3://pictures"), CATS, "@", captions="table")
    assert captions(index)["5.png"] == ("row 5",)
    with pytest.raises(UserError, match=r"'other.csv' is not in s3://pictures/cats"):
        index_of(host("s3://pictures"), CATS, "@other.csv", captions="table")


@pytest.mark.parametrize("name", ["../../table.csv", "/table.csv", "a/./table.csv", "c:table.csv", "a\\table.csv"])
def test_a_table_is_not_written_outside_of_the_cache(s3, host, tmp_path, name):
    """A key of a bucket may be anything."""
    s3.files[f"pictures/cats/{name}"] = b"file_name,text\n0.png,a\n"
    before = {path for path in tmp_path.parent.rglob("*.csv")}
    with pytest.raises(UserError, match="can't be the name of a file here"):
        index_of(host("s3://pictures"), CATS, f"@{name}", captions="table")
    assert {path for path in tmp_path.parent.rglob("*.csv")} == before


def test_the_region_is_taken_from_the_store(s3, host, monkeypatch):
    """A request that is signed for another region is answered with the right one."""
    answer = s3.answer

    def redirect(target, headers):
        if "/us-east-1/" in headers.get("authorization", ""):
            body = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{'eu-test-1'}</Region></Error>"
            return 400, body.encode(), {}
        return answer(target, headers)

    monkeypatch.delenv("AWS_DEFAULT_REGION")
    s3.answer = redirect
    assert len(index_of(host("s3://pictures"), CATS).samples) == 6


def test_a_redirect_to_another_region_is_signed_anew(s3, host, monkeypatch):
    answer = s3.answer

    def redirect(target, headers):
        if "/us-east-1/" in headers.get("authorization", ""):
            return 307, b"", {"Location": f"{s3.url}/elsewhere", "x-amz-bucket-region": "eu-test-1"}
        return answer(target, headers)

    monkeypatch.delenv("AWS_DEFAULT_REGION")
    s3.answer = redirect
    assert len(index_of(host("s3://pictures"), CATS).samples) == 6
    assert not any(path.startswith("/elsewhere") for path, _ in s3.log)


def test_downloads_show_progress(s3, host):
    progress = []
    for number in range(6, 80):
        s3.files[f"pictures/cats/{number}.png"] = png(number)
    sink = lambda event: progress.append(event.done) if isinstance(event, PhaseProgress) else None  # noqa: E731
    index_of(replace(host("s3://pictures"), sinks=(sink,)), CATS, captions="filename")
    assert progress == [32, 64, 80]


def test_canceling_does_not_wait_for_a_busy_store(s3, host, monkeypatch):
    """The server asks for a minute."""
    monkeypatch.setattr(retry, "WAITS", (60.0,))
    s3.fault = lambda number, path: 503
    stops = replace(host("s3://pictures"), is_cancelled=lambda: bool(s3.log))
    with pytest.raises(Cancelled):
        index_of(stops, CATS)


def test_doctor_examines_a_store_that_the_user_names(s3, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", CATS, "--resolution", "64"]) == 1
    assert "6 of 6 images can be trained" in capsys.readouterr().out
    count = len(s3.log)
    main(["doctor", CATS, "--resolution", "64"])
    assert s3.downloads(count) == []
