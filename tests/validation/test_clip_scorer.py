"""Scores of images by CLIP: what they are, and which files are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from chroma_trainer.nodes.validate_sampler import Inputs, preflight, settings_of
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.validation.render import draw
from chroma_trainer.trainer_core.validation.scores.clip_scorer import ClipScorer, Preprocessor
from chroma_trainer.trainer_core.validation.scores.image_scores import ImageScores, describe_scores, difference
from chroma_trainer.trainer_core.validation.scores.score_model import find_local, score_cost, score_problems

SETTINGS = ValidationConfig(prompts='{"cat": "a red cat", "dog": "the dog"}', resolutions="32x32, 48x16", score="clip")
CPU = torch.device("cpu")


@pytest.fixture
def host(tmp_path):
    return SinkHost(Paths(tmp_path / "out", tmp_path / "cache"), device="cpu")


def pictures_of(seed: int):
    generator = np.random.default_rng(seed)
    sizes = {(32, 32): (32, 32, 3), (48, 16): (16, 48, 3)}
    return {size: [generator.integers(0, 255, shape, np.uint8) for _ in range(2)] for size, shape in sizes.items()}


def test_scores_are_cosines(tiny_clip, host):
    """100 cos(image, prompt), and the mean cosine with the held-out images, as transformers computes the embeddings."""
    from transformers import CLIPModel, PreTrainedTokenizerFast

    held_out = [image for images in pictures_of(1).values() for image in images]
    scorer = ClipScorer(replace(SETTINGS, score_model=str(tiny_clip)), held_out, CPU, host)
    first, second = scorer.score([pictures_of(2), pictures_of(3)])
    model, pixels = CLIPModel.from_pretrained(tiny_clip).eval(), Preprocessor(scorer.model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_clip / "tokenizer.json"))

    @torch.no_grad()
    def output(text: str, images: list[np.ndarray]):
        ids = torch.tensor([tokenizer(text).input_ids])
        return model(input_ids=ids, pixel_values=torch.stack([pixels(image) for image in images]))

    images = [image for images in pictures_of(3).values() for image in images]
    cosines = {text: output(text, images) for text in ("a red cat", "the dog")}
    expected = [
        100 * float(result.image_embeds[i] @ result.text_embeds[0])
        for i, result in enumerate([cosines["a red cat"], cosines["the dog"]] * 2)
    ]
    assert list(second.prompts) == ["cat", "dog", "cat", "dog"]
    assert second.clip == pytest.approx(expected, abs=1e-3) and second.clip != first.clip
    held = output("x", held_out).image_embeds
    assert second.likeness == pytest.approx((cosines["the dog"].image_embeds @ held.T).mean(1).tolist(), abs=1e-5)
    assert second.by_prompt["cat"] == pytest.approx((expected[0] + expected[2]) / 2, abs=1e-3)


def test_an_image_is_prepared_as_transformers_does(tiny_clip):
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    theirs = kind(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model = find_local(str(tiny_clip))
    assert model
    for shape in ((32, 32, 3), (17, 51, 3), (40, 16, 3)):
        image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        (wanted,) = theirs(image, return_tensors="pt", input_data_format="channels_last").pixel_values
        assert torch.allclose(Preprocessor(model)(image), wanted, atol=1e-5)


def test_errors_are_over_images():
    base, later = ImageScores(["a", "b"], [20.0, 30.0], [0.5, 0.7]), ImageScores(["a", "b"], [21.0, 32.0], [0.6, 0.9])
    assert difference(later.clip, base.clip) == (1.5, 0.5)
    assert describe_scores(later, base) == (
        "CLIP score 26.50 +- 5.50 (+1.50 +- 0.50 from the base model); likeness to held-out images 0.7500 +- 0.1500 "
        "(+0.1500 +- 0.0500 from the base model)"
    )
    assert describe_scores(ImageScores(["a"], [20.0])) == "CLIP score 20.00"
    assert ImageScores.from_json(json.loads(json.dumps(later.as_json()))) == later
    with pytest.raises(ValueError):
        ImageScores.from_json({"prompts": ["a"], "clip": [], "likeness": []})


def damage(folder, what):
    """Damage a copy of the CLIP's folder, and return the message about it."""
    from safetensors.torch import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return "has no model.safetensors (pickle files are not read)"
    if what == "tokenizer":
        (folder / "tokenizer.json").unlink()
        return "has no tokenizer.json, or vocab.json and merges.txt"
    if what == "text tower alone":
        save_file({key: t for key, t in load_file(weights).items() if not key.startswith("vis")}, weights)
        return "model.safetensors has no visual_projection.weight: both towers are needed"
    if what == "kind":
        config.write_text('{"model_type": "siglip"}', "utf-8")
        return "is of the kind 'siglip', not clip"
    values = json.loads(config.read_text("utf-8"))
    values["vision_config"]["image_size"] = -1
    config.write_text(json.dumps(values), "utf-8")
    return "has image_size -1 in its config.json"


@pytest.mark.parametrize("what", ["pickle", "tokenizer", "text tower alone", "kind", "config"])
def test_what_is_no_clip_is_refused_by_check(tiny_clip, tmp_path, what):
    folder = tmp_path / "models" / "clip_vision" / "copy"
    shutil.copytree(tiny_clip, folder)
    message = damage(folder, what)
    host = SinkHost(Paths(tmp_path, tmp_path, models={"clip_vision": (folder.parent,)}))
    (problem,) = preflight(Inputs(prompts="a cat", score="clip", score_model="copy"), host)
    assert problem.field == "score_model" and message in problem.message
    assert preflight(Inputs(prompts="a cat", score_model="copy"), host) == []  # the model is not used


def test_a_model_is_named_as_others_are(tiny_clip, tmp_path):
    host = SinkHost(Paths(tmp_path, tmp_path, models={"clip_vision": (tiny_clip.parent,)}))
    settings = settings_of(Inputs(prompts="a cat", score="clip", score_model="tiny-clip"), host)
    assert settings.score_model == str(tiny_clip) and score_problems(settings) == []
    with pytest.raises(UserError, match="'nowhere' is not a folder of the folders of models"):
        settings_of(Inputs(prompts="a cat", score="clip", score_model="nowhere"), host)
    (problem,) = preflight(Inputs(prompts="a cat", score="clip"), host)  # the tests are offline
    assert "openai/clip-vit-large-patch14 is not on this machine, and HF_HUB_OFFLINE is set" in problem.message


def test_the_plan_counts_the_model(tiny_clip):
    cost = score_cost(replace(SETTINGS, score_model=str(tiny_clip)))
    assert cost.weights > cost.vision > 0 and cost.flops > cost.vision // 4
    assert score_cost(replace(SETTINGS, score="none")).weights == 0
    assert score_cost(SETTINGS).weights == 4 * 427_616_512  # the released model, which is not on this machine


def test_images_outside_of_a_run_are_scored(tiny_model, tiny_clip, tmp_path):
    texts = []
    host = SinkHost(
        Paths(tmp_path / "out", tmp_path / "cache"),
        (lambda event: texts.append(event.text) if isinstance(event, Notice) else None,), device="cpu",
    )  # fmt: skip
    settings = ValidationConfig(
        prompts="a red cat", resolutions="32x32", steps=1, cfg=1.0, score="clip", score_model=str(tiny_clip)
    )
    draw(settings, tiny_model, None, host)
    (line,) = [text for text in texts if "CLIP" in text]
    assert line.startswith("base: CLIP score ") and math.isfinite(float(line.split()[3]))
