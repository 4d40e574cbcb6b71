"""Adaptive guidance settings, shared by AdaptiveGuider and ValidateSampler."""

from __future__ import annotations

from typing import Annotated

from ..spec import Doc, Range

THRESHOLD = 0.990

Threshold = Annotated[
    float,
    Range(0.0, 1.0, 0.001),
    Doc(
        "Adaptive guidance: once the cosine similarity of the positive and the negative prediction reaches this value, "
        "the remaining steps run only the positive prompt. 1: never."
    ),
]
UncondZeroScale = Annotated[
    float,
    Range(0.0, 2.0, 0.01),
    Doc(
        "Adaptive guidance: contrast of the steps after the threshold, which run only the positive prompt. 0: no "
        "change."
    ),
]
CfgStart = Annotated[
    float,
    Range(0.0, 1.0, 0.01),
    Doc("Adaptive guidance: run only the positive prompt up to this share of the sampling schedule."),
]
DisabledSteps = Annotated[
    int, Range(0, 1000), Doc("Adaptive guidance: number of initial steps that run only the positive prompt.")
]
