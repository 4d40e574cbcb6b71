"""Writes comfyui_euler.json beside itself: latents that a ComfyUI checkout samples from a toy velocity.

    python comfyui_euler.py PATH_OF_COMFYUI     (needs torch, numpy and scipy; nothing of ours)

Only the functions concerned are taken out of ComfyUI's files.
The committed file: ComfyUI 0.33.0, scipy 1.17.1, torch 2.13.0.
"""

import ast
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import scipy.stats  # pyright: ignore[reportMissingImports]  # comes with ComfyUI
import torch

SEED, SHAPE = 20240607, (1, 2, 3, 4)  # a picture of 32 x 24 pixels with 2 channels
POSITIVE, NEGATIVE = 0.75, -0.5  # all that the toy model sees of a prompt
CASES = (("beta", 26, 1.0, 3.5), ("beta", 8, 1.0, 1.0), ("simple", 12, 3.0, 2.0), ("normal", 5, 1.73, 7.0))


def velocity(x, sigma, text):
    """Only products and sums, so that every processor gives the same bits."""
    return (x * 0.875 - text) * 0.5 + x * sigma * 0.25 + x * x * 0.03125


def take(path: Path, names: set[str], space: dict) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    exec(compile(tree, str(path), "exec"), space)


comfy = Path(sys.argv[1]) / "comfy"
append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # noqa: E731
space: dict[str, Any] = {"torch": torch, "numpy": numpy, "scipy": scipy, "math": math, "np": numpy}
space |= {"utils": SimpleNamespace(append_dims=append_dims), "trange": lambda n, disable=None: range(n)}
take(comfy / "model_sampling.py", {"time_snr_shift", "ModelSamplingDiscreteFlow", "CONST", "reshape_sigma"}, space)
take(comfy / "samplers.py", {"simple_scheduler", "normal_scheduler", "beta_scheduler", "cfg_function"}, space)
take(comfy / "k_diffusion" / "sampling.py", {"sample_euler", "to_d"}, space)
take(comfy / "sample.py", {"prepare_noise_inner"}, space)
Sampling: Any = type("Sampling", (space["ModelSamplingDiscreteFlow"], space["CONST"]), {})

results = []
for scheduler, steps, shift, cfg in CASES:
    sampling = Sampling()
    sampling.set_parameters(shift=shift, multiplier=1.0)
    sigmas = space[f"{scheduler}_scheduler"](sampling, steps)
    empty = torch.zeros(SHAPE)
    noise = space["prepare_noise_inner"](empty, torch.manual_seed(SEED))

    def model(x, sigma, sampling=sampling, cfg=cfg):
        positive, negative = (
            sampling.calculate_denoised(sigma, velocity(x, sigma.view(-1, 1, 1, 1), text), x)
            for text in (POSITIVE, NEGATIVE)
        )
        return positive if cfg == 1 else space["cfg_function"](None, positive, negative, cfg, x, sigma)

    x = sampling.noise_scaling(sigmas[0], noise.clone(), empty)
    x = sampling.inverse_noise_scaling(sigmas[-1], space["sample_euler"](model, x, sigmas))
    case = {"scheduler": scheduler, "steps": steps, "shift": shift, "cfg": cfg}
    results.append({**case, "noise": noise.flatten().tolist(), "latents": x.flatten().tolist()})

Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
