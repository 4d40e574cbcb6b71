"""AdaptiveGuider in a real ComfyUI: the same latents as our own sampler, steps counted as steps, and no memory of earlier runs."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.flow.adaptive_guidance import AdaptiveGuidance, guide, similarity
from chroma_trainer.trainer_core.validation.euler import sample
from safetensors.torch import load_file

from tests.narrowing import present

pytestmark = pytest.mark.comfyui
SIZE, STEPS, SEED, CFG = 64, 8, 7, 4.0
LINE_SECONDS = 20
SCALE, SHIFT = 0.3611, 0.1159  # of ComfyUI's Flux latents
TOLERANCE: dict[str, Any] = {
    "rtol": 1e-5,
    "atol": 1e-5,
}  # two implementations of the transformer in fp32 over 8 steps; 2e-6 was measured


def graph(chroma, sampler="euler", seed=SEED, steps=STEPS, **fields):
    file = str(chroma.folder / "texts.safetensors")
    return {
        "model": {
            "class_type": "ProbeChroma",
            "inputs": {"config": json.dumps(chroma.config), "weights": str(chroma.folder / "weights.safetensors")},
        },
        "shift": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["model", 0], "shift": 1.0}},
        "positive": {"class_type": "ProbeConditioning", "inputs": {"file": file, "name": "positive"}},
        "negative": {"class_type": "ProbeConditioning", "inputs": {"file": file, "name": "negative"}},
        "guider": {
            "class_type": "AdaptiveGuider",
            "inputs": {
                "model": ["shift", 0], "positive": ["positive", 0], "negative": ["negative", 0], "threshold": 1.0,
                "cfg": CFG, "uncond_zero_scale": 0.0, "cfg_start_pct": 0.0, "initial_disabled_steps": 0,
                "compare": False, **fields,
            },
        },
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": sampler}},
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["shift", 0], "scheduler": "beta", "steps": steps, "denoise": 1.0},
        },
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1}},
        "sample": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0], "latent_image": ["empty", 0],
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "guider"}},
    }  # fmt: skip


def latents_of(server, prompt):
    """Normalised latents, and the line that the guider showed."""
    before = len(server.log)
    history = server.run(prompt)
    found = history["outputs"]["save"]["latents"][0]
    latents = load_file(server.output / found["subfolder"] / found["filename"])["latent_tensor"]
    until = time.monotonic() + (LINE_SECONDS if prompt["guider"]["class_type"] == "AdaptiveGuider" else 0)
    while not (shown := re.findall(r"node guider: (.*)\n", server.log[before:])) and time.monotonic() < until:
        time.sleep(0.1)  # the line goes to the page by itself, and may come after the history
    return (latents - SHIFT) * SCALE, shown[-1] if shown else ""


def ours(chroma, guidance):
    """Latents of our sampler, and the similarity at each step."""
    return sample(
        chroma.family, chroma.transformer, chroma.texts["positive"], chroma.texts["negative"], width=SIZE, height=SIZE,
        steps=STEPS, cfg=CFG, seed=SEED, channels=16, factor=8, guidance=guidance,
    )  # fmt: skip


def similarities(chroma):
    """Of every step under full CFG."""
    seen = []

    class Told(AdaptiveGuidance):
        def start(self, *args, **keywords):
            run = super().start(*args, **keywords)
            inner = run.denoise

            def denoise(sigma, predict, combine=guide):
                def told(both):
                    cond, uncond = predict(both)
                    seen.append(similarity(cond, uncond))
                    return cond, uncond

                return inner(sigma, told, combine)

            run.denoise = denoise
            return run

    ours(chroma, Told(cfg=CFG, threshold=1.0))
    return seen


def middle_threshold(chroma):
    """A threshold that is reached well within the run, and away from every step's value."""
    seen = similarities(chroma)
    highest = [max(seen[: i + 1]) for i in range(len(seen))]
    step = next(i for i in range(2, STEPS - 2) if seen[i] - highest[i - 1] > 5e-5)
    return (seen[step] + highest[step - 1]) / 2, step


def test_it_agrees_with_our_sampler(each_comfyui, chroma):
    threshold, step = middle_threshold(chroma)
    cases: list[dict[str, Any]] = [
        {"threshold": 1.0},
        {"threshold": threshold},
        {"threshold": threshold, "uncond_zero_scale": 0.8},
        {"cfg_start_pct": 0.3, "initial_disabled_steps": 2},
    ]
    for fields in cases:
        guidance = replace(AdaptiveGuidance(cfg=CFG, threshold=1.0), **fields)
        latents, shown = latents_of(each_comfyui, graph(chroma, **fields))
        torch.testing.assert_close(latents, ours(chroma, guidance), **TOLERANCE)
        assert "negative passes skipped" in shown
    assert (
        f"positive prompt only after step {step + 1}"
        in latents_of(each_comfyui, graph(chroma, seed=SEED + 0, threshold=threshold, compare=True))[1]
    )


def test_threshold_1_is_comfyuis_own_cfg_to_the_bit(each_comfyui, chroma):
    for sampler in ("euler", "heun", "dpmpp_2m"):
        prompt = graph(chroma, sampler)
        guided, _ = latents_of(each_comfyui, prompt)
        prompt["guider"] = {
            "class_type": "CFGGuider",
            "inputs": {"model": ["shift", 0], "positive": ["positive", 0], "negative": ["negative", 0], "cfg": CFG},
        }
        plain, _ = latents_of(each_comfyui, prompt)
        assert torch.equal(guided, plain), sampler


@pytest.mark.parametrize(
    ("sampler", "disabled", "skipped", "passes"),
    [
        ("euler", 3, 3, 8), ("dpmpp_2m", 3, 3, 8),
        ("heun", 1, 2, 15), ("heun", 3, 6, 15), ("dpm_2", 2, 4, 15), ("heun", 8, 15, 15),
    ],
)  # fmt: skip
def test_disabled_steps_are_steps_in_every_run(each_comfyui, chroma, sampler, disabled, skipped, passes):
    """Heun evaluates twice a step but the last. The guider itself is cached by ComfyUI between the two runs."""
    for seed in (1, 2):
        _, shown = latents_of(each_comfyui, graph(chroma, sampler, seed=seed, initial_disabled_steps=disabled))
        assert shown.startswith(f"{skipped} of {passes} negative passes skipped"), (seed, shown)


def test_compare_tells_the_distance_to_full_cfg(each_comfyui, chroma):
    threshold, _ = middle_threshold(chroma)
    adaptive = ours(chroma, AdaptiveGuidance(cfg=CFG, threshold=threshold))
    full = ours(chroma, AdaptiveGuidance(cfg=CFG, threshold=1.0))
    latents, shown = latents_of(each_comfyui, graph(chroma, threshold=threshold, compare=True, seed=SEED))
    torch.testing.assert_close(latents, adaptive, **TOLERANCE)
    told = float(present(re.search(r"latents differ by ([\d.]+)% from CFG", shown))[1]) / 100
    unscaled = [x / SCALE + SHIFT for x in (adaptive, full)]
    assert told == pytest.approx(float((unscaled[0] - unscaled[1]).norm() / unscaled[1].norm()), rel=0.02, abs=1e-4)
