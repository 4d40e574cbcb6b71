"""Names that files, caches and run folders hold. A change here would orphan them: rename the class, and keep the text."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from chroma_trainer.trainer_core import host
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.serialize import key_text
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.data.buckets import Placement
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.runs import layout
from torch import nn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        # keys of latents and masks, and the digest of a dataset
        (Placement((64, 32), (70, 32), (3, 0)), "Placement(bucket=(64, 32), resize=(70, 32), crop=(3, 0))"),
        # the key of the base's files on disk
        (
            QuantizationConfig(),
            "QuantizationConfig(level='none', quantize_via='accelerator', text_encoder='none', cached_bases=2, products='exact')",
        ),
        # keys of what the planner counted
        (Shape(512, 512, 1, 80), "Shape(width=512, height=512, batch=1, text_tokens=80, is_drawn=False)"),
        (
            AdapterConfig(),
            "AdapterConfig(kind='lora', format='universal', init_lora='none', dropout=0.0, block_lr='', ema_decay=0.0, "
            "lokr_factor=-1, lokr_decompose_both=False, svd_iterations=8, eva_batches=8, precision='fp32')",
        ),
        (
            OptimizerConfig(),
            "OptimizerConfig(optimizer='adamw', beta1=0.0, beta2=0.0, beta3=0.0, eps=0.0, kahan=False, prodigy_d0=1e-06, "
            "prodigy_d_coef=1.0, prodigy_growth=0.0, ademamix_alpha=5.0, adafactor_scale_parameter=False, lr_num_cycles=3, "
            "lr_power=2.0, lr_decay_share=0.2, lr_min_ratio=0.0)",
        ),
        # names of saved grids
        (
            ValidationConfig(),
            "ValidationConfig(prompts='', negative_prompt='', steps=26, cfg=3.5, resolutions='1024x1024', seed=0, "
            "scheduler='beta', shift=1.0, lora_strength='1.0', guidance='cfg', threshold=0.99, uncond_zero_scale=0.0, "
            "cfg_start_pct=0.0, initial_disabled_steps=0, checkpoints='', sampling='as set', reference='', attention='same')",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_texts_that_are_hashed(value, text):
    assert key_text(value) == text


def test_a_text_that_is_hashed_survives_renaming_and_new_fields():
    @dataclasses.dataclass(frozen=True)
    class Spot:  # was Place(x, y)
        KEY: typing.ClassVar = ("Place", "x=left", "y")
        left: int
        y: str
        weight: float = 1.0  # added later

    assert key_text(Spot(3, "a'b")) == """Place(x=3, y="a'b")"""
    assert key_text(Spot(3, "b", 0.5)) == "Place(x=3, y='b', weight=0.5)"


@pytest.mark.parametrize(
    "kind", [Placement, QuantizationConfig, Shape, AdapterConfig, OptimizerConfig, ValidationConfig]
)
def test_every_field_that_is_hashed_exists(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    stored = [entry.rpartition("=")[2] for entry in kind.KEY[1:]]
    assert len(set(stored)) == len(stored) and set(stored) <= fields


def test_names_of_optimizers_in_checkpoints():
    expected = {
        "adamw": "AdamW", "adamw_bf16": "AdamWBf16", "optimi-lion": "Lion", "optimi-stableadamw": "StableAdamW",
        "prodigy": "Prodigy", "schedulefree-adamw": "ScheduleFreeAdamW", "adafactor": "Adafactor", "came": "Came",
    }  # fmt: skip
    for name, kind in expected.items():
        config = OptimizerConfig(optimizer=name)
        optimizer = load("optimizer", name).build([nn.Parameter(torch.zeros(2, 2))], config, 1e-3, 0.0, 0)
        assert type(optimizer).__name__ == kind


def test_events_of_runs_and_the_live_page():
    fields = {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in typing.get_args(host.Event)}
    assert fields == {
        "Notice": ["text", "level", "ascii"],
        "PhaseStarted": ["phase", "total", "unit"],
        "PhaseProgress": ["phase", "done", "total"],
        "StepReport": ["step", "total", "loss", "learning_rate", "grad_norm", "seconds"],
        "PreviewReady": ["step", "path"],
        "SamplingPreview": ["step", "num_steps", "path"],
        "CheckpointSaved": ["step", "path"],
        "LoraSaved": ["path", "sha256", "applied", "num_keys"],
        "RunOpened": ["folder"],
        "MemoryPlanned": ["device_bytes", "ram_bytes"],
        "EvalReport": ["step", "loss", "standard_error", "held_out"],
        "EvalCompared": [
            "step",
            "best",
            "change",
            "change_error",
            "trained",
            "sigmas",
            "gap_since",
            "gaps",
            "gap_errors",
            "waiting",
            "overfits",
        ],
        "LeakMeasured": ["step", "leak", "standard_error", "sigmas", "by_sigma", "moved_with", "moved_without"],
        "ImagesScored": [
            "step",
            "strength",
            "is_shown",
            "clip",
            "clip_error",
            "clip_change",
            "clip_change_error",
            "likeness",
            "likeness_error",
            "likeness_change",
            "likeness_change_error",
            "prompts",
            "by_prompt",
        ],
        "RunReported": ["report"],
        "SweepReported": ["sweep", "axes", "planned", "runs"],
        "MemoryInUse": ["memory", "used", "peak", "total"],
    }


def test_names_in_a_runs_folder():
    names = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    assert names == {
        "LOCAL_VALUES": "paths.json", "REQUEST": "request.json", "REPORT": "report.json", "MANIFEST": "world.json", "STATUS": "status.json",
        "COMMAND": "command.json", "EVENTS": "events.jsonl", "CROP_SHEET": "crops.png", "PAIR_SHEET": "pairs.png",
        "DENSITY_CHART": "density.png", "LOSS_CHART": "loss.png", "CHECKPOINTS": "checkpoints", "VALIDATION": "validation",
        "BY_NAME": "by-name", "SCORES": "scores.json", "PREVIEW": "preview.jpg", "DRAWN": "drawn", "IMAGE_SETS": "image-sets", "LAUNCH_VALUES": "launch.json", "QUEUE": "queue",
        "CHECKPOINT_LORA": "lora.safetensors", "CHECKPOINT_STATE": "state.json", "CHECKPOINT_WEIGHTS": "adapter.safetensors", "CHECKPOINT_MANIFEST": "manifest.json", "STEP": "step-", "LORAS": "loras", "MODELS": "diffusion_models", "RUNS": "chroma_trainer", "RANKS": "ranks",
    }  # fmt: skip
    assert layout.step_name(250) == "step-000250"
