"""The record of a run's images: bounded in memory and on disk, exact about what changed, and readable in its older form."""

from __future__ import annotations

import gc
import json
import tracemalloc
from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.data.buckets import Placement
from chroma_trainer.trainer_core.data.sample_table import Sample, TableWriter
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.runs.manifest import RunManifest, changes, write_manifest
from chroma_trainer.trainer_core.storage.atomic import sha256_text
from chroma_trainer.trainer_core.train.run import run
from safetensors.numpy import load_file

ROWS = 20_000


def sample(i: int) -> Sample:
    name = f"ü{i}.png"
    return Sample(
        f"0/{name}",
        name,
        name,
        sha256_text(str(i)),
        (f"caption {i}",),
        (64, 64),
        Placement((64, 64), (64, 64), (0, 0)),
        0,
    )


def world(samples) -> RunManifest:
    writer = TableWriter()
    for each in samples:
        writer.append(each)
    return RunManifest({"a": 1}, {"codec": "x"}, writer.finish(lambda part, name: name))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    first = world(sample(i) for i in range(ROWS))
    write_manifest(folder, first)
    return folder, first


@pytest.mark.slow
def test_an_image_takes_few_bytes_on_disk_and_none_in_memory(begun, tmp_path):
    _, first = begun
    tracemalloc.start()
    write_manifest(tmp_path, first)
    assert changes(tmp_path, first) == []
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < ROWS  # bytes: a dict of strings takes 400 an image
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    names = sum(len(each.key.encode()) for each in first.samples)
    assert sizes.keys() == {"world.json", "world-images.safetensors"} and sizes["world.json"] < 500
    assert sizes["world-images.safetensors"] < 40 * ROWS + names + 500
    assert (
        load_file(tmp_path / "world-images.safetensors")["rows"].size == 40 * ROWS
    )  # any reader of the format reads it


def test_changes_of_every_kind_are_named_exactly_and_long_lists_counted(begun):
    folder, _ = begun
    samples = [sample(i) for i in range(ROWS)]
    samples[7] = replace(samples[7], captions=("caption 7", "and one more"))
    samples[9] = replace(samples[9], sha256="0" * 64)
    del samples[100:110]
    samples.insert(50, sample(-1))
    assert changes(folder, world(samples)) == [
        "image 0/ü-1.png is new",
        *(f"image 0/ü{i}.png is gone" for i in range(100, 106)),
        "and 4 more: image ... is gone",
        "image 0/ü9.png has changed",
        "caption of 0/ü7.png was edited",
    ]
    assert changes(folder, world(reversed([sample(i) for i in range(ROWS)]))) == []  # the order is no change


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_lost_record_of_the_images_is_said_and_the_rest_still_compared(begun, tmp_path, damage):
    write_manifest(tmp_path, world(sample(i) for i in range(3)))
    path = tmp_path / "world-images.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] if damage == "cut" else raw[:-1] + b"?")
    if damage == "missing":
        path.unlink()
    told = changes(tmp_path, replace(begun[1], settings={"a": 2}))
    assert told[0] == "a was 1, is 2" and len(told) == 2
    assert told[1].startswith("world-images.safetensors is missing or damaged")


def test_an_older_run_with_its_images_in_json_is_compared_and_resumed(workshop):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    host.cancelling_at(0)
    folder = host.run_folder
    old = json.loads((folder / "world.json").read_text("utf-8"))
    del old["image_rows"]
    names = load_file(folder / "world-images.safetensors")["names"].tobytes().decode().split("0/")[1:]
    old["images"] = {f"0/{name}": ["0" * 16, "0" * 16] for name in names[1:]} | {"0/lost.png": ["1" * 16, "2" * 16]}
    (folder / "world-images.safetensors").unlink()
    (folder / "world.json").write_text(json.dumps(old), "utf-8")
    with pytest.raises(UserError) as caught:
        run(workshop.request(learning_rate=0.5), host)
    told = str(caught.value)
    for part in (
        f"image 0/{names[0]} is new",
        "image 0/lost.png is gone",
        f"image 0/{names[1]} has changed",
        f"caption of 0/{names[1]} was edited",
    ):
        assert part in told
    assert run(workshop.request(), host).report["resumed_from"] == 3
