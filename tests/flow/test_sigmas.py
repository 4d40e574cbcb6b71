import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from chroma_trainer.trainer_core.flow.sigmas import NUM_LEVELS, NUM_LEVELS_FLUX, sampling_sigmas

REFERENCE = json.loads((Path(__file__).parent / "references" / "comfyui_sigmas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", REFERENCE["sigmas"])
def test_levels_are_comfyuis(name):
    scheduler, steps, shift = name.split(" ")
    assert sampling_sigmas(scheduler, int(steps), float(shift)).tolist() == REFERENCE["sigmas"][name]


@pytest.mark.parametrize("scheduler", [pytest.param("beta", marks=pytest.mark.slow), "simple", "normal"])
@pytest.mark.parametrize(
    ("sums_of", "usual", "shift_of", "num_levels"),
    [("crc32", "1.0", float, NUM_LEVELS), ("crc32_flux", "1.15", lambda mu: math.exp(float(mu)), NUM_LEVELS_FLUX)],
    ids=["table of 1000", "table of a Flux with a guidance embedding"],
)
def test_levels_are_comfyuis_to_the_last_bit_for_many_steps_and_shifts(scheduler, sums_of, usual, shift_of, num_levels):
    for shift, sums in REFERENCE[sums_of][scheduler].items():
        for steps, expected in zip(REFERENCE["steps"], sums, strict=True):
            if steps > 30 and scheduler == "beta" and shift != usual:
                continue  # the quantiles don't depend on the shift
            sigmas = sampling_sigmas(scheduler, steps, shift_of(shift), num_levels)
            assert zlib.crc32(sigmas.numpy().tobytes()) == expected, (scheduler, steps, shift)


@pytest.mark.parametrize("scheduler", ["beta", "simple", "normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_fall_from_noise_to_the_picture(scheduler, shift):
    sigmas = sampling_sigmas(scheduler, 26, shift)
    assert sigmas.dtype == torch.float32 and len(sigmas) == 27
    assert sigmas[0] == pytest.approx(1.0) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_a_single_step_goes_all_the_way():
    for scheduler in ("beta", "simple", "normal"):
        assert sampling_sigmas(scheduler, 1).tolist() == [1.0, 0.0]


def test_beta_visits_a_level_once():
    sigmas = sampling_sigmas("beta", 1000)
    assert len(sigmas) < 1001 and (sigmas.diff() < 0).all()
