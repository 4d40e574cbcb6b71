"""Writes comfyui_sigmas.json beside itself: the noise levels that a ComfyUI checkout computes.

    python comfyui_sigmas.py PATH_OF_COMFYUI     (needs torch, numpy and scipy; nothing of ours)

Only the functions concerned are taken out of ComfyUI's files, so that none of its other requirements are needed.
The committed file: ComfyUI 0.33.0, scipy 1.17.1, torch 2.13.0, x86-64. scipy 1.11.4 gave the same file.
"""

import ast
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy
import scipy.stats  # pyright: ignore[reportMissingImports]  # comes with ComfyUI
import torch

SHIFTS = (0.01, 0.5, 1.0, 1.73, 3.0, 3.158, 10.0)
STEPS = (*range(1, 61), 75, 100, 150, 200, 333, 500, 999, 1000, 1500)
IN_FULL = ((26, 1.0), (7, 3.0), (3, 0.01))
FLUX_SHIFTS = (-1.0, 0.0, 0.5, 1.15, 3.0)  # of ModelSamplingFlux: logarithms


def take(path: Path, names: set[str], space: dict) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    exec(compile(tree, str(path), "exec"), space)


comfy = Path(sys.argv[1]) / "comfy"
space: dict[str, Any] = {"torch": torch, "numpy": numpy, "scipy": scipy, "math": math}
samplings = {"time_snr_shift", "ModelSamplingDiscreteFlow", "flux_time_shift", "ModelSamplingFlux"}
take(comfy / "model_sampling.py", samplings, space)
take(comfy / "samplers.py", {"simple_scheduler", "normal_scheduler", "beta_scheduler"}, space)

crc: dict[str, dict[str, list[int]]] = {}
flux: dict[str, dict[str, list[int]]] = {}
full: dict[str, list[float]] = {}
for scheduler in ("beta", "simple", "normal"):
    for shift in SHIFTS:
        model_sampling = space["ModelSamplingDiscreteFlow"]()
        model_sampling.set_parameters(shift=shift, multiplier=1.0)  # as ModelSamplingAuraFlow does
        sigmas = {steps: space[f"{scheduler}_scheduler"](model_sampling, steps) for steps in STEPS}
        crc.setdefault(scheduler, {})[str(shift)] = [zlib.crc32(sigmas[steps].numpy().tobytes()) for steps in STEPS]
        full |= {f"{scheduler} {n} {shift}": sigmas[n].tolist() for n, s in IN_FULL if s == shift}
    for mu in FLUX_SHIFTS:
        model_sampling = space["ModelSamplingFlux"]()
        model_sampling.set_parameters(shift=mu)
        sigmas = [space[f"{scheduler}_scheduler"](model_sampling, steps) for steps in STEPS]
        flux.setdefault(scheduler, {})[str(mu)] = [zlib.crc32(s.numpy().tobytes()) for s in sigmas]

text = json.dumps({"steps": STEPS, "crc32": crc, "crc32_flux": flux, "sigmas": full}, separators=(",", ":"))
text = text.replace("},", "},\n").replace("],", "],\n") + "\n"
Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")
