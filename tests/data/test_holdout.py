"""Held-out images: chosen by their names, and never trained in another form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.holdout import num_held, split


def held_names(samples, share: float) -> set[str]:
    return {sample.name for sample in split(samples, share)[1]}


@pytest.fixture
def at(pictures, host):
    """Returns the samples of twelve different pictures at these resolutions."""

    def make(*resolutions: int):
        for i in range(12):
            pictures(f"{i}.png", (64, 48), shade=i)
        config = pictures.config()
        parts = tuple(replace(config.parts[0], resolution_type="pixel_area", resolution=edge) for edge in resolutions)
        return build_index(replace(config, parts=parts, roots=config.roots * len(parts)), host, 0).samples

    return make


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
def test_a_picture_is_held_out_at_all_resolutions_or_at_none(at, share):
    samples = at(64, 96, 128)
    trained, held = split(samples, share)
    assert len(trained) + len(held) == len(samples) == 36
    assert not {sample.sha256 for sample in trained} & {sample.sha256 for sample in held}
    assert len(held) == 3 * min(11, max(1, round(12 * share))) == num_held(samples, share)


def test_another_resolution_changes_nothing(at):
    assert held_names(at(64), 0.25) == held_names(at(64, 96), 0.25)


def test_a_copy_under_another_name_is_on_the_same_side(pictures, host):
    for i in range(8):
        pictures(f"{i}.png", (64, 48), shade=i // 2)
    trained, held = split(build_index(pictures.config(), host, 0).samples, 0.25)
    assert len(held) == 2 and len({sample.sha256 for sample in held}) == 1
    assert len({sample.sha256 for sample in trained}) == 3


def test_copies_of_one_picture_are_split_as_others_are(pictures, host):
    for i in range(4):
        pictures(f"{i}.png", (64, 48), shade=1)
    trained, held = split(build_index(pictures.config(), host, 0).samples, 0.5)
    assert len(trained) == len(held) == 2


def test_different_pictures_are_held_out_by_their_names_alone(at):
    samples = at(64)
    for share in (0.1, 0.3, 0.5):
        assert len(split(samples, share)[1]) == num_held(samples, share) == round(12 * share)
    assert held_names(samples, 0.1) < held_names(samples, 0.3) < held_names(samples, 0.5)
    assert sorted(held_names(samples, 0.25)) == ["11.png", "6.png", "9.png"]
