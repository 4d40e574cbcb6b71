"""When CFG's negative prompt runs: fields that AdaptiveGuider and ValidateSampler share."""

from __future__ import annotations

from typing import Annotated

from ..spec import Doc, Range

THRESHOLD = 0.990

Threshold = Annotated[
    float,
    Range(0.0, 1.0, 0.001),
    Doc(
        "Adaptive guidance: once the predictions of the positive and the negative prompt are this similar (cosine), the remaining steps run the positive prompt alone. 1: never."
    ),
]
UncondZeroScale = Annotated[
    float,
    Range(0.0, 2.0, 0.01),
    Doc(
        "Adaptive guidance: contrast of the later steps that run the positive prompt alone. 0 leaves them as they are."
    ),
]
CfgStart = Annotated[
    float,
    Range(0.0, 1.0, 0.01),
    Doc("Adaptive guidance: up to this share of the run the positive prompt runs alone."),
]
DisabledSteps = Annotated[
    int, Range(0, 1000), Doc("Adaptive guidance: this many first steps run the positive prompt alone.")
]
