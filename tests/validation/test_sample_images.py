"""File names of validation images."""

from __future__ import annotations

from chroma_trainer.trainer_core.validation.sample_images import file_names


def test_names_of_prompts_become_names_of_files():
    labels = ["cat face", "Cat Face", "a/b: c?", "猫", "...", "x" * 200]
    names = file_names(labels)
    assert list(names) == labels
    assert list(names.values()) == ["cat face", "Cat Face-2", "a_b_ c_", "猫", "prompt", "x" * 60]
