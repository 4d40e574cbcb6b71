import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.flow.adaptive_guidance import AdaptiveGuidance
from chroma_trainer.trainer_core.flow.sigmas import NUM_LEVELS_FLUX, sampling_sigmas
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.validation.euler import sample, starting_noise

REFERENCE = json.loads((Path(__file__).parent / "references" / "comfyui_euler.json").read_text(encoding="utf-8"))
POSITIVE, NEGATIVE = torch.full((3, 1), 0.75), torch.full((5, 1), -0.5)
MODEL = torch.nn.Linear(1, 1)
SETTINGS: dict[str, Any] = {"width": 32, "height": 24, "channels": 2, "factor": 8, "seed": 20240607}


class Toy(ChromaFamily):
    """A family whose velocity is that of references/comfyui_euler.py. Remembers what it was asked."""

    def __init__(self):
        self.sigmas, self.texts = [], []

    def predict(self, transformer, x_sigma, sigma, text, reference=None, route=None):
        x = x_sigma
        assert x.dtype == sigma.dtype == torch.float32 and sigma.shape == (1,) and len(text) == 1
        assert not torch.is_grad_enabled()
        self.sigmas.append(sigma.item())
        self.texts.append("positive" if torch.equal(text[0], POSITIVE) else "negative")
        sigma = sigma.view(-1, 1, 1, 1)
        return (x * 0.875 - text[0].mean()) * 0.5 + x * sigma * 0.25 + x * x * 0.03125


class Point(ChromaFamily):
    """A world with one picture in it: the velocity from anywhere points away from it."""

    picture = torch.linspace(-2, 2, 24).view(1, 2, 3, 4)

    def predict(self, transformer, x_sigma, sigma, text, reference=None, route=None):
        return (x_sigma - self.picture) / sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["scheduler"])
def test_latents_are_comfyuis(case):
    settings: dict[str, Any] = {name: case[name] for name in ("scheduler", "steps", "shift", "cfg")}
    latents = sample(Toy(), MODEL, POSITIVE, NEGATIVE, **SETTINGS, **settings)
    assert latents.shape == (1, 2, 3, 4) and latents.dtype == torch.float32
    assert starting_noise(32, 24, seed=20240607, channels=2, factor=8).flatten().tolist() == case["noise"]
    assert latents.flatten().tolist() == case["latents"]


@pytest.mark.parametrize("steps", [1, 4, 26])
def test_euler_is_exact_on_a_straight_path(steps):
    latents = sample(Point(), MODEL, POSITIVE, None, **SETTINGS, steps=steps, cfg=1.0)
    torch.testing.assert_close(latents, Point.picture, rtol=0, atol=2e-6)


def test_cfg_1_is_a_single_pass_and_needs_no_negative_prompt():
    toy = Toy()
    sample(toy, MODEL, POSITIVE, None, **SETTINGS, steps=4, cfg=1.0)
    assert toy.texts == ["positive"] * 4
    assert toy.sigmas == sampling_sigmas("beta", 4)[:-1].tolist()


def test_the_family_says_how_finely_comfyui_divides_the_sigmas_of_its_model():
    toy = Toy()
    toy.num_noise_levels = lambda transformer: NUM_LEVELS_FLUX
    sample(toy, MODEL, POSITIVE, None, **SETTINGS, steps=7, cfg=1.0, scheduler="simple", shift=3.0)
    assert toy.sigmas == sampling_sigmas("simple", 7, 3.0, NUM_LEVELS_FLUX)[:-1].tolist()
    assert toy.sigmas != sampling_sigmas("simple", 7, 3.0)[:-1].tolist()


def test_cfg_is_two_real_passes():
    toy = Toy()
    sample(toy, MODEL, POSITIVE, NEGATIVE, **SETTINGS, steps=3, cfg=3.5)
    assert toy.texts == ["positive", "negative"] * 3


def test_cfg_without_a_negative_prompt_is_our_fault():
    with pytest.raises(AssertionError):
        sample(Toy(), MODEL, POSITIVE, None, **SETTINGS, steps=3, cfg=3.5)


def test_each_step_is_reported_and_may_end_the_run():
    seen = []

    def on_step(done, total, denoised):
        seen.append((done, total, tuple(denoised.shape)))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(Toy(), MODEL, POSITIVE, None, **SETTINGS, steps=4, cfg=1.0, on_step=on_step)
    assert seen == [(1, 4, (1, 2, 3, 4)), (2, 4, (1, 2, 3, 4))]


@pytest.fixture(scope="module")
def chroma(tiny_model):
    family = ChromaFamily()
    encoder = family.load_text_encoder(tiny_model, torch.device("cpu"))
    return family, family.load_transformer(tiny_model), encoder.encode(["a red cat", "a blue dog of the photo"])


def test_a_real_chroma_is_sampled_the_same_each_time(chroma):
    family, transformer, (positive, negative) = chroma
    settings: dict[str, Any] = {"width": 64, "height": 48, "channels": 16, "factor": 8, "seed": 3, "steps": 3}
    first, second = (sample(family, transformer, positive, negative, **settings, cfg=3.5) for _ in range(2))
    assert first.shape == (1, 16, 6, 8) and first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(family, transformer, positive, None, **settings, cfg=1.0))


def test_cfg_between_equal_prompts_changes_nothing(chroma):
    family, transformer, (positive, _) = chroma
    settings: dict[str, Any] = {"width": 64, "height": 48, "channels": 16, "factor": 8, "seed": 3, "steps": 3}
    alone = sample(family, transformer, positive, None, **settings, cfg=1.0)
    guided = sample(family, transformer, positive, positive, **settings, cfg=7.0)
    torch.testing.assert_close(guided, alone, rtol=0, atol=1e-5)


def test_global_randomness_is_neither_used_nor_moved():
    torch.manual_seed(1)
    first = sample(Toy(), MODEL, POSITIVE, None, **SETTINGS, steps=2, cfg=1.0)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, sample(Toy(), MODEL, POSITIVE, None, **SETTINGS, steps=2, cfg=1.0))


def test_guidance_that_never_settles_is_plain_cfg():
    plain = sample(Toy(), MODEL, POSITIVE, NEGATIVE, **SETTINGS, steps=6, cfg=3.0)
    guidance = AdaptiveGuidance(cfg=3.0, threshold=1.0)
    assert torch.equal(plain, sample(Toy(), MODEL, POSITIVE, NEGATIVE, **SETTINGS, steps=6, cfg=1.0, guidance=guidance))


def test_guidance_saves_passes():
    toy = Toy()
    guidance = AdaptiveGuidance(cfg=3.0, threshold=0.0, initial_disabled_steps=1)
    sample(toy, MODEL, POSITIVE, NEGATIVE, **SETTINGS, steps=5, cfg=3.0, guidance=guidance)
    assert toy.texts.count("positive") == 5 and toy.texts.count("negative") < 4
