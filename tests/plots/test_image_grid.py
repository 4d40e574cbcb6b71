import json

import numpy as np
import pytest
from chroma_trainer.trainer_core.plots.canvas import PANEL, PAPER
from chroma_trainer.trainer_core.plots.image_grid import draw_grid, fit, save_png
from PIL import Image

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def plain(colour, width=64, height=64):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def places(image, colour):
    """(left, top, right, bottom) of the pixels of exactly this colour."""
    hit = (np.asarray(image) == np.array(colour, dtype=np.uint8)).all(-1)
    rows, columns = np.where(hit.any(1))[0], np.where(hit.any(0))[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(
    "size, shown",
    [
        ((64, 64), (192, 192)),
        ((64, 32), (192, 96)),
        ((16, 16), (160, 160)),
        ((159, 159), (318, 318)),
        ((160, 100), (160, 100)),
        ((512, 512), (512, 512)),
        ((1024, 1024), (512, 512)),
        ((832, 1216), (350, 512)),
        ((2048, 16), (512, 4)),
        ((1, 1), (160, 160)),
    ],
)
def test_pictures_are_shown_in_160_to_512_pixels(size, shown):
    assert fit(plain(RED, *size)).size == shown


def test_enlarging_tiny_pictures_keeps_their_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit(picture))[5::10, 5::10], picture)


def test_rows_and_columns_stand_in_order():
    page = draw_grid([[plain(RED), plain(GREEN)], [plain(BLUE), None]], ["a fox", "a cat"], ["base", "LoRA"], "Title")
    red, green, blue = places(page, RED), places(page, GREEN), places(page, BLUE)
    assert red[1] == green[1] and red[2] < green[0]
    assert red[0] == blue[0] and red[3] < blue[1]
    assert (red[2] - red[0], red[3] - red[1]) == (192, 192)


def test_labels_make_room_for_themselves_only():
    bare = draw_grid([[plain(RED)]], [], [])
    rows = draw_grid([[plain(RED)]], ["a fox"], [])
    columns = draw_grid([[plain(RED)]], [], ["base"])
    assert rows.width > bare.width and rows.height == bare.height
    assert columns.height > bare.height and columns.width == bare.width
    assert places(bare, RED) == (28, 28, 220, 220) and bare.size == (248, 248)


def test_a_longer_prompt_never_reaches_the_pictures():
    for prompt in ("fox", "a very long prompt " * 60, "x" * 900):
        page = draw_grid([[plain(RED)]], [prompt], [])
        left = places(page, RED)[0]
        gap = np.asarray(page)[:, left - 10 : left - 1]
        assert (gap == np.array(PAPER, dtype=np.uint8)).all()
        assert page.height == 248


def test_long_column_labels_and_titles_grow_the_head():
    short = draw_grid([[plain(RED), plain(GREEN)]], [], ["base", "LoRA"], "Title")
    labels = ["base", "LoRA at a strength of one half, by far"]
    long = draw_grid([[plain(RED), plain(GREEN)]], [], labels, "Title\nmore")
    assert places(long, RED)[1] > places(short, RED)[1] and long.width == short.width


def test_missing_pictures_are_pale_panels():
    page = draw_grid([[plain(RED), None]], [], [])
    assert places(page, PANEL)[0] > places(page, RED)[2]


def test_different_sizes_are_centred_in_their_cells():
    page = draw_grid([[plain(RED, 64, 32)], [plain(BLUE, 64, 64)]], [], [])
    red, blue = places(page, RED), places(page, BLUE)
    assert red[3] - red[1] == 96 and blue[3] - blue[1] == 192 and red[0] == blue[0]


def test_many_large_pictures_stay_within_what_viewers_open():
    page = draw_grid([[plain(RED, 300, 300)] * 40], [], [])
    assert page.width <= 8192 + 56


def test_bytes_are_the_same_each_time():
    grids = [draw_grid([[plain(RED)]], ["a fox"], ["base"], "Title").tobytes() for _ in range(2)]
    assert grids[0] == grids[1]


def test_saved_pictures_carry_what_made_them(tmp_path):
    path = tmp_path / "deep" / "grid.png"
    page, request = draw_grid([[plain(RED)]], [], []), {"name": "größe 猫", "steps": [1, 2]}
    save_png(page, path, request, workflow={"nodes": []}, prompt={"1": {"class_type": "LoadChroma"}})
    with Image.open(path) as image:
        assert json.loads(image.text["chroma_trainer"]) == request
        assert json.loads(image.text["workflow"]) == {"nodes": []}
        assert json.loads(image.text["prompt"]) == {"1": {"class_type": "LoadChroma"}}
        assert image.tobytes() == page.tobytes()
    raw = path.read_bytes()
    assert raw.count(b"tEXt") == 3 and b"iTXt" not in raw
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_a_picture_without_a_request_has_no_chunk(tmp_path):
    save_png(draw_grid([[plain(RED)]], [], []), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert not image.text


def test_a_request_that_is_not_json_leaves_the_old_picture(tmp_path):
    path = tmp_path / "grid.png"
    save_png(draw_grid([[plain(RED)]], [], []), path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        save_png(draw_grid([[plain(BLUE)]], [], []), path, {"loss": float("nan")})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
