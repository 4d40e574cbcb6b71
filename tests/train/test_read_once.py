"""What a run needs to know of the model's files, it finds out once: by its check, its plan and its loading together."""

from __future__ import annotations

import copy
import shutil
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.storage import model_header, safetensors_header
from chroma_trainer.trainer_core.train.run import run


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often the header of each file was parsed, and how often a transformer was built ("built")."""
    counter: Counter[Any] = Counter()

    def count(module: Any, name: str, key: Any) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: counter.update([key(args)]) or real(*args))

    count(safetensors_header, "read_header", lambda args: args[0])
    count(ChromaFamily, "build_on_meta", lambda args: "built")
    monkeypatch.setattr(model_header, "SETTLED_SECONDS", 0.0)  # else files that were just written are read each time
    monkeypatch.setattr(model_header, "_headers", OrderedDict())
    return counter


def test_a_run_parses_each_header_and_builds_the_transformer_once(workshop, counts):
    run(workshop.request(steps=1, rank=7), workshop.host())  # of this rank no costs are cached
    files = {path.parent.name: count for path, count in counts.items() if workshop.model.repo in str(path)}
    assert files == {"transformer": 1, "text_encoder": 1, "vae": 1}
    assert counts["built"] == 1


def test_a_transformer_is_shared_until_it_is_loaded(tiny_model, counts):
    family = ChromaFamily()
    shared = family.shared_transformer(tiny_model)
    assert shared is family.shared_transformer(replace(tiny_model, dtype="bf16"))
    assert family.load_transformer(tiny_model) is shared and counts["built"] == 1
    assert not any(tensor.is_meta for tensor in shared.state_dict().values())
    again = family.shared_transformer(tiny_model)
    assert again is not shared and all(parameter.is_meta for parameter in again.parameters())


def test_what_is_built_in_inference_mode_can_be_trained(tiny_model):
    with torch.inference_mode():  # as ComfyUI runs its nodes
        shared = ChromaFamily().shared_transformer(tiny_model)
    assert not any(tensor.is_inference() for tensor in (*shared.parameters(), *shared.buffers()))


def test_a_model_that_changes_between_check_and_load(tiny_model, tmp_path, counts):
    family, folder = ChromaFamily(), tmp_path / "model"
    shutil.copytree(tiny_model.repo, folder)
    model = replace(tiny_model, repo=str(folder))
    before = family.shared_transformer(model)
    (file,) = (folder / "transformer").glob("*.safetensors")
    shutil.copy2(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)  # the same bytes, but who knows
    loaded = family.load_transformer(model)
    assert loaded is not before and counts["built"] == 2
    assert counts[Path(file)] == 2


def test_only_the_last_two_transformers_are_held(tiny_model, tmp_path, counts):
    family, models = ChromaFamily(), []
    for name in "abc":
        shutil.copytree(tiny_model.repo, tmp_path / name)
        models.append(replace(tiny_model, repo=str(tmp_path / name)))
    for model in (models[0], models[1], models[0], models[2], models[0]):
        family.shared_transformer(model)
    assert counts["built"] == 3 and len(family._shared) == 2


def test_a_copy_of_a_transformer_is_one_that_is_built(tiny_model):
    family = ChromaFamily()
    copied, built = copy.deepcopy(family.shared_transformer(tiny_model)), family.empty_transformer(tiny_model)
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in built.named_modules()]
    for (name, tensor), (other, expected) in zip(copied.state_dict().items(), built.state_dict().items(), strict=True):
        assert (name, tensor.shape, tensor.dtype, tensor.device) == (
            other,
            expected.shape,
            expected.dtype,
            expected.device,
        )
        assert tensor.is_meta or torch.equal(tensor, expected)
