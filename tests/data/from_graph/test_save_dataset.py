"""Images of a graph as a dataset folder: what is written, what a second run does, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.datasets.save_dataset import SPEC, fingerprint, stored
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.from_graph import dataset_writer
from chroma_trainer.trainer_core.data.from_graph.own_files import EARLIER, LIST
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.spec import build_inputs
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.read import graph_from_json
from PIL import Image


@pytest.fixture
def messages():
    return []


@pytest.fixture
def host(tmp_path, messages):
    root = tmp_path / "datasets"
    sink = lambda event: messages.append(event.text) if isinstance(event, Notice) else None  # noqa: E731
    paths = Paths(output=tmp_path / "out", cache=tmp_path / "cache", datasets=(root,), new_datasets=root)
    return SinkHost(paths=paths, sinks=(sink,), device="cpu")


def save(host, images, captions: str | list = "", masks=None, name="cats"):
    """Run the node as ComfyUI does, with lists."""
    values = {"images": images, "name": name, "captions": captions, "masks": masks}
    inputs, problems = build_inputs(SPEC, values)
    if problems:
        raise UserError(problems)
    return SPEC.run(inputs, host)


def pictures(count, width=96, height=64, seed=0):
    """A batch with pixels that 8 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator) / 255


def folder(host):
    return host.paths.new_datasets / "cats"


def state(host):
    """Every file of the dataset: bytes and time."""
    files = sorted(path for path in folder(host).rglob("*") if path.is_file())
    return {path.relative_to(folder(host)).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def index(host, **fields):
    config = DatasetConfig(parts=(FolderConfig(folder="cats", resolution=64, **fields),), roots=(str(folder(host)),))
    if fields.get("masks"):
        config = DatasetConfig(config.parts, config.roots, ("",), (str(folder(host)),))
    return build_index(config, host, 0)


def problems_of(call, *args, **fields):
    with pytest.raises(UserError) as error:
        call(*args, **fields)
    return "\n".join(map(str, error.value.problems))


def test_pixels_and_captions_come_back_exactly(host):
    images = [pictures(2), pictures(1, 64, 128, seed=1)]
    path, masks = save(host, images, ["one", "two", "a cat\n\nin the\tsnow || cat, snow"])
    assert (path, masks) == (str(folder(host)), "")
    texts = {}
    for file in folder(host).glob("*.png"):
        with Image.open(file) as image:
            texts[np.asarray(image).tobytes()] = file.with_suffix(".txt").read_text("utf-8")
    wanted = [(image * 255).round().byte().numpy().tobytes() for batch in images for image in batch]
    assert texts == dict(zip(wanted, ["one\n", "two\n", "a cat in the snow\ncat, snow\n"], strict=True))
    samples = index(host).samples
    assert sorted(caption for sample in samples for caption in sample.captions) == sorted(
        ["one", "two", "a cat in the snow", "cat, snow"]
    )


def test_values_between_two_levels_are_rounded_and_all_kinds_of_channels_are_taken(host):
    near = torch.arange(256).reshape(1, 16, 16, 1) / 255 - 1e-6  # cutting would lose a level
    save(host, [near, torch.full((1, 8, 8, 4), 0.5, dtype=torch.bfloat16), torch.full((8, 8, 3), 1.2)])
    modes = {}
    for file in folder(host).glob("*.png"):
        with Image.open(file) as image:
            modes[image.mode] = np.asarray(image)
    assert sorted(modes["L"].ravel().tolist()) == list(range(256))
    assert modes["RGBA"].max() == 128 and modes["RGB"].min() == 255


def test_a_second_run_writes_nothing_and_trains_the_same_bytes(host):
    images, captions = pictures(4), ["a", "b", "c", "d"]
    save(host, images, captions)
    before, digest = state(host), index(host).digest
    save(host, [images[2:], images[:2]], ["c", "d", "a", "b"])  # in another order, in other batches
    assert state(host) == before and index(host).digest == digest


def test_one_caption_for_all_and_copies_of_an_image(host, messages):
    image = pictures(1)
    save(host, [image, pictures(1, seed=2), image], ["cat"])
    assert [file.read_text("utf-8") for file in folder(host).glob("*.txt")] == ["cat\n"] * 2
    save(host, [image, image], ["cat", "red cat"])
    assert [file.read_text("utf-8") for file in folder(host).glob("*.txt")] == ["cat\nred cat\n"]
    assert any("copies of other images: 1 of 3" in text for text in messages)


def test_without_captions_no_caption_files_are_written(host):
    save(host, pictures(2), "x")
    save(host, pictures(2), "")
    assert not list(folder(host).glob("*.txt")) and len(list((folder(host) / EARLIER).glob("*.txt"))) == 2


def test_images_that_are_no_longer_made_are_not_trained(host, messages):
    save(host, pictures(3), ["a", "b", "c"])
    save(host, pictures(3)[:1], ["a"])
    assert [sample.captions for sample in index(host).samples] == [("a",)]
    assert len(list((folder(host) / EARLIER).iterdir())) == 4
    assert any("2 images of earlier runs moved" in text for text in messages)


def test_files_of_others_stay_and_are_named(host, messages):
    folder(host).mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder(host) / "mine.png")
    (folder(host) / "notes.md").write_text("x")
    save(host, pictures(2), "cat")
    save(host, pictures(1, seed=3), "cat")
    assert (folder(host) / "mine.png").is_file() and (folder(host) / "notes.md").is_file()
    assert any("also holds 1 image that SaveDataset did not write" in text for text in messages)


def test_edited_captions_stay_until_they_are_deleted(host, messages):
    save(host, pictures(2), ["a", "b"])
    text = next(file for file in folder(host).glob("*.txt") if file.read_text("utf-8") == "a\n")
    text.write_text("better\n", "utf-8")
    save(host, pictures(2), ["a", "b"])
    save(host, pictures(2), ["a", "b"])  # the edit is remembered
    assert text.read_text("utf-8") == "better\n" and any(
        "edited files stay as they are: 1" in line for line in messages
    )
    text.unlink()
    save(host, pictures(2), ["a", "b"])
    assert text.read_text("utf-8") == "a\n"


def test_a_changed_caption_is_written_anew(host):
    save(host, pictures(2), ["a", "b"])
    before = state(host)
    save(host, pictures(2), ["a", "c"])
    changed = {name for name, value in state(host).items() if value != before[name]}
    assert len(changed) == 2 and LIST in changed  # one caption


def test_a_lost_list_is_made_again(host):
    save(host, pictures(2), ["a", "b"])
    before = state(host)
    (folder(host) / LIST).unlink()
    save(host, pictures(2), ["a", "b"])
    assert {name: value[0] for name, value in state(host).items()} == {name: value[0] for name, value in before.items()}
    save(host, pictures(1, seed=5), "x")
    assert len(list(folder(host).glob("*.png"))) == 1


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_run_that_ends_in_the_middle_leaves_nothing_that_is_not_known(host, monkeypatch, writes):
    save(host, pictures(2), ["a", "b"])
    write, done = dataset_writer.write_atomic, []

    def fail(path, raw):
        if len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(path)
        write(path, raw)

    monkeypatch.setattr(dataset_writer, "write_atomic", fail)
    assert "can't be written" in problems_of(save, host, pictures(3, seed=7), ["x", "y", "z"])
    assert not list(folder(host).glob(".tmp-*"))
    assert "is not complete" in problems_of(stored, SPEC.inputs(images=None, name="cats"), host)
    monkeypatch.undo()
    save(host, pictures(1), ["a"])  # another graph, after the crash
    assert [sample.captions for sample in index(host).samples] == [("a",)]


def test_a_cancelled_run_stops_at_the_next_image(host, tmp_path):
    calls = []
    stopping = SinkHost(paths=host.paths, is_cancelled=lambda: calls.append(1) or len(calls) > 4)
    with pytest.raises(Cancelled):
        save(stopping, pictures(8), "x")


def test_masks_are_read_by_the_dataset(host):
    masks = torch.zeros(2, 32, 48)
    masks[0, :16], masks[1, :, :24] = 1, 0.5
    path, mask_folder = save(host, pictures(2), ["a", "b"], [masks])
    assert path == mask_folder == str(folder(host))
    with_masks = index(host, masks="cats")
    assert with_masks.masks and len(with_masks.samples) == len(with_masks.masks.samples) == 2
    before = state(host)
    save(host, pictures(2), ["a", "b"], [masks])
    assert state(host) == before
    save(host, pictures(2), ["a", "b"], [1 - masks])
    assert len({name for name, value in state(host).items() if value != before[name]}) == 3  # both masks, the list
    assert save(host, pictures(2), ["a", "b"])[1] == "" and not list(folder(host).glob("*-masklabel.png"))


def test_what_is_refused_is_named_by_its_index(host):
    nan, far = pictures(3), pictures(3) * 255
    nan[1, 0, 0, 0] = torch.nan
    text = problems_of(save, host, [nan, far, torch.zeros(1, 0, 8, 3), torch.zeros(1, 8, 8, 2)])
    assert "image 2 of 8: values that are NaN or infinite" in text
    assert "images 4, 5, 6 of 8: values far outside of 0 to 1" in text
    assert "image 7 of 8: no pixels" in text and "image 8 of 8: not 1, 3 or 4 channels" in text
    assert "item 2 of 2 is of type str, expected an IMAGE" in problems_of(save, host, [pictures(1), "x"])
    assert "item 1 of 1 has the shape [4, 4]" in problems_of(save, host, [torch.zeros(4, 4)])
    assert "there are none" in problems_of(save, host, [])
    assert not folder(host).exists()


def test_a_mismatch_is_one_clear_error(host):
    text = problems_of(save, host, [pictures(4), pictures(4, seed=1)], ["a", "b"])
    assert text == "captions: 2 captions for 8 images; connect one for all, or one for each image in the same order"
    assert "caption 2 of 2: not a text" in problems_of(save, host, pictures(2), ["a", 3])
    assert "caption 1 of 2: not valid Unicode" in problems_of(save, host, pictures(2), ["\ud800", "a"])
    assert "caption 1 of 1: a NUL character" in problems_of(save, host, pictures(2), "a\0")
    masks = problems_of(save, host, pictures(2), "a", [torch.ones(2, 64, 64)])
    assert "masks 1, 2 of 2: another aspect ratio" in masks
    assert "mask 1 of 1: entirely black" in problems_of(save, host, pictures(2), "a", [torch.zeros(1, 64, 96)])
    image, both = pictures(1), [torch.ones(1, 64, 96), torch.full((1, 64, 96), 0.5)]
    assert "images 1 and 2 are equal, but their masks are not" in problems_of(save, host, [image, image], "a", both)


def test_a_caption_that_is_missing_is_reported(host, messages):
    save(host, pictures(3), ["a", " \n", "c"])
    assert any(text.startswith("captions 2 of 3 are empty") for text in messages)
    assert len(list(folder(host).glob("*.txt"))) == 2


@pytest.mark.parametrize("name", ["", "../x", "/x", "C:\\x", "a/../b", "con", ".x", "a//b", "x" * 200, "a\\b"])
def test_names_that_lead_elsewhere_are_refused(host, name):
    assert "name: " in problems_of(save, host, pictures(1), name=name)


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_a_link_that_leads_elsewhere_is_refused(host, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    host.paths.new_datasets.mkdir()
    folder(host).symlink_to(tmp_path / "elsewhere")
    assert "by a link" in problems_of(save, host, pictures(1)) and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3, "complete": true}', '{"files": {"a.png": {"content": 1, "sha256": 2}}}', "{"]
)
def test_a_damaged_list_is_refused(host, text):
    folder(host).mkdir(parents=True)
    (folder(host) / LIST).write_text(text)
    assert "can't be read" in problems_of(save, host, pictures(1))


def test_a_list_names_no_files_elsewhere(host):
    save(host, pictures(1), "a")
    (folder(host).parent / "other.png").write_bytes(b"x")
    value = json.loads((folder(host) / LIST).read_text("utf-8"))
    value["files"]["../other.png"] = {"content": "", "sha256": ""}
    (folder(host) / LIST).write_text(json.dumps(value))
    save(host, pictures(1, seed=9), "a")
    assert (folder(host).parent / "other.png").is_file()


def test_fingerprint_follows_the_folder(host):
    values = {"name": "cats"}
    empty = fingerprint(values, host.paths)
    save(host, pictures(1), "a")
    written = fingerprint(values, host.paths)
    save(host, pictures(1), "a")
    assert empty != written == fingerprint(values, host.paths)
    next(folder(host).glob("*.txt")).write_text("edited by hand")
    assert fingerprint(values, host.paths) != written


def graph(**more):
    """An exported workflow: the images come from nodes that only run in ComfyUI."""
    return graph_from_json(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
            "2": {"class_type": "FlorenceCaption", "inputs": {"image": ["1", 0]}},
            "3": {
                "class_type": "SaveDataset",
                "inputs": {"images": ["1", 0], "name": "cats", "captions": ["2", 0], "masks": ["1", 1]},
            },
            "4": {"class_type": "DatasetBackend", "inputs": {"folder": ["3", 0], "masks": ["3", 1], "resolution": 64}},
            **more,
        },
        schemas(),
    )


def test_a_headless_run_takes_what_comfyui_wrote(host, messages):
    save(host, pictures(2), "cat", [torch.ones(1, 64, 96)])
    assert check(graph(), CATALOGUE, host) == []
    outputs = execute(graph(), CATALOGUE, host)
    (dataset,) = outputs["4"]
    assert dataset.roots == dataset.mask_roots == (str(folder(host)),)
    assert dataset.parts[0].folder == dataset.parts[0].masks == "cats"  # no path of a machine
    assert len([text for text in messages if "as ComfyUI wrote them" in text]) == 1
    next(folder(host).glob("*.txt")).unlink()
    execute(graph(), CATALOGUE, host)
    assert any("not there any more: 1, such as" in text for text in messages)


def test_a_dataset_that_was_never_written_is_one_error(host):
    problems = check(graph(), CATALOGUE, host)
    assert len(problems) == 1 and problems[0].where == "node 3 (SaveDataset).name"
    assert "run the workflow in ComfyUI once, or copy the dataset there" in problems[0].message
    assert check(graph(), CATALOGUE, host, connections=False) == []  # in ComfyUI it is made


def test_two_nodes_of_one_name_are_refused(host):
    save(host, pictures(2), "cat")
    second = {"class_type": "SaveDataset", "inputs": {"images": ["1", 0], "name": "Cats"}}
    assert any(
        "is also the name of node 3" in str(problem) for problem in check(graph(**{"9": second}), CATALOGUE, host)
    )


def test_images_of_our_own_nodes_are_written_headless(host):
    """ValidateSampler's images, for example: nothing is taken from an earlier run."""
    image = pictures(1)
    chart = replace(CATALOGUE["CheckLoRA"], inputs=Nothing, run=lambda inputs, host: ("", [image], None, ""))
    nodes = {
        "1": {"class_type": "CheckLoRA", "inputs": {}},
        "2": {"class_type": "SaveDataset", "inputs": {"images": ["1", 1], "name": "cats", "captions": "cat"}},
    }
    execute(graph_from_json(nodes, schemas()), {**CATALOGUE, "CheckLoRA": chart}, host)
    assert len(list(folder(host).glob("*.png"))) == 1


@dataclass(frozen=True)
class Nothing:
    """The inputs of a node without any."""
