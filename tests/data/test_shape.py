"""Which part of an image is trained, at which size, and which images are skipped for their shape."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chroma_trainer.nodes import dataset_backend
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.data.buckets import place
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.host import Paths, SinkHost
from PIL import Image

ASPECTS = "1:1, 2:3, 16:9"
SIZES = [
    (1024, 1024), (1000, 900), (900, 1000), (800, 1200), (600, 800), (700, 1100), (1920, 1080), (1600, 1000), (1300, 1000),
    (1200, 1000), (500, 2000), (2000, 500), (630, 480), (480, 640), (1080, 1920), (1000, 1001), (333, 500), (500, 333),
    (4000, 1000), (100, 100),
]  # fmt: skip


def bucket(size: tuple[int, int], config: FolderConfig, seed: int = 0, key: str = "0/a.png") -> tuple[int, int]:
    return place(*size, config, seed, key).bucket


def test_the_closest_of_the_aspects_is_the_bucket_of_20_sizes():
    config = FolderConfig(crop_aspect="closest", aspects=ASPECTS)
    square, tall, wide = (1024, 1024), (832, 1280), (1344, 768)
    expected = [
        square, square, square, tall, tall, tall, wide, wide, square, square, tall, wide, square, tall, tall, square, tall,
        wide, wide, square,
    ]  # fmt: skip
    assert [bucket(size, config) for size in SIZES] == expected and not config.problems()


def test_a_random_aspect_is_chosen_once_for_each_image_and_seed():
    config = FolderConfig(crop_aspect="random", aspects=ASPECTS)
    names = [f"0/{number}.png" for number in range(60)]
    chosen = [bucket((1000, 1000), config, 7, name) for name in names]
    assert set(chosen) == {(1024, 1024), (832, 1280), (1344, 768)} and min(map(chosen.count, set(chosen))) > 10
    assert chosen == [bucket((1000, 1000), config, 7, name) for name in names]
    assert chosen != [bucket((1000, 1000), config, 8, name) for name in names]


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"crop_aspect": "random"}, "aspects", "is empty, but crop_aspect is random"),
        ({"aspects": "1:1"}, "aspects", "but crop_aspect is preserve"),
        ({"crop_aspect": "closest", "aspects": "1:1, 5:1"}, "aspects", "'5:1' is not an aspect ratio from 1:4 to 4:1"),
        ({"crop_aspect": "closest", "aspects": "1:0"}, "aspects", "'1:0' is not an aspect ratio"),
        ({"crop_aspect": "closest", "aspects": "wide"}, "aspects", "write width:height, such as 2:3"),
        ({"crop_aspect": "closest", "aspects": "1:1", "crop": False}, "crop_aspect", "but crop is off"),
        ({"min_aspect": 2.0, "max_aspect": 0.5}, "min_aspect", "every image would be skipped"),
        ({"max_upscale": 0.5}, "max_upscale", "use 1 to never enlarge"),
        ({"crop_style": "mask"}, "crop_style", "masks is empty"),
        ({"resolutions": "512, big"}, "resolutions", "'big' is not a resolution"),
        ({"resolutions": "512, 512"}, "resolutions", "names a resolution twice"),
        ({"resolutions": ",".join(map(str, range(512, 529)))}, "resolutions", "use at most 16"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_together_are_problems(values, field, message):
    (problem,) = FolderConfig(**values).problems()
    assert problem.field == field and message in problem.message


def test_images_of_other_shapes_are_skipped_by_choice(pictures, host):
    for name, size in (("square", (64, 64)), ("tall", (40, 90)), ("wide", (150, 60)), ("small", (40, 40))):
        pictures(f"{name}.png", size)
    config = pictures.config(min_aspect=0.5, max_aspect=2.0, max_upscale=1.5, on_broken="stop")
    index = build_index(config, host, 0)
    assert [sample.name for sample in index.samples] == ["square.png"]
    assert [entry["reason"] for entry in index.report["skipped"]] == [
        "it would be enlarged 1.60 times, max_upscale is 1.5",
        "its aspect ratio 40 x 90 is 0.444, min_aspect is 0.5",
        "its aspect ratio 150 x 60 is 2.5, max_aspect is 2",
    ]
    exact = build_index(pictures.config(max_upscale=1.6, min_aspect=0.9, max_aspect=1.1), host, 0)
    assert [sample.name for sample in exact.samples] == ["small.png", "square.png"]


def dataset_of(pictures, **values) -> DatasetConfig:
    inputs = dataset_backend.Inputs(**{"folder": "pictures", "resolution": 64, **values})
    folder = pictures.folder
    paths = Paths(output=folder, cache=folder, datasets=(folder.parent,))
    return dataset_backend.run(inputs, SinkHost(paths=paths))[0]


@pytest.mark.parametrize(
    ("boxes", "left"),
    [
        ([150, 10, 170, 30], 128), ([[0, 0, 10, 10]], 0), ([{"x": 90, "y": 0, "width": 20, "height": 20}], 68),
        ([[60, 0, 80, 9], [120, 0, 140, 60]], 68), ("[[90, 0, 110, 20]]", 68), (None, 68), ([], 68),
    ],
)  # fmt: skip
def test_a_crop_goes_around_the_boxes_as_far_as_the_image_allows(pictures, host, boxes, left):
    pictures("a.png", (200, 64))
    row = json.dumps({"file_name": "a.png", "text": "x", "boxes": boxes})
    (pictures.folder / "metadata.jsonl").write_text(row, encoding="utf-8")
    asked = dataset_of(pictures, captions="table", crop_style="boxes", crop_aspect="square")
    index = build_index(asked, host, 0)
    (sample,) = index.samples
    assert sample.placement.crop == (left, 0) and sample.placement.bucket == (64, 64)
    assert ("num_without_boxes" in index.report) == (not boxes)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([[190, 0, 201, 10]], "its box [190, 0, 201, 10] is outside of the image, which has 200 x 64 pixels"),
        ([[-1, 0, 5, 5]], "its box [-1, 0, 5, 5] is outside"),
    ],
)
def test_a_box_outside_of_its_image_is_named(pictures, host, boxes, reason):
    pictures("a.png", (200, 64))
    pictures("b.png", (64, 64))
    rows = [{"file_name": "a.png", "boxes": boxes}, {"file_name": "b.png"}]
    (pictures.folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    index = build_index(dataset_of(pictures, crop_style="boxes"), host, 0)  # captions are those of the files
    assert index.report["skipped"][0]["reason"].startswith(reason)


def test_a_crop_goes_around_the_white_of_a_mask(pictures, host, tmp_path):
    pictures("a.png", (200, 64))
    mask = Image.new("L", (100, 32), 20)
    mask.paste(255, (80, 0, 90, 10))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    config = pictures.config(masks="masks", crop_style="mask", crop_aspect="square")
    index = build_index(replace(config, mask_roots=(str(tmp_path / "masks"),)), host, 0)
    (sample,) = index.samples
    assert sample.placement.crop == (136, 0) and index.masks
    of_mask = index.masks.of(sample)
    assert of_mask and of_mask.placement == sample.placement


def test_a_list_of_resolutions_is_as_many_chained_nodes(pictures):
    pictures("a.png")
    several = dataset_of(pictures, resolutions="512, 768, 1024")
    chained = None
    for edge in (512, 768, 1024):
        inputs = dataset_backend.Inputs(folder="pictures", resolution=edge, dataset=chained)
        paths = Paths(output=pictures.folder, cache=pictures.folder, datasets=(pictures.folder.parent,))
        (chained,) = dataset_backend.run(inputs, SinkHost(paths=paths))
    assert several == chained and len(several.parts) == 3
