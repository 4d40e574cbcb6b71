"""The base model's validation images in a run's folder."""

from __future__ import annotations

import numpy as np
from chroma_trainer.trainer_core.validation.base_images import FILE, load_base, save_base

PICTURES = {
    (48, 32): [np.full((32, 48, 3), value, np.uint8) for value in (7, 250)],
    (32, 32): [np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)],
}


def test_what_is_saved_is_loaded(tmp_path):
    save_base(tmp_path, "a key", PICTURES)
    loaded = load_base(tmp_path, "a key")
    assert loaded and loaded.keys() == PICTURES.keys() and load_base(tmp_path, "another key") is None
    for size, images in PICTURES.items():
        assert all(np.array_equal(a, b) for a, b in zip(images, loaded[size], strict=True))


def test_equal_images_are_equal_bytes(tmp_path):
    """safetensors orders metadata at random: a resumed run's file differed from that of a run that nobody touched."""
    files = set()
    for number in range(16):  # two keys: the chance that all are in one order by accident is 2^-15
        save_base(tmp_path / str(number), "a key", PICTURES)
        files.add((tmp_path / str(number) / FILE).read_bytes())
    assert len(files) == 1
